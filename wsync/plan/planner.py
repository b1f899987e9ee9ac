"""make_plan: two manifests and a cluster in, a plan out. Pure: no pointer, no torch, no device."""

from __future__ import annotations

from wsync.errors import ConfigError
from wsync.plan.blocks import TensorClass, find_classes
from wsync.plan.bounds import find_bounds, plan_seconds
from wsync.plan.buckets import build_buckets
from wsync.plan.demand import Demand, check_source, collect_demands, resolve_aliases
from wsync.plan.grids import all_dims
from wsync.plan.nodes import find_nodes
from wsync.plan.routing import Trees, choose_senders, queue_units
from wsync.plan.types import ALIGNMENT, AmaxRegion, Plan, PlanOptions, WirePart
from wsync.spec.cluster import Cluster, check_cluster
from wsync.spec.manifest import SinkManifest, SourceManifest
from wsync.spec.serde import FORMAT_VERSION

MAX_BUCKET_BYTES = 1 << 40


def make_plan(
    source: SourceManifest,
    sink: SinkManifest,
    cluster: Cluster | None = None,
    options: PlanOptions | None = None,
) -> Plan:
    """Plan one sync: what every rank packs, sends, relays and installs.

    Equal arguments give equal bytes (`plan_digest`); everything but ``bounds`` and ``time_s`` is integer arithmetic.

    Args:
        source: what the trainer ranks hold.
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
    options = options or PlanOptions()
    _check_options(options)
    if cluster is not None:
        check_cluster(cluster)
    check_source(source)
    demands = collect_demands(source, sink)
    nodes = find_nodes(source, sink, cluster)
    classes = find_classes(source, demands, nodes, options.bucket_bytes)
    order = {id(d): i for i, d in enumerate(demands)}
    class_of = _class_of(classes, order)
    parts, part_of = _number_parts(demands, class_of)
    choice = choose_senders(classes, order, nodes)
    groups = queue_units(demands, class_of, choice, nodes)
    buckets = build_buckets(groups, part_of, Trees(nodes), options.bucket_bytes)
    regions, amax_elements = _lay_out_amax(demands, class_of, part_of, len(source.ranks))
    return Plan(
        format_version=FORMAT_VERSION,
        num_sources=len(source.ranks),
        num_sinks=len(sink.ranks),
        bucket_bytes=options.bucket_bytes,
        parts=parts,
        buckets=buckets,
        amax_regions=regions,
        amax_elements=amax_elements,
        bounds=find_bounds(classes, nodes, sink),
        time_s=plan_seconds(buckets, nodes),
        aliases=_aliases(source),
    )


def _aliases(source: SourceManifest) -> dict[str, str]:
    names = [t.name for t in source.tensors]
    return {name: names[idx] for name, idx in resolve_aliases(source.tensors).items() if names[idx] != name}


def _check_options(options: PlanOptions) -> None:
    size = options.bucket_bytes
    if size % ALIGNMENT or not 0 < size <= MAX_BUCKET_BYTES:
        raise ConfigError(
            f"bucket_bytes is {size}, allowed are multiples of {ALIGNMENT} from {ALIGNMENT} to {MAX_BUCKET_BYTES}"
        )


def _class_of(classes: list[TensorClass], order: dict[int, int]) -> list[TensorClass]:
    """The class of each demand."""
    found = {order[id(member)]: cls for cls in classes for member in cls.members}
    return [found[i] for i in range(len(order))]


def _number_parts(
    demands: list[Demand], class_of: list[TensorClass]
) -> tuple[tuple[WirePart, ...], list[tuple[int, ...]]]:
    """The plan's parts, and for each demand the indices of its own.

    A weight that only lends its amaxes is listed too.
    """
    parts: list[WirePart] = []
    part_of: list[tuple[int, ...]] = []
    for demand in demands:
        part_of.append(tuple(range(len(parts), len(parts) + len(demand.parts))))
        num_dims = len(demand.parts[0].shape)
        for p in demand.parts:
            shape = all_dims(p.shape, num_dims, 1)
            parts.append(WirePart(demand.tensor_idx, demand.recipe, p.role, p.name, p.dtype, shape, demand.group))
    return tuple(parts), part_of


def _lay_out_amax(
    demands: list[Demand], class_of: list[TensorClass], part_of: list[tuple[int, ...]], num_sources: int
) -> tuple[tuple[tuple[AmaxRegion, ...], ...], int]:
    """Every rank's regions, and the length of the vector that holds the grids of all tensors with exchanged amaxes."""
    regions: list[list[AmaxRegion]] = [[] for _ in range(num_sources)]
    of_group: dict[tuple[str, tuple[str, ...]], int] = {}
    elements = 0
    for demand, cls, (weight_idx, *_) in zip(demands, class_of, part_of, strict=True):
        if not cls.amax:
            continue  # an empty tensor has no cell, and must not give its place to the next one
        first = elements
        if demand.group:
            first = of_group.setdefault((demand.recipe, demand.group), elements)
        for rank, shard_idx, box in cls.amax:
            regions[rank].append(AmaxRegion(weight_idx, shard_idx, box, first))
        if first == elements:
            elements += cls.grid_elements
    return tuple(tuple(r) for r in regions), elements
