"""The size of a bucket: large enough that the cost of a message is small, small enough that a pipeline fills early."""

from __future__ import annotations

import math

from wsync.plan.classes import ClassKey
from wsync.plan.demand import Demand
from wsync.plan.rank_classes import Sinks
from wsync.plan.timing import best_bucket_bytes
from wsync.plan.types import DEFAULT_BUCKET_BYTES
from wsync.spec.box import Box
from wsync.spec.cluster import Cluster
from wsync.spec.dtypes import itemsize

_MIN_BYTES = 256 << 10
_MAX_BYTES = 32 << 20


def choose_bucket_bytes(
    members: dict[ClassKey, list[Demand]], boxes: list[Box], sinks: Sinks, cluster: Cluster | None
) -> int:
    """The best size for a chain through the engine nodes, as a power of two; the default without a cluster.

    Args:
        members: of each class of tensors.
        boxes: by number.
        sinks: of the plan.
        cluster: the machines.
    """
    if cluster is None or cluster.alpha_s <= 0.0:
        return DEFAULT_BUCKET_BYTES
    needed: dict[int, int] = {}
    for (*_, claims), demands in members.items():
        parts = demands[0].encoding.parts
        for part, number, box_idx in claims:
            nbytes = boxes[box_idx].num_elements * itemsize(parts[part].dtype) * len(demands)
            needed[number] = needed.get(number, 0) + nbytes
    hosts = {rank.info.host for rank in sinks.manifest.ranks}
    rate_gbps = min((nic.rate_gbps for g in cluster.groups for nic in g.nics), default=0.0)
    if not needed or len(hosts) < 2 or rate_gbps <= 0.0:
        return DEFAULT_BUCKET_BYTES
    size = best_bucket_bytes(max(needed.values()), len(hosts), rate_gbps, cluster.alpha_s)
    return min(max(1 << round(math.log2(size)), _MIN_BYTES), _MAX_BYTES)
