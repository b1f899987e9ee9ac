"""Megatron-Core: tensor, pipeline, virtual pipeline, expert and expert-tensor parallelism, in checkpoint coordinates.

Ranks are ordered ``tp, cp, dp, pp`` with tensor parallelism innermost, and for experts ``etp, ep, edp, pp``. All data
parallel ranks hold what they train whole: every one of them can send.

Source: Megatron-LM ``RankGenerator`` (order), ``get_transformer_layer_offset`` (stages), ``vocab_size_with_padding``
(vocabulary); Megatron-Bridge ``merge_qkv_weights`` and ``merge_gdn_linear_weights`` (rows of fused projections).
"""

from __future__ import annotations

import math
from collections.abc import Hashable

from wsync.describe.intervals import Interval
from wsync.describe.layout import Degrees, divided
from wsync.describe.models.shape import ModelShape
from wsync.describe.parts import OTHER, Part
from wsync.describe.trainers.boxes import cut
from wsync.describe.trainers.fsdp import num_experts
from wsync.describe.trainers.megatron_rows import Rows
from wsync.describe.trainers.scheme import Keys, Layers, Shards, num_layers
from wsync.errors import ConfigError, ManifestError
from wsync.spec.box import Box
from wsync.spec.manifest import TensorSpec

KEYS: Keys = {
    "tp": "tensor parallel ranks",
    "pp": "pipeline stages",
    "vpp": "parts of each stage (virtual pipeline stages)",
    "ep": "expert parallel ranks",
    "etp": "tensor parallel ranks of each expert",
    "cp": "context parallel ranks",
    "dp": "data parallel ranks; what is left of the world by default",
    "pp_first": "layers of the first stage, where they are not as many as in the others",
    "pp_last": "layers of the last stage, likewise",
    "vocab_multiple": "rows that the vocabulary is padded to a multiple of, per tensor parallel rank",
}

VOCAB_MULTIPLE = 128
"""Megatron's ``--make-vocab-size-divisible-by``."""


class Megatron:
    """One model over Megatron's groups.

    Raises:
        ConfigError: degrees that do not fit each other, the world or the model.
    """

    def __init__(self, model: ModelShape, degrees: Degrees, world: int) -> None:
        self.model = model
        self.tp, self.pp, self.cp = degrees.number("tp"), degrees.number("pp"), degrees.number("cp")
        model_ranks = self.tp * self.cp * self.pp
        self.dp = (
            degrees.number("dp") if "dp" in degrees else divided(world, model_ranks, "the world size", "tp * cp * pp")
        )
        degrees.check_world(world, model_ranks * self.dp, "tp * cp * dp * pp")
        self.stage_ranks = world // self.pp
        self.ep = degrees.number("ep")
        self.etp = degrees.number("etp", default=self.tp if self.ep == 1 else 1)
        divided(self.stage_ranks, self.ep * self.etp, "a stage's number of ranks", "ep * etp")
        self.num_experts = num_experts(model)
        if self.ep > 1 and not self.num_experts:
            raise ConfigError(f"layout {degrees.layout!r} has ep={self.ep}, but {model.name} has 0 experts")
        divided(self.num_experts, self.ep, "the number of experts", "ep")
        first = degrees.number("pp_first") if "pp_first" in degrees else None
        last = degrees.number("pp_last") if "pp_last" in degrees else None
        stages = stage_of_layers(num_layers(model), self.pp, degrees.number("vpp"), first, last)
        self.layers = Layers(model, stages, self.pp)
        self.rows = Rows(model, self.tp, degrees.number("vocab_multiple", default=VOCAB_MULTIPLE))
        self.expert_rows = Rows(model, self.etp, VOCAB_MULTIPLE)

    def key(self, tensor: TensorSpec, part: Part) -> Hashable:
        """Equal for tensors that are laid out alike."""
        ep = self._ep_of(part.expert) if part.expert is not None else None
        return (tensor.shape, self.layers.of(tensor, part), part.kind, part.bias, part.routed, ep)

    def shards(self, tensor: TensorSpec, part: Part) -> Shards:
        """Who holds what."""
        if part.kind == OTHER and len(tensor.shape) > 1 and self.tp > 1:
            raise ManifestError(
                f"tensor {tensor.name!r} of shape {tensor.shape} is none that tp={self.tp} is known to cut",
                hint="leave tp out of the layout",
            )
        stage = self._expert_stage(tensor.shape, part) if part.routed else self._dense_stage(tensor.shape, part)
        stages = self.layers.of(tensor, part)
        nothing: list[tuple[Box, ...]] = [()] * self.stage_ranks
        return tuple(boxes for s in range(self.pp) for boxes in (stage if s in stages else nothing))

    def _dense_stage(self, shape: tuple[int, ...], part: Part) -> list[tuple[Box, ...]]:
        by_tp = [cut(shape, self.rows.cuts(shape, part, t)) for t in range(self.tp)]
        return [by_tp[rank % self.tp] for rank in range(self.stage_ranks)]

    def _expert_stage(self, shape: tuple[int, ...], part: Part) -> list[tuple[Box, ...]]:
        return [
            self._expert(shape, part, rank % self.etp, rank // self.etp % self.ep) for rank in range(self.stage_ranks)
        ]

    def _expert(self, shape: tuple[int, ...], part: Part, etp: int, ep: int) -> tuple[Box, ...]:
        if part.expert is not None:
            mine = self._ep_of(part.expert) == ep
            return cut(shape, self.expert_rows.cuts(shape, part, etp)) if mine else ()
        each = self.num_experts // self.ep
        cuts: dict[int, list[Interval]] = {0: [(ep * each, (ep + 1) * each)]}
        return cut(shape, {**cuts, **self.expert_rows.stacked_cuts(shape, part, etp)})

    def _ep_of(self, expert: int) -> int:
        return expert // (self.num_experts // self.ep)


def num_ranks(degrees: Degrees) -> int:
    """The world of a layout; without ``dp`` the smallest that its groups of experts fit into."""
    inner, outer = degrees.number("tp") * degrees.number("cp"), degrees.number("pp")
    ep = degrees.number("ep")
    experts = ep * degrees.number("etp", default=degrees.number("tp") if ep == 1 else 1)
    return outer * inner * (degrees.number("dp") if "dp" in degrees else math.lcm(inner, experts) // inner)


def stage_of_layers(
    layers: int, num_stages: int, virtual: int = 1, first: int | None = None, last: int | None = None
) -> list[int]:
    """The stage of each layer.

    Args:
        layers: of the model.
        num_stages: stages.
        virtual: parts of each stage; the stages take turns.
        first, last: layers of the outer stages, where they are given.

    Raises:
        ConfigError: the layers do not divide over the stages, or those of a stage over its parts.
    """
    counts = _layers_of_stages(layers, num_stages, first, last)
    for stage, count in enumerate(counts):
        divided(count, virtual, f"the number of layers of stage {stage}", "vpp")
    return [stage for _ in range(virtual) for stage, count in enumerate(counts) for _ in range(count // virtual)]


def _other_stages(first: int | None, last: int | None) -> str:
    """What to do about layers that do not divide, in the keys that are not given yet where there are such."""
    if first is not None and last is not None:
        return f"choose pp_first={first} and pp_last={last} so that the stages between them get equally many layers"
    if first is None and last is None:
        return "give the first and last stage another number with pp_first and pp_last"
    given, other = (f"pp_first={first}", "pp_last") if last is None else (f"pp_last={last}", "pp_first")
    return f"choose another {given.partition('=')[0]} than {given}, or give {other}, too"


def _layers_of_stages(layers: int, num_stages: int, first: int | None, last: int | None) -> list[int]:
    outer = (first is not None) + (last is not None)
    rest = layers - (first or 0) - (last or 0)
    if rest < 0 or outer > num_stages or (outer == num_stages and rest):
        raise ConfigError(f"the model has {layers} layers, but pp_first={first}, pp_last={last} and pp={num_stages}")
    middle = num_stages - outer
    if middle and (rest % middle or not rest):
        raise ConfigError(
            f"the model has {layers} layers, of which {rest} do not divide over {middle} equal pipeline stages "
            f"(pp={num_stages})",
            hint=_other_stages(first, last),
        )
    each = [rest // middle] * middle if middle else []
    return [*([first] if first is not None else []), *each, *([last] if last is not None else [])]
