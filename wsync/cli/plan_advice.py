"""What would make a sync faster, from the cut that binds and the parts that are busy, with the seconds of each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from wsync.cli.plan_host import host_advice
from wsync.plan.nodes import Nodes
from wsync.plan.plans import Plan
from wsync.plan.timing import Times
from wsync.plan.types import Bound, PlanOptions
from wsync.spec.manifest import SinkManifest

GOOD_SCORE = 1.05
"""Up to here what is left to gain is not worth a sentence."""
_WORTH = 0.03
"""Share of the time from which a part of it is worth a sentence."""


@dataclass(frozen=True)
class Facts:
    """What advice is derived from.

    Attributes:
        plan, times, nodes, sink, options: of the plan.
        without_relays_s: the bound if engine ranks passed nothing on.
        fp8_bounds: the cuts if all matrices that travel in 16 bits travelled in ``fp8_block128``.
        device_bound_s, device_s: the bound, and the time of the plan, if ranks kept nothing in host memory.
    """

    plan: Plan
    times: Times
    nodes: Nodes
    sink: SinkManifest
    options: PlanOptions
    without_relays_s: float
    fp8_bounds: tuple[Bound, ...]
    device_bound_s: float
    device_s: float


def advise(facts: Facts) -> Iterator[str]:
    """Sentences, the most useful first."""
    plan = facts.plan
    if not plan.bounds:
        yield "nothing crosses the edge of a rank: there is nothing to make faster"
        return
    yield from _cut_advice(facts)
    yield from host_advice(plan, facts.nodes, facts.device_bound_s, facts.device_s)
    yield from _wire_advice(facts)
    yield from _plan_advice(facts)
    if facts.options.relay and facts.without_relays_s > plan.lower_bound_s * (1 + _WORTH):
        yield (
            f"relays between engine nodes are worth {facts.without_relays_s:.3g} s to {plan.lower_bound_s:.3g} s: keep "
            "them on"
        )


def kind_of(cut: str) -> str:
    """The kind of a cut, from its name: ``"ingress"``, ``"egress"``, ``"link"`` and so on."""
    return cut.split(" ", 1)[0]


def _cut_advice(facts: Facts) -> Iterator[str]:
    cut, seconds = facts.plan.binding_cut, facts.plan.lower_bound_s
    kind = kind_of(cut)
    if " of nics " in cut:
        yield _some_nics(facts)
    elif kind == "egress":
        yield from _egress(facts)
    elif kind == "ingress":
        yield from _ingress(facts)
    elif kind == "link":
        yield (
            f"{cut} binds ({seconds:.3g} s): every byte crosses it once already, so only a faster link or fewer bytes "
            "help (a narrower recipe, deltas)"
        )
    elif kind == "traffic":
        yield (
            f"the NICs of all nodes that may send bind together ({seconds:.3g} s): more nodes with a copy, or replicas "
            "that share nodes, lower it"
        )
    elif kind == "install":
        yield f"{cut} binds ({seconds:.3g} s): engine replicas over more ranks give each less to take"
    elif kind == "staged":
        yield f"{cut} binds ({seconds:.3g} s), not the network: what is kept in host memory has to cross it"
    elif kind in ("host", "quantise"):
        yield f"{cut} binds ({seconds:.3g} s), not the network: spread those bytes over more nodes or ranks"
    rest = next((b for b in facts.plan.bounds if kind_of(b.name) != kind), None)
    if rest is not None:
        yield f"the next limit of another kind is {rest.name} at {rest.seconds:.3g} s"


def _some_nics(facts: Facts) -> str:
    """Some NICs of a node bind, not all of them."""
    cut, seconds = facts.plan.binding_cut, facts.plan.lower_bound_s
    text = f"{cut} binds ({seconds:.3g} s): the ranks that have to use it reach no other NIC of their node"
    found = re.fullmatch(r"(\w+) of nics [0-9, ]+ of node (.*)", cut)
    whole = next((b for b in facts.plan.bounds if found and b.name == f"{found[1]} of node {found[2]}"), None)
    if whole is None:
        return text
    return f"{text}. NICs of one rate next to every GPU, or NVLink between the GPUs: about {whole.seconds:.3g} s"


def _egress(facts: Facts) -> Iterator[str]:
    cut, seconds = facts.plan.binding_cut, facts.plan.lower_bound_s
    if not facts.options.relay:
        yield f"{cut} binds ({seconds:.3g} s) because engine nodes may not relay: allow it (without --no-relay)"
        return
    yield (
        f"{cut} binds ({seconds:.3g} s): each byte leaves it once already. Copies of these weights on more trainer "
        "nodes (a smaller shard group with more replicas), or more or faster NICs there, lower it"
    )


def _ingress(facts: Facts) -> Iterator[str]:
    plan, seconds = facts.plan, facts.plan.lower_bound_s
    spans = _spans(facts)
    text = f"{plan.binding_cut} binds ({seconds:.3g} s): it takes each byte that it needs once already"
    if spans:
        num, most = min(spans), max(spans)
        each = f"{num} node" + ("s" if num > 1 else "") if num == most else f"{num} to {most} nodes"
        yield f"{text}. A replica spans {each}; over twice as many it would be about {seconds / 2:.3g} s"
    else:
        yield text


def _spans(facts: Facts) -> list[int]:
    """Over how many islands each replica goes."""
    nodes = facts.nodes
    islands: dict[str, set[int]] = {}
    for sink_idx, rank in enumerate(facts.sink.ranks):
        islands.setdefault(rank.replica, set()).add(nodes.island[nodes.sink_node[sink_idx]])
    return [len(found) for found in islands.values()]


def _wire_advice(facts: Facts) -> Iterator[str]:
    bound = facts.plan.lower_bound_s
    if facts.fp8_bounds and facts.fp8_bounds[0].seconds < bound * (1 - _WORTH):
        fp8 = facts.fp8_bounds[0]
        yield f"all matrices in fp8_block128, none in 16 bits: about {fp8.seconds:.3g} s in place of {bound:.3g} s"
    if facts.options.density is None:
        yield "everything travels whole; --density SHARE shows what deltas save where few elements change in a step"


def _plan_advice(facts: Facts) -> Iterator[str]:
    """Where the plan itself is slower than the bound."""
    plan, times = facts.plan, facts.times
    if plan.score <= GOOD_SCORE:
        return
    if times.loads and times.busiest_s > plan.lower_bound_s * (1 + _WORTH):
        busiest, mean = times.loads[0], _mean_of_nics(times)
        uneven = f", the NICs of that node {mean:.3g} s on average" if mean else ""
        yield (
            f"{busiest.name} is busy for {busiest.seconds:.3g} s{uneven}, {times.busiest_s / plan.lower_bound_s:.2f} "
            "times the bound: smaller buckets (--bucket-bytes) spread the bytes more evenly"
        )
    if times.fill_s > _WORTH * plan.time_s:
        hops = max(len(tree.hops) for tree in plan.trees)
        yield (
            f"pipelines fill for {times.fill_s:.3g} s (trees of up to {hops} hops, buckets of {plan.bucket_bytes} "
            "bytes): smaller buckets fill them sooner"
        )
    if times.amax_s > _WORTH * plan.time_s:
        yield (
            f"the exchange of {plan.amax_elements} amaxes takes {times.amax_s:.3g} s: shards that end at multiples of "
            "the scale blocks' rows need none"
        )


def _mean_of_nics(times: Times) -> float:
    """Seconds that the NICs of the busiest one's node take on average, in its direction; 0.0 if it is no NIC."""
    kind, _, rest = times.loads[0].name.partition(" ")
    _, _, node = rest.partition(" ")
    if kind != "nic":
        return 0.0
    same = [x.seconds for x in times.loads if re.fullmatch(rf"nic \d+ {re.escape(node)}", x.name)]
    return sum(same) / len(same)
