"""make_plan: two manifests and a cluster in, a plan out. Pure: no pointer, no torch, no device."""

from __future__ import annotations

from wsync.plan.plans import Plan
from wsync.plan.replan import Planner
from wsync.plan.types import PlanOptions
from wsync.spec.cluster import Cluster
from wsync.spec.manifest import SinkManifest, SourceManifest


def make_plan(
    source: SourceManifest,
    sink: SinkManifest,
    cluster: Cluster | None = None,
    options: PlanOptions | None = None,
) -> Plan:
    """Plan one sync: what every rank packs, sends, relays and installs.

    Equal arguments give equal bytes (`plan_digest`); everything but ``bounds`` and ``time_s`` is integer arithmetic.

    Args:
        source: what the trainer ranks hold. Ranks whose `RankInfo` names no GPU share those of a node with ranks of
            the other side only where it has too few for both.
        sink: what the engine ranks need.
        cluster: the machines; None for `default_cluster` of the hosts that the ranks name.
        options: None for the defaults.

    Raises:
        UnknownTensorError: a sink needs a tensor that the source does not have.
        MissingTensorError: elements that are needed are on no trainer rank; names the first box.
        ShapeMismatchError, DtypeMismatchError: the two sides disagree about a tensor.
        RecipeError: a recipe is unknown or cannot encode a tensor.
        ManifestError: a manifest contradicts itself.
        ConfigError: the options or the cluster cannot be.
    """
    return Planner(source, cluster, options).plan(sink)
