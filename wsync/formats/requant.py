"""From f32 to power-of-two scales without the original weight, as an engine does when it loads a checkpoint."""

from __future__ import annotations

from torch import Tensor

from wsync.errors import NonFiniteError
from wsync.formats.fp8_block128 import dequantize_block128, quantize_block128
from wsync.formats.reference import check_parts, first_nonfinite


def requantize_e8m0_reference(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``fp8_block128`` for a weight in ``fp8_block128_f32``: decoded in f32, then encoded again.

    Power-of-two scales come out halved where a block's largest code is at most 224, with the same values; from there on
    another pass changes nothing. After f32 scales it takes two passes to get there: the first one rounds, and may round
    a largest code to 224.

    Args:
        codes: e4m3 ``[..., N, K]``.
        scales: f32 ``[..., ceil(N/128), ceil(K/128)]``.

    Raises:
        DtypeMismatchError: the codes are not e4m3 (or its codes as uint8), or the scales are not f32.
        NonFiniteError: a decoded weight is NaN or infinite; it names the first one.
        ShapeMismatchError: the scales are not the grid of the weight.

    Source: vLLM ``requant_weight_ue8m0_inplace``.
    """
    check_parts({"weight": codes, "weight_scale_inv": scales}, "fp8_block128_f32")
    values = dequantize_block128(codes, scales)
    if (index := first_nonfinite(values)) is not None:
        raise NonFiniteError(f"requantisation takes finite weights, but element {index} is {float(values[index])}")
    return quantize_block128(values, power_of_two=True)
