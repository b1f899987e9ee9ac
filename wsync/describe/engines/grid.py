"""Where a rank of an engine stands: its part of the heads, of the experts and of the layers."""

from __future__ import annotations

from typing import NamedTuple

from wsync.describe.layout import Degrees, check_ranks, divided
from wsync.errors import ConfigError

KEYS = {
    "tp": "tensor parallel ranks",
    "dp": "ranks of data parallel attention within a replica; what ep needs beyond tp by default",
    "pp": "pipeline stages",
    "ep": "expert parallel ranks, of those of tp and dp; 1: experts are cut like any other matrix",
    "placement": "linear, or round_robin: expert e on rank e % ep",
    "replicas": "independent copies of the engine",
}

LINEAR, ROUND_ROBIN = "linear", "round_robin"


class Place(NamedTuple):
    """One rank of a replica.

    Attributes:
        tp, tp_size: its tensor parallel group.
        moe_tp, moe_tp_size: ranks that share each expert.
        ep, ep_size: expert parallel ranks.
        pp, pp_size: pipeline stages.
    """

    tp: int
    tp_size: int
    moe_tp: int
    moe_tp_size: int
    ep: int
    ep_size: int
    pp: int
    pp_size: int


class Grid:
    """A replica's ranks: data parallel outermost, then stages, then tensor parallel.

    Source: vLLM ``initialize_model_parallel`` (order of ranks), ``FusedMoEParallelConfig.make`` (experts over tensor
    and data parallel ranks together).

    Raises:
        ConfigError: degrees that do not fit each other.
    """

    def __init__(self, layout: str) -> None:
        degrees = Degrees(layout, KEYS)
        self.replicas, self.tp, self.pp = degrees.number("replicas"), degrees.number("tp"), degrees.number("pp")
        self.ep = degrees.number("ep")
        self.dp = degrees.number(
            "dp", default=self.ep // self.tp if self.ep % self.tp == 0 and self.ep > self.tp else 1
        )
        self.placement = degrees.choice("placement", (LINEAR, ROUND_ROBIN))
        self.size = self.tp * self.dp * self.pp
        self._degrees = degrees
        check_ranks(layout, self.num_ranks)
        self.moe_tp = divided(self.tp * self.dp, self.ep, "tp * dp", "ep")
        if "placement" in degrees and self.ep == 1:
            raise ConfigError(f"layout {layout!r} has a placement of experts, but ep=1")

    def check_world(self, world: int) -> None:
        """Refuse another number of ranks than all replicas have.

        Raises:
            ConfigError: with both values.
        """
        self._degrees.check_world(world, self.num_ranks, "replicas * tp * dp * pp")

    @property
    def num_ranks(self) -> int:
        """Of all replicas."""
        return self.size * self.replicas

    def place(self, rank: int) -> Place:
        """Where that rank of a replica stands."""
        tp, pp, dp = rank % self.tp, rank // self.tp % self.pp, rank // self.tp // self.pp
        inner = dp * self.tp + tp
        return Place(tp, self.tp, inner % self.moe_tp, self.moe_tp, inner // self.moe_tp, self.ep, pp, self.pp)


def layers_of_stage(num_layers: int, stage: int, num_stages: int) -> range:
    """The layers of a stage; those that are left over go to the stages before the last, from behind.

    Raises:
        ConfigError: there are more stages than layers.

    Source: vLLM ``get_pp_indices``.
    """
    if num_layers < num_stages:
        raise ConfigError(f"the model has {num_layers} layers, which are too few for pp={num_stages}")
    counts = [num_layers // num_stages] * num_stages
    for i in range(num_layers % num_stages):
        counts[-2 - i] += 1
    first = sum(counts[:stage])
    return range(first, first + counts[stage])


def experts_of_rank(num_experts: int, ep: int, ep_size: int, placement: str) -> list[int]:
    """The experts of a rank in the order of their slots.

    Source: vLLM ``determine_expert_map``.
    """
    if placement == ROUND_ROBIN:
        return list(range(ep, num_experts, ep_size))
    each, more = divmod(num_experts, ep_size)
    first = ep * each + min(ep, more)
    return list(range(first, first + each + (ep < more)))
