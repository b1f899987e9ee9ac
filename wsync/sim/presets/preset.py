"""What a preset is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from wsync.plan.types import PlanOptions
from wsync.sim.options import SimOptions
from wsync.sim.presets.machines import H100_GB
from wsync.spec.cluster import Cluster, NodeGroup
from wsync.spec.manifest import SinkManifest, SourceManifest


@dataclass(frozen=True)
class Published:
    """What somebody has measured.

    Attributes:
        seconds: of a whole update; the better one where a range is given.
        source: who says so, and where.
    """

    seconds: float
    source: str


@dataclass(frozen=True)
class Preset:
    """One scenario.

    Attributes:
        name: for the command line.
        title: in one line.
        model: name of a built-in model.
        trainer_layout, engine_layout: as `wsync.describe` reads them.
        recipe: on the wire.
        cluster: the machines.
        trainers, engines: names of the groups whose GPUs run them, every one of them.
        assumptions: what is not published, or was left out, and what is taken for it.
        published: what a peer needs for it, or None.
        bound_s: the lower bound that its sizes give by hand, or None where sizes are not published.
        options: of the plan.
        sim: of the simulation.
    """

    name: str
    title: str
    model: str
    trainer_layout: str
    engine_layout: str
    recipe: str
    cluster: Cluster
    trainers: str
    engines: str
    assumptions: tuple[str, ...]
    published: Published | None = None
    bound_s: float | None = None
    options: PlanOptions = field(default_factory=PlanOptions)
    sim: SimOptions = field(default_factory=lambda: SimOptions(install="in_place", gpu_memory_gb=H100_GB))

    def build(self) -> tuple[SourceManifest, SinkManifest, Cluster, PlanOptions]:
        """Both manifests, the cluster, and how to plan."""
        from wsync.describe import describe_sink, describe_source, load_model, positions

        model = load_model(self.model)
        trainers, engines = self._hosts(self.trainers), self._hosts(self.engines)
        # Ranks on one group share its GPUs, one of each side on every GPU.
        gpus = (positions(trainers), positions(engines)) if self.trainers == self.engines else (None, None)
        source = describe_source(model, self.trainer_layout, trainers, gpus=gpus[0])
        sink = describe_sink(model, self.engine_layout, engines, self.recipe, gpus[1])
        return self.sim.source_of(source), sink, self.cluster, self.options

    def _hosts(self, name: str) -> list[str]:
        """The host of each rank: one rank for each GPU of the group, or one for a node without GPUs."""
        return ranks_of(next(g for g in self.cluster.groups if g.name == name))


def ranks_of(group: NodeGroup) -> list[str]:
    """The host of each rank of a group that has one rank per GPU, or per node without GPUs."""
    return [host for host in group.node_names for _ in range(max(group.num_gpus, 1))]
