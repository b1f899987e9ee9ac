"""Runs of plans on plain arrays, and the manifests and clusters that they are run for."""

import random
from collections.abc import Sequence

import msgspec
import numpy as np
from standin_recipes import as_bytes, at, codes_of, expanded, group_amaxes, raise_amax, scales_of, whole_parts

from wsync.plan import Plan, expand_plan, make_plan
from wsync.plan.flows import LOCAL
from wsync.plan.grids import grids_of, group_of, to_packed, to_weights
from wsync.plan.types import MODE_FUSED, SOURCE
from wsync.spec.box import Box
from wsync.spec.cluster import Cluster, Link, Nic, NodeGroup
from wsync.spec.dtypes import itemsize
from wsync.spec.manifest import RankInfo, SinkManifest, SinkRankManifest
from wsync.spec.recipes import get_recipe, recipe_parts
from wsync.testing.generators import Scenario, random_scenario


def plain(part, values: np.ndarray) -> np.ndarray:
    """Wire bytes of a box without scales, of shape ``[*box.shape, elem_bytes]``."""
    wide = values.astype(np.float64 if itemsize(part.dtype) == 8 else np.float32)
    raw = np.ascontiguousarray(wide).reshape(-1).view(np.uint8).reshape(*values.shape, -1)
    return raw[..., -itemsize(part.dtype) :]


def expected_parts(tensor, values, recipe: str, group_amax) -> dict[str, np.ndarray]:
    """Every part of a tensor, quantised in one go."""
    if get_recipe(recipe).quantised:
        return whole_parts(tensor, values, recipe, group_amax)
    (part,) = recipe_parts(tensor.name, tensor.shape, tensor.dtype, recipe)
    return {"weight": plain(part, values)}


class Run:
    """Executes a plan and counts what moves."""

    def __init__(self, scenario: Scenario, plan: Plan, seed: int, cluster: Cluster | None = None) -> None:
        self.scenario, self.plan = scenario, expand_plan(plan)
        self.relayed = 0
        self.amax_elements = plan.amax_elements
        rng = np.random.default_rng(seed)
        self.values = [
            rng.integers(1, 1000, t.shape).astype(np.float32) / np.float32(rng.integers(1, 9))
            for t in scenario.source.tensors
        ]
        ranks = scenario.sink.ranks
        self.memory = [[np.zeros((s.num_elements, itemsize(s.dtype)), np.uint8) for s in r.storages] for r in ranks]
        self.writes = [[np.zeros(s.num_elements, np.int64) for s in r.storages] for r in ranks]
        island = islands_of([i.host for i in (*scenario.source.ranks, *(r.info for r in ranks))], cluster)
        self.source_node = [island[i.host] for i in scenario.source.ranks]
        self.sink_node = [island[r.info.host] for r in ranks]
        self.entered = {n: [np.zeros(p.shape, np.int64) for p in self.plan.parts] for n in island.values()}
        self.tables: dict = {}

    def shard(self, rank: int, part, shard_idx: int, weights: Box) -> np.ndarray:
        """Values of a box of weights, through the shard that is said to hold it."""
        held = self.scenario.source.shards[part.tensor_idx][rank][shard_idx]
        assert held.contains(weights)
        return self.values[part.tensor_idx][at(weights)]

    def grids(self, part):
        facts = get_recipe(part.recipe)
        shape = self.scenario.source.tensors[part.tensor_idx].shape
        return (grids_of(facts, shape) if facts.quantised else None), facts.packed

    def table(self, rank: int, part, grid) -> np.ndarray:
        """The scales of one level that a rank knows; NaN for the others."""
        key = (rank, part.tensor_idx, part.recipe, part.group, grid.role)
        return self.tables.setdefault(key, np.full(grid.shape, np.nan, np.float32))

    def exchange(self) -> None:
        self.vector = np.zeros(self.amax_elements, np.float32)
        self.offsets: dict = {}
        for rank, region, part, grid, packed in self.regions():
            weights = to_weights(region.box, packed)
            values = self.shard(rank, part, region.shard_idx, weights)
            raise_amax(values, weights, grid, packed, self.grid_of(region.grid_offset, grid))
        for rank, region, part, grid, packed in self.regions():
            weights = to_weights(region.box, packed)
            touched = np.zeros(grid.shape, np.float32)
            raise_amax(np.ones(weights.shape), weights, grid, packed, touched)
            self.table(rank, part, grid)[touched > 0] = self.grid_of(region.grid_offset, grid)[touched > 0]
            assert self.offsets.setdefault((rank, region.part_idx), region.grid_offset) == region.grid_offset

    def regions(self):
        for rank, regions in enumerate(self.plan.amax_regions):
            for region in regions:
                part = self.plan.parts[region.part_idx]
                grids, packed = self.grids(part)
                yield rank, region, part, grids.shared, packed

    def grid_of(self, offset: int, grid) -> np.ndarray:
        return self.vector[offset : offset + int(np.prod(grid.shape))].reshape(grid.shape)

    def pack(self, bucket) -> list[np.ndarray]:
        return [self.pack_piece(bucket.src_rank, piece) for piece in bucket.pieces]

    def pack_piece(self, rank: int, piece) -> np.ndarray:
        part = self.plan.parts[piece.part_idx]
        grids, packed = self.grids(part)
        if part.role != "weight":
            grid = next(g for g in grids.levels if g.role == part.role)
            cells = self.table(rank, part, grid)[at(piece.box)]
            assert not np.isnan(cells).any(), f"{part.name}: the sender does not know the scales of {piece.box}"
            return as_bytes(cells, grid)
        weights = to_weights(piece.box, packed)
        values = self.shard(rank, part, piece.shard_idx, weights)
        if grids is None:
            return plain(part, values)
        tensor_amax, scale = None, np.zeros((1,) * values.ndim)
        if grids.always:
            known = self.grid_of(self.offsets[rank, piece.part_idx], grids.shared)
            tensor_amax = known[at(Box((*weights.offset[:-2], 0, 0), (*weights.shape[:-2], 1, 1)))]
        if grids.packed is not None:
            table = self.table(rank, part, grids.packed)
            if piece.mode == MODE_FUSED:
                local = np.zeros(table.shape, np.float32)
                raise_amax(values, weights, grids.packed, packed, local)
                by = None if tensor_amax is None else self.grid_of(self.offsets[rank, piece.part_idx], grids.shared)
                table[local > 0] = scales_of(part.recipe, local, by)[local > 0]
            scale = expanded(table, weights, grids.packed, packed)
            assert not np.isnan(scale).any()
        return codes_of(part.recipe, values, scale, tensor_amax)[..., None]

    def deliver(self, bucket, wire: list[np.ndarray]) -> None:
        has = {SOURCE}
        for src, dst in bucket.hops:
            assert src in has
            assert dst not in has
            has.add(dst)
            node = self.source_node[bucket.src_rank] if src == SOURCE else self.sink_node[src]
            if self.sink_node[dst] != node:
                self.relayed += src != SOURCE
                for piece in bucket.pieces:
                    self.entered[self.sink_node[dst]][piece.part_idx][at(piece.box)] += 1
        assert has - {SOURCE} == set(bucket.sinks)
        for sink_idx in bucket.sinks:
            for piece, data in zip(bucket.pieces, wire, strict=True):
                assert data.nbytes == piece.nbytes
                self.install(sink_idx, piece, data)

    def install(self, sink_idx: int, piece, data: np.ndarray) -> None:
        rank = self.scenario.sink.ranks[sink_idx]
        names = {t.name: t.alias_of or t.name for t in self.scenario.source.tensors}
        part = self.plan.parts[piece.part_idx]
        target = self.scenario.source.tensors[part.tensor_idx].name
        taken = 0
        for copy in rank.copies:
            same = (names[copy.tensor], rank.recipes[copy.tensor], copy.role) == (target, part.recipe, part.role)
            group = group_of(next((g for g in rank.scale_groups if copy.tensor in g), ()), names)
            if not same or group != part.group:
                continue
            num_dims = len(copy.box.shape)
            assert piece.box.shape[num_dims:] == (1,) * (len(piece.box.shape) - num_dims)
            box = Box(piece.box.offset[:num_dims], piece.box.shape[:num_dims])
            if copy.box.contains(box):
                index = self.elements(copy, box)
                data = data.reshape(*box.shape, -1)
                self.memory[sink_idx][copy.storage_idx][index] = data
                self.writes[sink_idx][copy.storage_idx][index] += 1
                taken += 1
        assert taken, f"sink {sink_idx} receives bytes of {part.name} that it does not need"

    @staticmethod
    def elements(copy, box: Box) -> np.ndarray:
        """Storage elements of a box of a copy."""
        out = np.full(box.shape, copy.dst_offset)
        for dim, stride in enumerate(copy.dst_strides):
            steps = np.arange(box.offset[dim], box.end[dim]) - copy.box.offset[dim]
            out = out + (steps * stride).reshape([-1 if d == dim else 1 for d in range(len(box.shape))])
        return out

    def check_memory(self) -> None:
        expected: dict = {}
        groups = group_amaxes(self.scenario.source, self.scenario.sink.ranks, self.values)
        by_name = {t.name: i for i, t in enumerate(self.scenario.source.tensors)}
        for sink_idx, rank in enumerate(self.scenario.sink.ranks):
            for copy in rank.copies:
                tensor = self.scenario.source.tensors[by_name[copy.tensor]]
                idx = by_name[tensor.alias_of or tensor.name]
                amax = groups.get((sink_idx, copy.tensor))
                key = (idx, rank.recipes[copy.tensor], None if amax is None else amax.tobytes())
                if key not in expected:
                    expected[key] = expected_parts(tensor, self.values[idx], key[1], amax)
                index = self.elements(copy, copy.box)
                got = self.memory[sink_idx][copy.storage_idx][index]
                np.testing.assert_array_equal(got, expected[key][copy.role][at(copy.box)])
                writes = self.writes[sink_idx][copy.storage_idx]
                assert (writes[index] == 1).all()
                writes[index] = 0
        assert all((w == 0).all() for per_rank in self.writes for w in per_rank), "bytes were written beside the copies"

    def check_nodes(self) -> None:
        for node, per_part in self.entered.items():
            for part, entered in zip(self.plan.parts, per_part, strict=True):
                assert entered.max(initial=0) <= 1, f"{part.name} enters {node} more than once"
                if part.role == "weight":
                    packed = get_recipe(part.recipe).packed
                    for rank, boxes in enumerate(self.scenario.source.shards[part.tensor_idx]):
                        for box in boxes if self.source_node[rank] == node else ():
                            assert not entered[at(to_packed(box, packed))].any(), (
                                f"{part.name} enters {node}, which holds it"
                            )

    def execute(self) -> None:
        """Exchange, pack, deliver; then look at what arrived where."""
        self.exchange()
        packed: dict[int, list] = {}
        for stage in (0, 1):
            for bucket in self.plan.buckets:
                if bucket.stage == stage:
                    packed[bucket.bucket_idx] = self.pack(bucket)
        for bucket in self.plan.buckets:
            self.deliver(bucket, packed[bucket.bucket_idx])
        self.check_memory()
        self.check_nodes()


def run_plan(scenario: Scenario, plan: Plan, seed: int = 0, cluster: Cluster | None = None) -> Run:
    """Run a plan, and check that all arrives that is needed, and nothing else."""
    run = Run(scenario, plan, seed, cluster)
    run.execute()
    return run


def planned(scenario: Scenario, cluster: Cluster | None = None) -> Plan:
    return make_plan(scenario.source, scenario.sink, cluster, scenario.options)


def islands_of(hosts: Sequence[str], cluster: Cluster | None) -> dict[str, str]:
    """What each host exchanges bytes with without a NIC: itself, or its NVLink domain if that spans several."""
    found = {host: f"node {host}" for host in hosts}
    for group in cluster.groups if cluster else ():
        per_domain = group.nvlink_domain // group.num_gpus if group.num_gpus else 0
        if per_domain > 1:
            found.update({h: f"{group.name} {i // per_domain}" for i, h in enumerate(group.hosts) if h in found})
    return found


HOSTS = tuple(f"h{i}" for i in range(8))


def random_cluster(rng: random.Random) -> Cluster:
    """Groups of hosts with and without GPUs, NVLink domains inside nodes and over several, and links between halves."""
    groups, left = [], list(HOSTS)
    while left:
        hosts = tuple(left[: rng.choice((1, 1, 2, 4))])
        del left[: len(hosts)]
        groups.append(_random_group(rng, hosts))
    names = [g.name for g in groups]
    half = max(1, len(names) // 2)
    links = []
    if len(names) > 1 and rng.random() < 0.5:
        links.append(Link("wan", tuple(names[:half]), tuple(names[half:]), rng.uniform(0.1, 10)))
    if len(names) > 2 and rng.random() < 0.4:
        links.append(Link("uplink", (names[0],), (names[1],), rng.uniform(0.01, 5)))
    return Cluster(tuple(groups), tuple(links), alpha_s=rng.choice((0.0, 1e-5)))


def _random_group(rng: random.Random, hosts: tuple[str, ...]) -> NodeGroup:
    gpus = rng.choice((0, 4, 8))
    nics = tuple(Nic(rng.uniform(0.5, 50)) for _ in range(rng.randint(1, 4)))
    if not gpus:
        return NodeGroup(hosts[0], len(hosts), rng.uniform(1, 200), hosts, nics=nics)
    rates = {"hbm_gbps": 3000.0, "pcie_gbps": rng.uniform(1, 60), "nvlink_gbps": rng.uniform(50, 900)}
    domain = rng.choice((0, gpus // 2, gpus, gpus * len(hosts)))
    return NodeGroup(hosts[0], len(hosts), rng.uniform(1, 200), hosts, gpus, nvlink_domain=domain, nics=nics, **rates)


def slow_trainer(rng: random.Random) -> Cluster:
    """One trainer node whose NIC is much slower than those of the engine nodes: relays have to carry the load."""
    nics = {"slow": (Nic(1.0),), "fast": tuple(Nic(rng.uniform(20, 50)) for _ in range(rng.randint(1, 2)))}
    groups = (
        NodeGroup("trainer", 1, 200.0, HOSTS[:1], nics=nics["slow"]),
        NodeGroup("engine", len(HOSTS) - 1, 200.0, HOSTS[1:], nics=nics["fast"]),
    )
    return Cluster(groups, alpha_s=1e-6)


def fleet(rng: random.Random, num_replicas: int, *, apart: bool = False, max_tensors: int = 3) -> Scenario:
    """A random job whose replicas are copies of one or two kinds, spread over all hosts.

    Args:
        rng: to draw from.
        num_replicas: of all kinds.
        apart: trainer ranks are on the first host, and engine ranks on the others.
        max_tensors: of the model.
    """
    base = random_scenario(rng, max_tensors=max_tensors)
    kinds: dict[str, list[SinkRankManifest]] = {}
    for rank in base.sink.ranks:
        kinds.setdefault(rank.replica, []).append(rank)
    models = list(kinds.values())[:2]
    places = HOSTS[1:] if apart else HOSTS
    hosts = HOSTS[:1] if apart else HOSTS
    ranks = [RankInfo(rng.choice(hosts), i) for i in range(len(base.source.ranks))]
    sinks = [r for i in range(num_replicas) for r in replica_of(models[i % len(models)], f"r{i}", rng, places)]
    source = msgspec.structs.replace(base.source, ranks=tuple(ranks))
    return Scenario(source, SinkManifest(tuple(sinks)), base.options)


def replica_of(
    model: Sequence[SinkRankManifest], name: str, rng: random.Random, places: Sequence[str] = HOSTS
) -> list[SinkRankManifest]:
    """Another replica of one kind: on one host, or on several."""
    home = rng.choice(places)
    spread = rng.random() < 0.4
    return [
        msgspec.structs.replace(r, replica=name, info=RankInfo(rng.choice(places) if spread else home, 500 + r.rank))
        for r in model
    ]


def num_relays(plan: Plan) -> int:
    """Hops of a plan's trees on which one engine rank passes on to another node."""
    trees = [plan.trees[f.tree_idx] for f in plan.flows]
    return sum(
        src != SOURCE and rail != LOCAL for tree in trees for (src, _), rail in zip(tree.hops, tree.rails, strict=True)
    )
