"""The trainer side of the benchmark: a Hugging Face model, sharded with FSDP2, that changes at every version."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from wsync.bench.world import World

NUM_CONTENTS = 3
"""Versions cycle through this many different weights: a stale byte of either of the last two versions shows."""

_CONTENT_BITS = (0x0000, 0x8015, 0x004A)  # of a bf16: sign and mantissa only, so that every value stays finite


class Trainer:
    """One FSDP2 rank.

    Attributes:
        model: in bf16, sharded over the trainers by `torch.distributed.fsdp.fully_shard`.
    """

    def __init__(self, world: World, config: dict[str, Any]) -> None:
        self.world = world
        self.model = _build(config)
        _shard(self.model, world)
        _fill(self.model, world.side_rank)
        self._content = 0

    @property
    def local_bytes(self) -> int:
        """Bytes of this rank's shards."""
        return sum(_local(p).nbytes for p in self.model.parameters())

    def set_version(self, version: int) -> None:
        """Change every element of every parameter in place, as an optimizer step does; a function of ``version``."""
        content = version % NUM_CONTENTS
        flip = _CONTENT_BITS[content] ^ _CONTENT_BITS[self._content]
        self._content = content
        if not flip:
            return
        with torch.no_grad():
            for parameter in self.model.parameters():
                _flip_bits(_local(parameter), flip)

    def full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Gather one parameter after the other, on all trainers at once (`DTensor.full_tensor`)."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                yield name, _full(parameter)

    def shapes(self) -> list[tuple[str, list[int], str]]:
        """Name, global shape and dtype of every parameter, tied ones once."""
        return [(n, list(p.shape), str(p.dtype).removeprefix("torch.")) for n, p in self.model.named_parameters()]


def _build(config: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    fields = {key: value for key, value in config.items() if key != "model_type"}
    with no_init_weights():  # `_fill` writes the shards only
        from_config: Any = AutoModelForCausalLM.from_config
        model: nn.Module = from_config(AutoConfig.for_model(config["model_type"], **fields), dtype=torch.bfloat16)
    model.tie_weights()  # type: ignore[operator]
    return model


def _shard(model: nn.Module, world: World) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(world.trainers, "cpu")
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _fill(model: nn.Module, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            _local(parameter).normal_(mean, 0.02, generator=generator)


def _flip_bits(local: torch.Tensor, flip: int) -> None:
    if local.dtype == torch.float32:
        local.view(torch.int32).bitwise_xor_(_signed(flip << 16, 32))
    else:
        local.view(torch.int16).bitwise_xor_(_signed(flip, 16))


def _signed(bits: int, width: int) -> int:
    return bits - (1 << width) if bits >> (width - 1) else bits


def _local(parameter: torch.Tensor) -> torch.Tensor:
    local: torch.Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.detach()


def _full(parameter: torch.Tensor) -> torch.Tensor:
    full: torch.Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return full.detach()
