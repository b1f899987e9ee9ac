"""`quantize` and `dequantize` for whole weights: the recipes as functions of tensors."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsync.errors import ConfigError, DtypeMismatchError
from wsync.formats import dequantize_reference, part_names, quantize_reference
from wsync.formats.reference import check_names, check_parts, check_weight
from wsync.kernels import ops
from wsync.kernels.dispatch import BACKENDS, resolve_backend
from wsync.kernels.matrices import OP_OF_RECIPE, dequantize_with, quantize_with

__all__ = ["BACKENDS", "as_tensor", "dequantize", "quantize"]


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
    if weight.is_nested:
        raise DtypeMismatchError(
            "a weight is one tensor, but it is a nested one", hint="pass the tensors of .unbind() one by one"
        )
    if weight.device.type in ("cpu", "cuda") and weight.numel():
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
        backend: ``"cpu"`` (compiled kernels) or ``"reference"`` (plain torch) for CPU memory, ``"cuda"`` or
            ``"triton"`` for a GPU's, on torch's current stream, or ``"auto"``: see `wsync.kernels.dispatch`. All give
            the same bits.

    Returns:
        The parts under the engines' names, contiguous: ``weight``, and the scales of the recipe, which are multipliers
        that give the weight back. Names, dtypes and shapes: `wsync.spec.recipes.RECIPES`. Every matrix of a batch is
        encoded for itself.

    Raises:
        ConfigError: the backend is unknown, cannot run here or not on the weight's device, or the weight's memory was
            freed.
        DtypeMismatchError: the recipe does not take this dtype, or the weight is no plain tensor: see `as_tensor`.
        NonFiniteError: an element is NaN or infinite, or its bf16 rounding is; it names the first one.
        RecipeError: the recipe is unknown or does not take this shape.
    """
    tensor = as_tensor(weight)
    chosen = resolve_backend(backend, tensor.device)
    check_weight(tensor, recipe)
    if chosen == "reference" or recipe not in OP_OF_RECIPE:
        return quantize_reference(tensor, recipe)
    if chosen == "triton":
        encoded: dict[str, Tensor] = importlib.import_module("wsync.kernels.triton").quantize_triton(tensor, recipe)
        return encoded
    return quantize_with(_kernels(chosen, tensor.device), tensor, recipe)


def dequantize(
    parts: Mapping[str, Tensor], recipe: str, dtype: torch.dtype = torch.float32, backend: str = "auto"
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
        ConfigError: the backend is unknown, cannot run here or not on the parts' device, the parts are on several or
            are no mapping, or a part's memory was freed.
        DtypeMismatchError: a part has a dtype that the recipe does not write, or is no plain tensor: see `as_tensor`;
            or ``dtype`` is no torch dtype, or none of floats where the recipe rounds.
        RecipeError: the recipe is unknown, or one of its parts is missing.
        ShapeMismatchError: the scales are not the grid of the weight.
    """
    if not isinstance(parts, Mapping):
        raise ConfigError(f"the parts of a weight are a dict of tensors by name, but they are {type(parts).__name__}")
    tensors = {name: as_tensor(part) for name, part in parts.items()}
    check_names(tensors, recipe)
    _check_target(dtype, recipe)
    device = _one_device(tensors)
    chosen = resolve_backend(backend, device)
    plain = recipe not in OP_OF_RECIPE or recipe == "bf16"
    if backend == "triton" and not plain:
        raise ConfigError(
            "backend 'triton' does not dequantize", hint="use backend 'auto': plain torch where there is no 'cuda'"
        )
    if chosen in ("reference", "triton") or plain:
        return dequantize_reference(tensors, recipe, dtype)
    check_parts(tensors, recipe)
    ordered = [tensors[name].contiguous() for name in part_names(recipe)]
    return dequantize_with(_kernels(chosen, device), ordered, recipe, dtype)


def _check_target(dtype: torch.dtype, recipe: str) -> None:
    if not isinstance(dtype, torch.dtype) or not (dtype.is_floating_point or recipe == "raw"):
        raise DtypeMismatchError(f"recipe {recipe!r} decodes to a torch dtype of floats, but dtype is {dtype!r}")


def _kernels(backend: str, device: torch.device) -> Any:
    """The operations of `wsync.kernels.ops` for memory of ``device``."""
    if backend == "cpu":
        return ops
    from wsync.kernels.cuda import CudaKernels

    return CudaKernels(device)


def _one_device(tensors: dict[str, Tensor]) -> torch.device:
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) != 1:
        where = ", ".join(f"{name!r} is on {tensor.device}" for name, tensor in tensors.items())
        raise ConfigError(f"the parts of a weight are on one device, but {where}")
    return devices.pop()
