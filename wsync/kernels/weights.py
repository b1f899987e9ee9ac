"""`quantize` and `dequantize` for whole weights: the recipes as functions of tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsync.errors import ConfigError, DtypeMismatchError
from wsync.formats import dequantize_reference, part_names, quantize_reference
from wsync.formats.reference import check_names, check_parts, check_weight
from wsync.kernels.matrices import OP_OF_RECIPE, dequantize_cpu, quantize_cpu

BACKENDS = ("auto", "cpu", "reference")


def as_tensor(weight: Any) -> Tensor:
    """A tensor over the memory of ``weight``: a tensor, a NumPy array, or anything that speaks DLPack.

    Conjugated and negated views, read-only arrays and arrays with negative strides are copied.

    Raises:
        ConfigError: a tensor whose memory was freed.
        DtypeMismatchError: it is none of these, or has no plain memory of its own: a sparse tensor, or a subclass that
            dispatches (DTensor, FakeTensor).
    """
    tensor: Tensor = weight if isinstance(weight, Tensor) else _from_dlpack(weight)
    _check_memory(tensor)
    plain: Tensor = tensor.detach().as_subclass(Tensor)
    return plain.resolve_conj().resolve_neg()


def _from_dlpack(weight: Any) -> Tensor:
    if not hasattr(weight, "__dlpack__"):
        raise DtypeMismatchError(
            f"a weight is a tensor, an array or an object with __dlpack__, but it is {type(weight).__name__}"
        )
    if isinstance(weight, np.ndarray) and (not weight.flags.writeable or min(weight.strides, default=0) < 0):
        weight = weight.copy(order="C")  # DLPack has no read-only arrays, and torch no negative strides
    try:
        return torch.utils.dlpack.from_dlpack(weight)
    except (BufferError, RuntimeError, TypeError, ValueError) as e:
        dtype = getattr(weight, "dtype", "an unknown dtype")
        raise DtypeMismatchError(f"torch cannot take a weight of {type(weight).__name__} with {dtype}: {e}") from e


def _check_memory(weight: Tensor) -> None:
    kind = type(weight)
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise DtypeMismatchError(
            f"a weight is a tensor with memory of its own, but it is a {kind.__name__} of shape {tuple(weight.shape)}",
            hint="pass the local tensor, such as DTensor.to_local() or DTensor.full_tensor()",
        )
    if weight.layout != torch.strided:
        raise DtypeMismatchError(f"a weight has the layout torch.strided, but it has {weight.layout}")
    if weight.device.type == "cpu" and weight.numel():
        span = 1 + sum((n - 1) * s for n, s in zip(weight.shape, weight.stride(), strict=True))
        needed = (weight.storage_offset() + span) * weight.element_size()
        held = weight.untyped_storage().nbytes()
        if held < needed:
            raise ConfigError(f"a weight of shape {tuple(weight.shape)} needs {needed} bytes, its storage has {held}")


def quantize(weight: Any, recipe: str, backend: str = "auto") -> dict[str, Tensor]:
    """Encode one weight by ``recipe``, with its values as given (f32 is not rounded to bf16 first).

    Args:
        weight: ``[..., N, K]`` in bf16, f16 or f32 (any dtype for ``raw``), any strides: a tensor, a NumPy array or an
            object with ``__dlpack__``. The last two dimensions are the matrix.
        recipe: a name of `wsync.spec.recipes.RECIPES`.
        backend: ``"cpu"`` (compiled kernels), ``"reference"`` (plain torch), or ``"auto"``: ``"cpu"``. All give the
            same bits.

    Returns:
        The parts under the engines' names, contiguous: ``weight``, and the scales of the recipe, which are multipliers
        that give the weight back. Names, dtypes and shapes: `wsync.spec.recipes.RECIPES`. Every matrix of a batch is
        encoded for itself.

    Raises:
        ConfigError: the backend is unknown, or the weight is not in CPU memory (or its memory was freed).
        DtypeMismatchError: the recipe does not take this dtype, or the weight is no plain tensor: see `as_tensor`.
        NonFiniteError: an element is NaN or infinite, or its bf16 rounding is; it names the first one.
        RecipeError: the recipe is unknown or does not take this shape.
    """
    _check_backend(backend)
    tensor = as_tensor(weight)
    if tensor.device.type != "cpu":
        raise ConfigError(f"backend {backend!r} quantizes CPU memory, but the weight is on {tensor.device}")
    check_weight(tensor, recipe)
    if backend == "reference" or recipe not in OP_OF_RECIPE:
        return quantize_reference(tensor, recipe)
    return quantize_cpu(tensor, recipe)


def dequantize(
    parts: dict[str, Tensor], recipe: str, dtype: torch.dtype = torch.float32, backend: str = "auto"
) -> Tensor:
    """Decode the parts of one weight: ``q * scale`` in f32, cast once to ``dtype``.

    Args:
        parts: those that `quantize` returns, or an engine's checkpoint holds under these names; any strides. 8-bit
            floats may be given as bytes.
        recipe: how they were encoded.
        dtype: of the result.
        backend: as for `quantize`. All give the same bits.

    Returns:
        The weight ``[..., N, K]``, contiguous.

    Raises:
        ConfigError: the backend is unknown, or a part is not in CPU memory (or its memory was freed).
        DtypeMismatchError: a part has a dtype that the recipe does not write, or is no plain tensor: see `as_tensor`.
        RecipeError: the recipe is unknown, or one of its parts is missing.
        ShapeMismatchError: the scales are not the grid of the weight.
    """
    _check_backend(backend)
    tensors = {name: as_tensor(part) for name, part in parts.items()}
    for name, part in tensors.items():
        if part.device.type != "cpu":
            raise ConfigError(f"dequantize reads CPU memory, but {name!r} is on {part.device}")
    if backend == "reference" or recipe not in OP_OF_RECIPE or recipe == "bf16":
        return dequantize_reference(tensors, recipe, dtype)
    check_names(tensors, recipe)
    check_parts(tensors, recipe)
    return dequantize_cpu([tensors[name].contiguous() for name in part_names(recipe)], recipe, dtype)


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r} is unknown; known are {', '.join(BACKENDS)}")
