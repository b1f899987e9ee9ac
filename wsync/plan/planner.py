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

    Equal arguments give equal bytes (`plan_digest`) with one version of wsync, whatever the machine and whatever was
    planned before. Choices compare integers or sums of rates in one fixed order; ``bounds`` and the seconds are floats
    from basic arithmetic and correctly rounded sums, but for sizes of buckets and of deltas, which take the C library's
    roots and logarithms and are rounded far more coarsely than these differ. A `Planner` gives equal plans for equal
    histories: a plan that was patched is another one than `make_plan` makes.

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
