"""FSDP2, alone and with tensor, expert and pipeline parallelism on one DTensor mesh; HSDP's replicas.

The mesh is ``(pp, replicate, fsdp, tp)`` with tensor parallelism innermost, as ``torch.distributed`` users build it:
a tensor is cut for tensor parallelism first, then every part for FSDP (``[_StridedShard(0), Shard(0)]``).
Experts under ``ep`` are stacked and live on ``(pp, replicate, fsdp', ep, etp)``, with ``fsdp' * ep * etp = fsdp * tp``.

Source: torch 2.13 ``fully_shard`` and ``DTensor``; torchtitan's ``ParallelDims`` (meshes), ``apply_fsdp`` (experts are
cut by rows where there are more ranks than experts) and ``generate_llm_fqn_per_model_part`` (layers of the stages).
"""

from __future__ import annotations

import math
from collections.abc import Hashable

from wsync.describe.intervals import Interval, Split, chunk_bounds, local_intervals
from wsync.describe.layout import Degrees, divided
from wsync.describe.models.shape import ModelShape
from wsync.describe.parts import (
    DOWN,
    EMBEDDING,
    GATE,
    GATE_UP,
    HEAD,
    KV_B,
    OTHER,
    OUT,
    Q_B,
    SINKS,
    UP,
    K,
    Part,
    Q,
    V,
)
from wsync.describe.trainers.boxes import cut
from wsync.describe.trainers.scheme import Keys, Layers, Shards, num_layers
from wsync.errors import ConfigError, ManifestError
from wsync.spec.box import Box
from wsync.spec.manifest import TensorSpec

KEYS: Keys = {
    "fsdp": "ranks that shard every tensor by rows",
    "replicate": "copies of the sharded model (HSDP)",
    "tp": "tensor parallel ranks",
    "pp": "pipeline stages",
    "ep": "expert parallel ranks, of those of fsdp and tp",
    "etp": "tensor parallel ranks of each expert",
    "experts": "separate, or stacked: all experts of a projection in one tensor, which is sharded by experts",
}

COLUMN = frozenset({EMBEDDING, HEAD, Q, K, V, Q_B, KV_B, GATE, UP, SINKS})
ROW = frozenset({OUT, DOWN})
"""What tensor parallelism cuts by rows (the output) and by columns (the input); all else is replicated."""


def tp_dim(part: Part) -> int | None:
    """The dimension of a tensor that is no expert that tensor parallelism cuts, or None."""
    if part.kind in COLUMN:
        return 0
    return 1 if part.kind in ROW and not part.bias else None


class Fsdp:
    """One model over one mesh.

    Raises:
        ConfigError: degrees that do not fit each other, the world or the model.
    """

    def __init__(self, model: ModelShape, degrees: Degrees, world: int) -> None:
        self.fsdp, self.tp = degrees.number("fsdp"), degrees.number("tp")
        self.replicate, self.pp = degrees.number("replicate"), degrees.number("pp")
        degrees.check_world(world, num_ranks(degrees), "pp * replicate * fsdp * tp")
        self.ep, self.etp = degrees.number("ep"), degrees.number("etp")
        self.inner = self.fsdp * self.tp
        self.stacked = "ep" in degrees or degrees.choice("experts", ("separate", "stacked")) == "stacked"
        if "ep" in degrees and degrees.choice("experts", ("stacked", "separate")) != "stacked":
            raise ConfigError(f"layout {degrees.layout!r} has ep={self.ep}, which needs experts=stacked, got separate")
        if "etp" in degrees and "ep" not in degrees:
            raise ConfigError(f"layout {degrees.layout!r} has etp={self.etp}, but no ep")
        self.by_ep = "ep" in degrees
        self.efsdp = divided(self.inner, self.ep * self.etp, "fsdp * tp", "ep * etp")
        self.num_experts = num_experts(model)
        if self.by_ep:
            if not self.num_experts:
                raise ConfigError(f"layout {degrees.layout!r} has ep={self.ep}, but {model.name} has 0 experts")
            divided(self.num_experts, self.ep, "the number of experts", "ep")
        self.layers = Layers(model, stage_of_layers(num_layers(model), self.pp), self.pp)

    def key(self, tensor: TensorSpec, part: Part) -> Hashable:
        """Equal for tensors that are laid out alike."""
        stages = self.layers.of(tensor, part)
        if part.routed and self.stacked:
            return (tensor.shape, stages, part.expert, part.kind, part.bias)
        return (tensor.shape, stages, None if part.routed else tp_dim(part))

    def shards(self, tensor: TensorSpec, part: Part) -> Shards:
        """Who holds what."""
        if part.kind == OTHER and len(tensor.shape) > 1 and self.tp > 1:
            raise ManifestError(
                f"tensor {tensor.name!r} of shape {tensor.shape} is none that tp={self.tp} is known to cut",
                hint="leave tp out of the layout",
            )
        inner = self._inner(tensor.shape, part)
        stages = self.layers.of(tensor, part)
        return tuple(
            boxes if stage in stages else ()
            for stage in range(self.pp)
            for _ in range(self.replicate)
            for boxes in inner
        )

    def _inner(self, shape: tuple[int, ...], part: Part) -> list[tuple[Box, ...]]:
        """The boxes of the ranks of one replica of one stage."""
        if part.routed and self.stacked:
            return [self._expert(shape, part, rank) for rank in range(self.inner)]
        dim = None if part.routed else tp_dim(part)
        return [self._dense(shape, dim, f, t) for f in range(self.fsdp) for t in range(self.tp)]

    def _dense(self, shape: tuple[int, ...], dim: int | None, f: int, t: int) -> tuple[Box, ...]:
        if not shape:
            return cut(shape, {})
        by_fsdp = Split(f, self.fsdp)
        if dim == 0 and self.tp > 1:
            splits = [Split(f, self.fsdp, split_factor=self.tp), Split(t, self.tp)]
            return cut(shape, {0: local_intervals(shape[0], splits)})
        cuts: dict[int, tuple[Interval, ...]] = {0: local_intervals(shape[0], [by_fsdp])}
        if dim is not None and dim > 0:
            cuts[dim] = local_intervals(shape[dim], [Split(t, self.tp)])
        return cut(shape, cuts)

    def _expert(self, shape: tuple[int, ...], part: Part, rank: int) -> tuple[Box, ...]:
        """What a rank holds of one expert, or of all of them in one tensor."""
        etp, ep, efsdp = rank % self.etp, rank // self.etp % self.ep, rank // self.etp // self.ep
        experts = (ep * self.num_experts // self.ep, (ep + 1) * self.num_experts // self.ep)
        by_rows = self.ep > 1 and self.efsdp * self.ep > self.num_experts
        if not by_rows:
            begin, end = chunk_bounds(experts[1] - experts[0], self.efsdp, efsdp)
            experts = (experts[0] + begin, experts[0] + end)
        lead = 1 if part.stacked else 0
        cuts: dict[int, tuple[Interval, ...]] = {}
        if part.stacked:
            cuts[0] = (experts,)
        elif part.expert is None or not experts[0] <= part.expert < experts[1]:
            return ()
        dim = self._etp_dim(part)
        splits = [Split(etp, self.etp)] if dim is not None and self.etp > 1 else []
        if dim is not None and splits:
            cuts[lead + dim] = local_intervals(shape[lead + dim], splits)
        if by_rows:
            # `fully_shard` refuses any other cut of a dimension that is not the first.
            local = shape[lead] // self.etp if dim == 0 else shape[lead]
            divided(local, self.efsdp, f"rows of one expert's part of {part.stem}", "fsdp * tp / (ep * etp)")
            rows = (
                [Split(efsdp, self.efsdp, split_factor=self.etp), *splits]
                if dim == 0 and splits
                else [Split(efsdp, self.efsdp)]
            )
            cuts[lead] = local_intervals(shape[lead], rows)
        return cut(shape, cuts)

    def _etp_dim(self, part: Part) -> int | None:
        if part.stacked and self.etp > 1:
            raise ConfigError(f"etp={self.etp} cuts single experts, but the checkpoint stacks them")
        return 0 if part.kind in (GATE, UP, GATE_UP) else None if part.bias else 1


def num_ranks(degrees: Degrees) -> int:
    """The world of a layout."""
    return math.prod(degrees.number(key) for key in ("pp", "replicate", "fsdp", "tp"))


def num_experts(model: ModelShape) -> int:
    """Experts that tokens are routed to; 0 for a dense model."""
    from wsync.describe.parts import part_of

    if model.facts is not None:
        return model.facts.moe.num_experts if model.facts.moe is not None else 0
    found = 0
    for tensor in model.tensors:
        part = part_of(tensor.name)
        if part.routed:
            found = max(found, tensor.shape[0] if part.expert is None else part.expert + 1)
    return found


def stage_of_layers(layers: int, num_stages: int) -> list[int]:
    """The stage of each layer: equal stages, where the embedding and the output layer count as one layer each.

    Raises:
        ConfigError: there are more stages than that gives.
    """
    if num_stages == 1:
        return [0] * layers
    each, more = divmod(layers + 2, num_stages)
    counts = [each + (stage < more) for stage in range(num_stages)]
    counts[0] -= 1
    counts[-1] -= 1
    if min(counts) < 0 or layers < num_stages:
        raise ConfigError(f"the model has {layers} layers, which are too few for pp={num_stages}")
    return [stage for stage, count in enumerate(counts) for _ in range(count)]
