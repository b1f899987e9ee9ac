"""Clusters and demand for the tests of routing, cuts and timing."""

import random
from collections import Counter
from itertools import combinations

from wsync.plan.cuts import find_bounds
from wsync.plan.flows import DemandGroup, Flow, Lot
from wsync.plan.nodes import nodes_of
from wsync.plan.route import route
from wsync.plan.timing import plan_times
from wsync.plan.types import SOURCE, PlanOptions
from wsync.spec import Cluster, Link, Nic, NicPath, NodeGroup

MIB = 1 << 20


def gpu_group(name, count, num_gpus=8, nic_gbps=50.0, nvlink_domain=None, num_nics=None, **changes):
    """Nodes like those of an H100: a NIC per GPU, NVLink inside."""
    num_nics = num_gpus if num_nics is None else num_nics
    domain = num_gpus if nvlink_domain is None else nvlink_domain
    nics = tuple(Nic(nic_gbps, i, (NicPath(i * num_gpus // num_nics, "PIX"),)) for i in range(num_nics))
    fields = {
        "host_gbps": 400.0,
        "num_gpus": num_gpus,
        "hbm_gbps": 3350.0,
        "pcie_gbps": 64.0,
        "nvlink_gbps": 450.0 if domain else None,
        "nvlink_domain": domain,
        "nics": nics,
    }
    return NodeGroup(name, count, **{**fields, **changes})


def cpu_group(name, count, nic_gbps=50.0):
    """Nodes of one rank, whose only limit is their NIC."""
    return NodeGroup(name, count, 1e6, nics=(Nic(nic_gbps),))


def hosts(group, ranks_per_node=None):
    per_node = ranks_per_node or group.num_gpus or 1
    return [name for name in group.node_names for _ in range(per_node)]


def group(holders, sinks, nbytes, stage=0):
    return DemandGroup(tuple(holders), tuple(sinks), stage, (Lot(0, 0, nbytes, 1),), nbytes)


def flows_of(routing):
    """The flows of a routing, as if pieces had no padding."""
    total = Counter()
    for routes in routing.routes:
        for found in routes:
            for share in found.shares:
                total[(share.src_rank, share.tree_idx)] += share.nbytes
    return [Flow(i, rank, 0, tree, (), n) for i, ((rank, tree), n) in enumerate(sorted(total.items()))]


def check_routing(groups, routing, nodes, relay=True):
    """Every sink of every group gets all bytes once, along trees in which senders have received before."""
    assert len(routing.routes) == len(groups)
    assert len(set(routing.trees)) == len(routing.trees)
    used = set()
    for demand, routes in zip(groups, routing.routes, strict=True):
        reached = [s for found in routes for s in found.sinks]
        assert sorted(reached) == list(demand.sinks)
        for found in routes:
            assert sum(s.nbytes for s in found.shares) == demand.nbytes
            assert len({(s.src_rank, s.tree_idx) for s in found.shares}) == len(found.shares)
            for share in found.shares:
                assert share.nbytes > 0
                assert share.src_rank in demand.holders
                assert routing.trees[share.tree_idx].sinks == found.sinks
                used.add(share.tree_idx)
                check_ends(share, routing.trees[share.tree_idx], nodes, relay)
    assert used == set(range(len(routing.trees)))
    for tree in routing.trees:
        check_tree(tree)


def check_tree(tree):
    have = {SOURCE}
    assert len(tree.rails) == len(tree.hops)
    for src, dst in tree.hops:
        assert src in have
        assert dst not in have
        have.add(dst)
    assert sorted(have - {SOURCE}) == list(tree.sinks)


def check_ends(share, tree, nodes, relay):
    """Rails are those of hops between islands, and both ends reach a NIC there."""
    for (src, dst), rail in zip(tree.hops, tree.rails, strict=True):
        here = nodes.sources[share.src_rank] if src == SOURCE else nodes.sinks[src]
        there = nodes.sinks[dst]
        same = nodes.island[here.node] == nodes.island[there.node]
        assert same == (rail < 0)
        if not same:
            assert here.port >= 0
            assert there.port >= 0
            assert relay or src == SOURCE


def plan(groups, source_hosts, sink_hosts, cluster, bucket_bytes=4 * MIB, relay=True, memory=(None, None)):
    """(nodes, routing, times, bounds) of a demand, whose weights are read as wide as they travel."""
    nodes = nodes_of(source_hosts, sink_hosts, cluster, source_memory=memory[0], sink_memory=memory[1])
    routing = route(groups, nodes, bucket_bytes, PlanOptions(bucket_bytes, relay=relay))
    flows = flows_of(routing)
    read = [sum(f.nbytes for f in flows if f.src_rank == rank) for rank in range(len(source_hosts))]
    times = plan_times(routing.trees, flows, nodes, bucket_bytes, host_bytes=read)
    return nodes, routing, times, find_bounds(groups, nodes, relay=relay, host_bytes=[g.nbytes for g in groups])


def replicated(num_sources, num_replicas, ranks_per_replica, nbytes):
    """FSDP over all trainer ranks, tensor parallel replicas: every (holder, rank of a replica) has a group."""
    return [
        group(
            (h,),
            [r * ranks_per_replica + i for r in range(num_replicas)],
            nbytes // (num_sources * ranks_per_replica),
        )
        for h in range(num_sources)
        for i in range(ranks_per_replica)
    ]


def shuffled_groups(seed, num_groups, num_sources, num_sinks, nbytes, replicas=1):
    rng = random.Random(seed)
    out = {}
    for _ in range(num_groups):
        holders = tuple(sorted(rng.sample(range(num_sources), min(num_sources, rng.randint(1, replicas)))))
        sinks = tuple(sorted(rng.sample(range(num_sinks), rng.randint(1, num_sinks))))
        out.setdefault((holders, sinks), group(holders, sinks, rng.randint(1, nbytes)))
    return list(out.values())


def cluster_of(*groups, links=(), alpha_s=0.0):
    return Cluster(groups, tuple(links), alpha_s)


def random_case(seed):
    """(groups, hosts of trainer ranks, hosts of sinks, cluster) of a few nodes that only NICs and links limit."""
    rng = random.Random(seed)
    wide = {"nvlink_gbps": 1e5, "pcie_gbps": 1e5}
    kinds = [
        *(lambda name, count, rate=rate: cpu_group(name, count, rate) for rate in (12.5, 50.0, 25.0)),
        lambda name, count: gpu_group(name, count, 4, 25.0, **wide),
        lambda name, count: gpu_group(name, count, 4, 50.0, num_nics=1, **wide),
    ]
    parts = [rng.choice(kinds)(f"g{i}", rng.randint(1, 3)) for i in range(rng.randint(1, 3))]
    links = []
    if len(parts) > 1 and rng.random() < 0.4:
        links.append(Link("wan", (parts[0].name,), tuple(p.name for p in parts[1:]), rng.choice([5.0, 20.0, 60.0])))
    places = [name for p in parts for name in p.node_names]
    ranks = {name: p.num_gpus or 1 for p in parts for name in p.node_names}
    num_sources, num_sinks = rng.randint(1, 4), rng.randint(1, 6)
    trainers = engines = places
    if rng.random() < 0.5 and len(places) > 1:
        cut = rng.randint(1, len(places) - 1)
        trainers, engines = places[:cut], places[cut:]
    sources = [h for h in rng.sample(trainers, min(num_sources, len(trainers))) for _ in range(ranks[h])]
    sinks = [h for h in rng.sample(engines, min(num_sinks, len(engines))) for _ in range(ranks[h])]
    found = {}
    for _ in range(rng.randint(1, 5)):
        held = tuple(sorted(rng.sample(range(len(sources)), min(len(sources), rng.choice([1, 1, 2, 3])))))
        need = tuple(sorted(rng.sample(range(len(sinks)), rng.randint(1, min(6, len(sinks))))))
        found.setdefault((held, need), group(held, need, rng.choice([1, 2, 3, 7]) * 1024 * MIB))
    return list(found.values()), sources, sinks, cluster_of(*parts, links=links)


def moe_groups(holders_of, replicas, ranks_per_replica, dense_bytes, expert_bytes, replicated_bytes=0, tp=8):
    """A mixture of experts in replicas of ``tp`` tensor parallel ranks per node, experts over all of a replica's ranks.

    ``holders_of(part, num_parts)`` gives (holders, share of the part's bytes) of part ``part`` of a tensor that engine
    ranks cut into ``num_parts``.
    """
    total = Counter()
    first = [r * ranks_per_replica for r in range(replicas)]
    for part in range(tp):
        sinks = tuple(f + i for f in first for i in range(part, ranks_per_replica, tp))
        for held, share in holders_of(part, tp):
            total[(held, sinks)] += round(dense_bytes / tp * share)
    for part in range(ranks_per_replica):
        sinks = tuple(f + part for f in first)
        for held, share in holders_of(part, ranks_per_replica):
            total[(held, sinks)] += round(expert_bytes / ranks_per_replica * share)
    everyone = tuple(range(replicas * ranks_per_replica))
    for held, share in holders_of(0, 1):
        total[(held, everyone)] += round(replicated_bytes * share)
    return [group(held, need, n) for (held, need), n in sorted(total.items()) if n]


def fsdp(num_ranks):
    """Rows over all ranks; an expert's tensor and a row parallel one meet all of them."""
    return lambda part, num_parts: [((h,), 1 / num_ranks) for h in range(num_ranks)]


def megatron(num_ranks, pp, ep):
    """Pipeline stages of equal size; inside one every ``ep``-th rank holds the same experts."""
    per_stage = num_ranks // pp

    def holders_of(part, num_parts):
        found = []
        for stage in range(pp):
            ranks = range(stage * per_stage, (stage + 1) * per_stage)
            # What an engine rank needs is spread over as many expert parallel ranks as its own part is wide.
            mine = sorted({part * ep // num_parts, ((part + 1) * ep - 1) // num_parts})
            for e in mine:
                found.append((tuple(r for r in ranks if r % ep == e), 1 / pp / len(mine)))
        return found

    return holders_of


def random_gpu_case(seed):
    """(groups, hosts of trainer ranks, hosts of sinks, cluster) of GPUs of which several ways can be the narrow one."""
    rng = random.Random(seed)
    rates = [(50.0, 60.0, 1.0), (300.0, 64.0, 25.0), (60.0, 20.0, 50.0), (450.0, 64.0, 50.0)]
    parts = []
    for name in ("a", "b")[: rng.randint(1, 2)]:
        nvlink, pcie, nic = rng.choice(rates)
        size = rng.choice([0, 2, 2, 3, 4])
        fields = {"nvlink_gbps": nvlink if size else None, "nvlink_domain": size, "pcie_gbps": pcie, "hbm_gbps": 1e6}
        parts.append(gpu_group(name, rng.randint(1, 2), 4, nic, **fields))
    places = [host for p in parts for host in p.node_names]
    # Ranks fill a node, or are two on each of its GPUs.
    sources = [h for h in rng.sample(places, rng.randint(1, len(places))) for _ in range(rng.choice([4, 8]))]
    sinks = [h for h in rng.sample(places, rng.randint(1, len(places))) for _ in range(rng.choice([4, 8]))]
    found = {}
    for _ in range(rng.randint(1, 5)):
        held = tuple(sorted(rng.sample(range(len(sources)), rng.choice([1, 1, 1, 2]))))
        need = tuple(sorted(rng.sample(range(len(sinks)), rng.choice([1, 1, 2, 4]))))
        found.setdefault((held, need), group(held, need, rng.choice([20, 50, 60, 110]) * 10**9))
    return list(found.values()), sources, sinks, cluster_of(*parts)


def random_zones_case(seed, kind):
    """(groups, hosts of trainer ranks, hosts of sinks, cluster) of two to five zones.

    ``kind`` is ``"leaf"`` (each has an uplink), ``"site"`` (so it has, and leaves are at two ends of a thin link) or
    ``"pair"`` (every two of three zones have a link of their own).
    """
    rng = random.Random(f"{kind} {seed}")
    count = 3 if kind == "pair" else rng.randint(2, 5)
    parts = [cpu_group(f"g{i}", rng.randint(1, 4), rng.choice([12.5, 50.0, 25.0])) for i in range(count)]
    names = [p.name for p in parts]
    if kind == "pair":
        links = [Link(f"{a}-{b}", (a,), (b,), rng.choice([1.0, 5.0, 40.0])) for a, b in combinations(names, 2)]
    else:
        links = [
            Link(f"up-{n}", (n,), tuple(x for x in names if x != n), rng.choice([10.0, 25.0, 100.0])) for n in names
        ]
    if kind == "site":
        end = rng.randint(1, count - 1)
        links.append(Link("wan", tuple(names[:end]), tuple(names[end:]), rng.choice([2.0, 5.0, 12.5])))
    places = [host for p in parts for host in p.node_names]
    trainers, engines = places, places
    if rng.random() < 0.7:
        rng.shuffle(places)
        cut = rng.randint(1, len(places) - 1)
        trainers, engines = places[:cut], places[cut:]
    sources = sorted(rng.sample(trainers, rng.randint(1, min(5, len(trainers)))))
    sinks = sorted(rng.sample(engines, rng.randint(1, min(7, len(engines)))))
    found = {}
    for _ in range(rng.randint(1, 8)):
        held = tuple(sorted(rng.sample(range(len(sources)), min(len(sources), rng.choice([1, 1, 2, 3])))))
        need = tuple(sorted(rng.sample(range(len(sinks)), rng.randint(1, len(sinks)))))
        found.setdefault((held, need), group(held, need, rng.choice([1, 2, 3, 7]) * 1024 * MIB))
    return list(found.values()), sources, sinks, cluster_of(*parts, links=links)
