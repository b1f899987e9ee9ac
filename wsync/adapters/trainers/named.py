"""Finds the named tensors of what a user hands over: a mapping of tensors and arrays, or a module."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import nn

from wsync.adapters.trainers.placements import is_dtensor
from wsync.errors import ConfigError, DtypeMismatchError, ManifestError, StateError

WRAPPER_PREFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""What `torch.compile` and activation checkpointing put into names; a checkpoint does not have them."""

_DLPACK_CPU = 1


class NamedTensor(NamedTuple):
    """One named tensor.

    Attributes:
        name: checkpoint name.
        tensor: what holds it; arrays share memory with it.
        kind: ``"parameter"`` or ``"buffer"``.
        frozen: the trainer does not change it.
        owner, key: the dict of the module that holds it, so that a replaced parameter is noticed; or None.
        original: the array that the memory belongs to, kept alive.
    """

    name: str
    tensor: torch.Tensor
    kind: str
    frozen: bool
    owner: Mapping[str, torch.Tensor | None] | None = None
    key: str = ""
    original: object = None


def named_tensors(source: object, name_map: Callable[[str], str] | None = None) -> list[NamedTensor]:
    """All named tensors of ``source``, in its own order.

    Raises:
        ConfigError: ``source`` is neither a module nor a mapping, is empty, holds what is no tensor, or is sharded into
            flat vectors (FSDP1, ZeRO-3).
        ManifestError: two tensors have one name.
        StateError: a module whose FSDP parameters are gathered at the moment.
    """
    if isinstance(source, nn.Module):
        found = list(_of_module(_unwrapped(source)))
    elif isinstance(source, Mapping):
        found = [_of_value(name, value) for name, value in source.items()]
    else:
        raise ConfigError(f"a source is a module or a mapping of names to tensors, got {type(source).__name__}")
    if not found:
        raise ConfigError(f"the {type(source).__name__} holds no tensors")
    if name_map is not None:
        found = [entry._replace(name=name_map(entry.name)) for entry in found]
    seen: set[str] = set()
    for entry in found:
        if not isinstance(entry.name, str) or not entry.name:
            raise ConfigError(f"the name of a tensor is a string that is not empty, got {entry.name!r}")
        if entry.name in seen:
            raise ManifestError(f"two tensors have the name {entry.name!r}")
        seen.add(entry.name)
    return found


def _of_module(module: nn.Module) -> Iterator[NamedTensor]:
    """Parameters and persistent buffers, under the names and in the order of ``state_dict()``."""
    for prefix, part in module.named_modules(remove_duplicate=False):
        _check_sharded(prefix, part)
        clean = _clean(f"{prefix}." if prefix else "")
        for key, parameter in part._parameters.items():
            if parameter is not None:
                _check_whole(clean + key, parameter)
                frozen = not parameter.requires_grad
                yield NamedTensor(clean + key, parameter, "parameter", frozen, part._parameters, key)
        for key, buffer in part._buffers.items():
            if buffer is not None and key not in part._non_persistent_buffers_set:
                yield NamedTensor(clean + key, buffer, "buffer", False, part._buffers, key)


def _unwrapped(module: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel, which puts ``module.`` before every name."""
    inner = getattr(module, "module", None)
    is_ddp = type(module).__name__ in ("DistributedDataParallel", "DataParallel")
    return inner if is_ddp and isinstance(inner, nn.Module) else module


def _check_whole(name: str, parameter: torch.Tensor) -> None:
    """A ZeRO-3 parameter is empty outside of its layer's forward pass; its shape is kept beside it."""
    whole = getattr(parameter, "ds_shape", None)
    if whole is not None and tuple(whole) != tuple(parameter.shape):
        raise ConfigError(
            f"{name!r} is partitioned by ZeRO-3: it holds shape {tuple(parameter.shape)} of {tuple(whole)}",
            hint="gather it, or train with FSDP2",
        )


def _clean(prefix: str) -> str:
    for wrapper in WRAPPER_PREFIXES:
        prefix = prefix.replace(wrapper, "")
    return prefix


def _check_sharded(prefix: str, module: nn.Module) -> None:
    """Refuse FSDP1's flat vectors, and FSDP2's gathered tensors (between forward and backward), which it will free."""
    if type(module).__name__ == "FullyShardedDataParallel":
        raise ConfigError(
            f"the module {prefix or '(root)'!r} is sharded by FSDP1, whose flat vectors are not described",
            hint="shard it with fully_shard (FSDP2), or hand over a mapping of whole tensors",
        )
    get_state = getattr(module, "_get_fsdp_state", None)
    if get_state is None:
        return
    state = get_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    for group in groups:
        if group is not None and getattr(group, "_sharded_state", None) is not None and not group.is_sharded:
            raise StateError(
                f"the FSDP module {prefix or '(root)'!r} holds gathered parameters instead of sharded ones",
                hint="call reshard() on it, or describe the model before its forward pass",
            )


def _of_value(name: Any, value: Any) -> NamedTensor:
    if isinstance(value, nn.Parameter):
        return NamedTensor(name, value, "parameter", not value.requires_grad)
    if isinstance(value, torch.Tensor):
        return NamedTensor(name, value, "parameter", False)
    return NamedTensor(name, _as_tensor(name, value), "parameter", False, original=value)


def _as_tensor(name: Any, value: Any) -> torch.Tensor:
    """The tensor that shares an array's memory."""
    array_interface = getattr(value, "__array_interface__", None)
    if array_interface is not None and hasattr(value, "dtype"):
        try:
            with warnings.catch_warnings():
                # Arrays that may not be written are fine: wsync only reads them.
                warnings.simplefilter("ignore", UserWarning)
                return torch.from_numpy(value)
        except TypeError as e:
            raise DtypeMismatchError(f"{name!r} is an array of dtype {value.dtype}, which wsync does not move") from e
        except ValueError as e:
            raise ConfigError(f"{name!r} has strides {value.strides} that cannot be shared: {e}") from e
    if not hasattr(value, "__dlpack__"):
        raise ConfigError(
            f"{name!r} is a {type(value).__name__}, which is neither a tensor nor an array with __dlpack__"
        )
    device = value.__dlpack_device__()
    if int(device[0]) != _DLPACK_CPU:
        raise ConfigError(
            f"{name!r} is on the DLPack device {tuple(int(d) for d in device)}; only memory of the CPU is read"
        )
    try:
        shared: torch.Tensor = torch.utils.dlpack.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as e:
        raise ConfigError(f"{name!r}, a {type(value).__name__}, cannot be shared through DLPack: {e}") from e
    return shared


def replaced_in(owner: MutableMapping[str, Any] | Mapping[str, Any], key: str, described: torch.Tensor) -> bool:
    """Whether a module holds other memory than was described.

    FSDP2 shows the gathered parameter in the place of the sharded one during a forward pass; the shard stays.
    """
    current = owner.get(key)
    if current is described:
        return False
    if current is None:
        return True
    if is_dtensor(described):
        if not is_dtensor(current) or current.placements != described.placements:  # type: ignore[attr-defined]
            return False
        return bool(current._local_tensor.data_ptr() != described._local_tensor.data_ptr())  # type: ignore[attr-defined]
    return bool(current.data_ptr() != described.data_ptr())
