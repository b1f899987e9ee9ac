"""The size of a bucket: large enough that the cost of a message is small, small enough that a pipeline fills early."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from wsync.plan.nodes import Nodes
from wsync.plan.rank_classes import Sinks
from wsync.plan.types import DEFAULT_BUCKET_BYTES

_MIN_BYTES = 256 << 10
_MAX_BYTES = 64 << 20
"""On one island, where nothing but the ranks themselves is slow and each message counts."""
_MAX_BYTES_BETWEEN = 8 << 20
"""Between islands: while the NICs and not the ranks are busiest, the time model charges little for messages (a rank
reaches several NICs and waits for them), and every byte of a bucket delays the pipeline and is shared among NICs as a
whole. The cap is where the presets' simulated scores were best; a network that is slow per message may want more."""
_MIN_BUCKETS = 4
"""That each trainer rank has at least for an engine rank, so that most are full."""


def choose_bucket_bytes(asked_bytes: Mapping[int, int], sinks: Sinks, nodes: Nodes) -> int:
    """The best size for a chain through the engine nodes and the ranks of each, as a power of two.

    With ``S / b`` messages of the busiest rank and a pipeline that fills in ``f * b`` seconds,
    ``alpha * S / b + f * b`` is least at ``b = sqrt(alpha * S / f)``.

    Args:
        asked_bytes: that a rank of each class of engine ranks needs.
        sinks: of the plan.
        nodes: of the job.
    """
    alpha_s, nbytes = nodes.cluster.alpha_s, max(asked_bytes.values(), default=0)
    if alpha_s <= 0.0 or not nbytes:
        return DEFAULT_BUCKET_BYTES
    size = math.sqrt(alpha_s * nbytes / _fill_s_per_byte(sinks, nodes))
    size = min(size, nbytes / (_MIN_BUCKETS * len(nodes.sources)))
    return min(max(1 << round(math.log2(max(size, 1.0))), _MIN_BYTES), _largest(nodes))


def _largest(nodes: Nodes) -> int:
    """Between islands more than usual where a NIC would wait for the next message of a rank: on long ways."""
    if len({*nodes.island}) < 2:
        return _MAX_BYTES
    waited = nodes.cluster.alpha_s * max((nic.rate_gbps for nic in nodes.nics), default=0.0) * 1e9
    return min(max(1 << math.ceil(math.log2(max(waited, 1.0))), _MAX_BYTES_BETWEEN), _MAX_BYTES)


def _fill_s_per_byte(sinks: Sinks, nodes: Nodes) -> float:
    """Seconds until the last engine rank has its first byte, for each byte of a bucket."""
    groups = [nodes.groups[node] for node in dict.fromkeys((*nodes.source_node, *nodes.sink_node))]
    seconds = 2.0 / min(g.hbm_gbps or g.host_gbps for g in groups)
    islands = Counter(nodes.island[node] for node in nodes.sink_node)
    nics = [nodes.nics[i].rate_gbps for lane in nodes.sinks for i in lane.reach]
    if len(islands) > 1 and nics:
        seconds += (len(islands) - 1) / min(nics)
    alike = Counter((nodes.island[node], n) for node, n in zip(nodes.sink_node, sinks.numbers, strict=True))
    local_gbps = min(nodes.groups[node].local_gbps for node in nodes.sink_node)
    return (seconds + (max(alike.values()) - 1) / local_gbps) / 1e9
