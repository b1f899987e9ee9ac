"""Plans run on plain arrays: every byte that is needed arrives, once, with the right value, on the right road."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from standin_recipes import as_bytes, at, codes_of, expanded, group_amaxes, raise_amax, scales_of, whole_parts

from wsync.plan import Plan, decode_plan, encode_plan, expand_plan, make_plan, plan_digest
from wsync.plan.grids import grids_of, group_of, to_packed, to_weights
from wsync.plan.types import ALIGNMENT, MODE_FUSED, MODE_SCALED, SOURCE
from wsync.spec.box import Box, contiguous_strides
from wsync.spec.cluster import Cluster, Link, Nic, NodeGroup
from wsync.spec.dtypes import itemsize
from wsync.spec.recipes import get_recipe, recipe_parts
from wsync.testing.generators import Scenario, random_scenario

SEEDS = st.integers(0, 2**32 - 1)


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

    def __init__(self, scenario: Scenario, plan: Plan, seed: int) -> None:
        self.scenario, self.plan = scenario, expand_plan(plan)
        self.amax_elements = plan.amax_elements
        rng = np.random.default_rng(seed)
        self.values = [
            rng.integers(1, 1000, t.shape).astype(np.float32) / np.float32(rng.integers(1, 9))
            for t in scenario.source.tensors
        ]
        ranks = scenario.sink.ranks
        self.memory = [[np.zeros((s.num_elements, itemsize(s.dtype)), np.uint8) for s in r.storages] for r in ranks]
        self.writes = [[np.zeros(s.num_elements, np.int64) for s in r.storages] for r in ranks]
        hosts = list(dict.fromkeys([i.host for i in scenario.source.ranks] + [r.info.host for r in ranks]))
        self.source_node = [hosts.index(i.host) for i in scenario.source.ranks]
        self.sink_node = [hosts.index(r.info.host) for r in ranks]
        self.entered = [[np.zeros(p.shape, np.int64) for p in self.plan.parts] for _ in hosts]
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
        for node, per_part in enumerate(self.entered):
            for part, entered in zip(self.plan.parts, per_part, strict=True):
                assert entered.max(initial=0) <= 1, f"{part.name} enters node {node} more than once"
                if part.role == "weight":
                    packed = get_recipe(part.recipe).packed
                    for rank, boxes in enumerate(self.scenario.source.shards[part.tensor_idx]):
                        for box in boxes if self.source_node[rank] == node else ():
                            assert not entered[at(to_packed(box, packed))].any(), (
                                f"{part.name} enters node {node}, which holds it"
                            )


def run_plan(scenario: Scenario, seed: int = 0) -> tuple[Plan, Run]:
    plan = make_plan(scenario.source, scenario.sink, None, scenario.options)
    run = Run(scenario, plan, seed)
    run.exchange()
    packed: dict[int, list] = {}
    for stage in (0, 1):
        for bucket in run.plan.buckets:
            if bucket.stage == stage:
                packed[bucket.bucket_idx] = run.pack(bucket)
    for bucket in run.plan.buckets:
        run.deliver(bucket, packed[bucket.bucket_idx])
    return plan, run


@settings(max_examples=150, deadline=None)
@given(SEEDS)
def test_every_needed_byte_arrives_once_with_its_value_and_enters_each_node_once(seed):
    _, run = run_plan(random_scenario(random.Random(seed)), seed)
    run.check_memory()
    run.check_nodes()


@pytest.mark.deep
@pytest.mark.timeout(1200)
@settings(max_examples=1500, deadline=None)
@given(SEEDS)
def test_every_needed_byte_arrives_for_many_more_manifests(seed):
    _, run = run_plan(random_scenario(random.Random(seed), max_tensors=8), seed)
    run.check_memory()
    run.check_nodes()


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_buckets_keep_their_promises(seed):
    scenario = random_scenario(random.Random(seed))
    whole = make_plan(scenario.source, scenario.sink, None, scenario.options)
    plan = expand_plan(whole)
    assert len({b.bucket_idx for b in plan.buckets}) == len(plan.buckets)
    stages = [b.stage for b in plan.buckets]
    assert stages == sorted(stages)
    for bucket in plan.buckets:
        assert bucket.pieces
        assert list(bucket.sinks) == sorted(set(bucket.sinks))
        end = 0
        for piece in bucket.pieces:
            part = plan.parts[piece.part_idx]
            assert piece.offset % ALIGNMENT == 0
            assert piece.offset == -(-end // ALIGNMENT) * ALIGNMENT
            assert piece.nbytes == piece.box.num_elements * itemsize(part.dtype) > 0
            assert (part.role != "weight") == (bucket.stage == 1)
            assert sum(n > 1 for n in piece.box.shape) <= 4
            end = piece.offset + piece.nbytes
            check_mode(part, piece, scenario.source.tensors[part.tensor_idx])
        assert bucket.used_bytes == -(-end // ALIGNMENT) * ALIGNMENT <= whole.bucket_bytes


def check_mode(part, piece, tensor) -> None:
    facts = get_recipe(part.recipe)
    if part.role != "weight" or not facts.quantised:
        return
    assert piece.mode in (MODE_FUSED, MODE_SCALED)
    grids = grids_of(facts, tensor.shape)
    if piece.mode == MODE_FUSED:
        edges = zip(piece.box.offset[-2:], piece.box.end[-2:], part.shape[-2:], grids.packed.cell, strict=True)
        assert all(o % step == 0 and (e % step == 0 or e == n) for o, e, n, step in edges)
    if piece.mode == MODE_SCALED:
        assert facts.group == 1
    if len(piece.box.shape) > 2 and contiguous_strides(piece.box.shape)[0] != piece.box.num_elements:
        assert piece.box.shape[-2] * piece.box.shape[-1] % ALIGNMENT == 0 or max(piece.box.shape[:-2]) == 1


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_equal_inputs_give_equal_bytes_and_survive_the_wire(seed):
    one, two = (random_scenario(random.Random(seed)) for _ in range(2))
    plan = make_plan(one.source, one.sink, None, one.options)
    again = make_plan(two.source, two.sink, None, two.options)
    assert encode_plan(plan) == encode_plan(again)
    assert plan_digest(plan) == plan_digest(again)
    assert decode_plan(encode_plan(plan)) == plan


def random_cluster(rng: random.Random) -> Cluster:
    """One group for each host: with and without GPUs, fast and slow, and a link between two halves."""
    groups = []
    for host in ("h0", "h1", "h2", "h3"):
        gpus = rng.choice((0, 8))
        rates = (
            {"hbm_gbps": 3000.0, "pcie_gbps": rng.uniform(1, 60), "nvlink_gbps": rng.uniform(50, 900)} if gpus else {}
        )
        nics = tuple(Nic(rng.uniform(0.5, 50)) for _ in range(rng.randint(1, 4)))
        domain = rng.choice((0, gpus))
        groups.append(NodeGroup(host, 1, rng.uniform(1, 200), (host,), gpus, nvlink_domain=domain, nics=nics, **rates))
    links = (Link("wan", ("h0", "h1"), ("h2", "h3"), rng.uniform(0.1, 10)), Link("a", ("h0",), ("h1",), 0.01))
    return Cluster(tuple(groups), links[: rng.randint(0, 2)], alpha_s=rng.choice((0.0, 1e-5)))


@settings(max_examples=80, deadline=None)
@given(SEEDS)
def test_no_plan_is_faster_than_its_bound(seed):
    rng = random.Random(seed)
    scenario = random_scenario(rng)
    plan = make_plan(scenario.source, scenario.sink, random_cluster(rng), scenario.options)
    assert plan.time_s >= plan.lower_bound_s
    assert plan.score >= 1.0
    assert [b.seconds for b in plan.bounds] == sorted((b.seconds for b in plan.bounds), reverse=True)
    if plan.flows:
        assert plan.binding_cut
