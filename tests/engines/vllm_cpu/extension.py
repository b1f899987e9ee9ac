"""What a test asks of a vLLM worker: everything that it computes with, as bytes; and where that lies.

Loaded by the worker processes as ``worker_extension_cls``. Importing it also installs the reference fp8 kernel and a
weight transfer backend that calls vLLM's own reload.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from vllm_cpu import reference_fp8

reference_fp8.install()

RELOAD_BACKEND = "test_reload"

# Where an object may keep weights of its own: layers' quantisation methods, kernels, attention backends.
_WALKED_MODULES = ("vllm.model_executor.", "vllm.v1.attention.")
# Not weights: the caches of keys and values, and torch's own state of a module.
_SKIPPED_ATTRIBUTES = ("kv_cache", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_MAX_DEPTH = 6


class EngineProbe:
    """Methods of the worker, for `collective_rpc` by name."""

    def wsync_test_dump(self, folder: str) -> None:
        """Write ``rank<r>.safetensors``: each tensor as the bytes it occupies, its description in the metadata."""
        model = self.model_runner.model  # type: ignore[attr-defined]
        parallel = self.parallel_config  # type: ignore[attr-defined]
        rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
        described: dict[str, str] = {}
        held: dict[str, Tensor] = {}
        for name, kind, tensor in live_tensors(model):
            held[name] = _occupied_bytes(tensor)
            described[name] = json.dumps([kind, str(tensor.dtype), list(tensor.shape), list(tensor.stride())])
        for name, tensor in packed_weights(model):
            held[name] = _occupied_bytes(tensor)
            described[name] = json.dumps(["packed", str(tensor.dtype), list(tensor.shape), list(tensor.stride())])
        save_file(held, Path(folder) / f"rank{rank}.safetensors", metadata=described)

    def wsync_test_pointers(self) -> dict[str, int]:
        """The address of each live tensor."""
        model = self.model_runner.model  # type: ignore[attr-defined]
        return {name: tensor.data_ptr() for name, _, tensor in live_tensors(model)}

    def wsync_test_kernel_libraries(self) -> list[str]:
        """File names of vLLM's kernel libraries in this process."""
        lines = Path("/proc/self/maps").read_text().splitlines()
        paths = {Path(line.split()[-1]) for line in lines if "/vllm/_C" in line}
        return sorted(path.name for path in paths)


def live_tensors(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Name, kind and tensor of each parameter, buffer and other tensor that a layer or what belongs to it refers to."""
    modules = dict(model.named_modules(remove_duplicate=True))
    seen: set[int] = {id(module) for module in modules.values()}
    for prefix, module in modules.items():
        dot = f"{prefix}." if prefix else ""
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield dot + name, "parameter", parameter
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            yield dot + name, "buffer", buffer
        for name, value in sorted(vars(module).items()):
            if not name.startswith(_SKIPPED_ATTRIBUTES):
                for path, tensor in _tensors_in(value, dot + name, seen, 0):
                    yield path, "attribute", tensor


def _tensors_in(value: Any, path: str, seen: set[int], depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
        return
    if depth == _MAX_DEPTH or id(value) in seen:
        return
    seen.add(id(value))
    for name, inner in _inside(value):
        if not name.startswith(_SKIPPED_ATTRIBUTES):
            yield from _tensors_in(inner, f"{path}.{name}", seen, depth + 1)


def _inside(value: Any) -> list[tuple[str, Any]]:
    """What a container, a closure or an object of vLLM's layers refers to."""
    if isinstance(value, dict):
        return [(str(key), inner) for key, inner in value.items()]
    if isinstance(value, (list, tuple)):
        return [(str(i), inner) for i, inner in enumerate(value)]
    if isinstance(value, types.FunctionType) and value.__closure__:
        names = value.__code__.co_freevars
        return [(name, cell.cell_contents) for name, cell in zip(names, value.__closure__, strict=True)]
    if isinstance(value, nn.Module):
        inner = dict(value.named_parameters(recurse=False)) | dict(value.named_buffers(recurse=False))
        return sorted((vars(value) | dict(value.named_children()) | inner).items())
    if type(value).__module__.startswith(_WALKED_MODULES):
        return sorted(getattr(value, "__dict__", {}).items())
    return []


def packed_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights that linear kernels hold in a form of their own, `[N, K]`, read back by multiplying the identity.

    Exact: each element of the product is one weight, and zeros (a weight of -0.0 alone would come back as 0.0).
    """
    for prefix, module in model.named_modules():
        multiply = vars(module).get("cpu_linear")
        if multiply is None or module.weight.dim() > 2:
            continue
        weight = module.weight
        identity = torch.eye(_num_columns(module), dtype=weight.dtype)
        yield f"{prefix}.cpu_linear", multiply(identity, weight, None).t().contiguous()


def _num_columns(module: nn.Module) -> int:
    """K of a linear layer whose weight may be empty."""
    if module.weight.numel():
        return module.weight.shape[1]
    return getattr(module, "input_size_per_partition", None) or module.input_size


def _occupied_bytes(tensor: Tensor) -> Tensor:
    """A copy of the bytes from the first to the last element, in the order of memory."""
    plain = tensor.detach().as_subclass(Tensor)
    if plain.numel() == 0:
        return torch.empty(0, dtype=torch.uint8)
    span = 1 + sum((n - 1) * stride for n, stride in zip(plain.shape, plain.stride(), strict=True))
    return torch.as_strided(plain, (span,), (1,)).clone().view(torch.uint8)


class ReloadInit:
    """No parameters."""


class ReloadUpdate:
    """A checkpoint file to load."""

    def __init__(self, file: str) -> None:
        self.file = file


class ReloadEngine(WeightTransferEngine):  # type: ignore[type-arg]
    """The comparison: weights of a file through vLLM's own layerwise reload."""

    init_info_cls = ReloadInit
    update_info_cls = ReloadUpdate

    def init_transfer_engine(self, init_info: ReloadInit) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class waits for an accelerator, which a CPU build does not have.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: ReloadUpdate) -> None:
        self.model.load_weights(iter(load_file(update_info.file).items()))

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing to leave."""


if RELOAD_BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(RELOAD_BACKEND, ReloadEngine)
