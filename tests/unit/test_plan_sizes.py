"""How large things are: deltas, buckets and their numbers, rings, and the memory of each side."""

import random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_runs import fleet, planned, random_cluster
from route_cases import gpu_group

import wsync.plan.replan
from wsync.errors import ConfigError
from wsync.formats import delta
from wsync.plan import Planner, PlanOptions, expand_plan, make_plan, sink_slices, source_slices
from wsync.plan.delta_size import bits_per_change, expected_bytes
from wsync.plan.expand import Expansion
from wsync.plan.flows import Entry, Flow, Tree
from wsync.plan.packing import BucketCounter, bucket_room
from wsync.plan.plans import RING_BUCKETS, PlanClass, PlanPart, PlanUnit
from wsync.plan.types import ALIGNMENT, DEFAULT_BUCKET_BYTES, MODE_COPY, MODE_FUSED, SOURCE
from wsync.spec import Cluster
from wsync.spec.box import Box
from wsync.spec.dtypes import itemsize
from wsync.spec.recipes import get_recipe
from wsync.testing.generators import dense_tensors, fsdp_source, qwen3_0p6b_tensors, tp_sink

MODEL = dense_tensors(4, 256, 4, 2, 64, 512, 1000)


# ---- deltas


def stepped(kind, density, rng):
    """Random weights in bf16 or e4m3, and the same after some moved by one step."""
    count = 1 << 16
    if kind == delta.WORDS:
        old = (rng.standard_normal(count).astype(np.float32).view(np.uint32) >> 16).astype(np.int64)
    else:
        old = rng.integers(0x20, 0x60, count) | rng.integers(0, 2, count) << 7
    new = old.copy()
    new[rng.choice(count, round(count * density), replace=False)] += 1
    dtype = np.uint16 if kind == delta.WORDS else np.uint8
    return old.astype(dtype).view(np.uint8), new.astype(dtype).view(np.uint8)


@pytest.mark.parametrize("kind", [delta.WORDS, delta.BYTES])
@pytest.mark.parametrize("density", [0.001, 0.01, 0.03, 0.1, 0.2, 0.3])
def test_expected_deltas_are_those_of_the_encoder(kind, density):
    old, new = stepped(kind, density, np.random.default_rng(7))
    _, _, code = delta.encode_stripe(new, old, kind)
    real = min(len(code) + delta.ENTRY.size, len(old))
    assert expected_bytes(len(old), 2 if kind == delta.WORDS else 1, density) == pytest.approx(real, rel=0.03)


def test_what_would_not_be_smaller_travels_whole():
    assert expected_bytes(1000, 1, 0.4) <= 1000
    assert expected_bytes(1000, 2, 0.5) == expected_bytes(1000, 2, 1.0) == 1000
    assert expected_bytes(64, 2, 0.3) <= 64
    assert expected_bytes(1 << 20, 2, 0.0) < 64


def delta_plan(density):
    return make_plan(fsdp_source(MODEL, ["h"] * 2), tp_sink(MODEL, [["e"] * 2]), None, PlanOptions(65536, density))


def test_delta_or_dense_is_chosen_lot_by_lot():
    plan = delta_plan({"": 0.01, "model.layers.1.": 1.0, "model.norm": 0.0})
    planned_as = {plan.names[i]: {u.planned for u in c.units} for c in plan.classes for i in c.members}
    for name, ways in planned_as.items():
        assert ways == ({"dense"} if name.startswith("model.layers.1.") else {"delta"}), name
    assert {u.planned for c in delta_plan(None).classes for u in c.units} == {"dense"}


def test_sparse_changes_make_a_plan_faster_but_not_its_buckets_smaller():
    dense, sparse = delta_plan(None), delta_plan(0.01)
    assert sparse.wire_bytes == dense.wire_bytes
    assert [f.nbytes for f in sparse.flows] == [f.nbytes for f in dense.flows]
    assert sum(f.wire_bytes for f in sparse.flows) < 0.1 * sum(f.wire_bytes for f in dense.flows)
    assert sparse.lower_bound_s < 0.1 * dense.lower_bound_s
    assert delta_plan(1.0).flows == dense.flows


@pytest.mark.parametrize("elem_bytes", [1, 2, 4])
def test_the_rarer_the_changes_the_smaller_the_delta_down_to_none(elem_bytes):
    sizes = [expected_bytes(10**9, elem_bytes, d) for d in (1e-3, 1e-6, 1e-9, 1e-13, 1e-16, 1e-17, 1e-300, 5e-324, 0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[3] < 64
    assert sizes[-2] == sizes[-1]


def test_no_gap_is_longer_than_the_tensor():
    assert bits_per_change(1e-12, 1 << 16) <= 64
    assert bits_per_change(1e-300, 1 << 30) <= 2000


def test_a_plan_for_changes_that_are_hardly_there_sends_deltas():
    for density in (1e-13, 1e-17):
        assert {u.planned for c in delta_plan(density).classes for u in c.units} == {"delta"}


@pytest.mark.parametrize(
    "density",
    [-0.1, 1.5, float("nan"), {"model.": 2.0}, [0.5], "x", True, {"model.": "0.1"}, {"model.": None}],
)
def test_a_density_that_cannot_be_is_refused(density):
    with pytest.raises(ConfigError, match=r"density.*allowed is 0 to 1"):
        delta_plan(density)


def test_the_density_of_what_is_no_prefix_is_refused():
    with pytest.raises(ConfigError, match=r"density has the key 1, allowed are prefixes"):
        delta_plan({1: 0.5})


@pytest.mark.parametrize("size", ["4096", 4096.0, True, 4097, 0, -256, 1 << 41])
def test_a_size_of_buckets_that_cannot_be_is_refused(size):
    with pytest.raises(ConfigError, match=r"bucket_bytes is .*allowed are multiples of 256"):
        Planner(fsdp_source(MODEL, ["h"]), None, PlanOptions(size))


@pytest.mark.parametrize("relay", ["no", None, 1])
def test_relays_are_allowed_or_not(relay):
    with pytest.raises(ConfigError, match=r"relay is .*, allowed are True and False"):
        Planner(fsdp_source(MODEL, ["h"]), None, PlanOptions(relay=relay))


# ---- buckets


@st.composite
def packings(draw):
    """Units of some classes, and the size of a bucket."""
    size = draw(st.integers(1, 64)) * ALIGNMENT
    units, parts = [], []
    for _ in range(draw(st.integers(1, 6))):
        dtype = draw(st.sampled_from(("bfloat16", "float32", "float8_e4m3fn", "int64")))
        shape = tuple(draw(st.lists(st.integers(1, 40), min_size=0, max_size=4)))
        step = (1, 1)
        if len(shape) >= 2 and draw(st.booleans()):
            step = draw(st.sampled_from(((1, 32), (16, 16), (4, 8))))
        if step[0] * step[1] * itemsize(dtype) > size:
            step = (1, 1)
        box = Box((0,) * len(shape), shape)
        mode = MODE_COPY if step == (1, 1) else MODE_FUSED
        nbytes = box.num_elements * itemsize(dtype)
        units.append(PlanUnit(len(parts), box, mode, step, nbytes, nbytes))
        parts.append(PlanPart("weight", "", dtype, shape))
    counts = [draw(st.integers(1, 5)) for _ in units]
    return size, tuple(parts), tuple(units), counts


@settings(max_examples=300, deadline=None)
@given(packings())
def test_numbers_of_buckets_suffice_for_whatever_is_packed(packing):
    size, parts, units, counts = packing
    cls = PlanClass("bf16", parts, units, tuple(range(5)), (), (), 0, 0)
    entries = tuple(Entry(0, i, 0, 0, count) for i, count in enumerate(counts))
    padded = [-(-u.nbytes // ALIGNMENT) * ALIGNMENT for u in units]
    flow = Flow(0, 0, 0, 0, entries, sum(n * c for n, c in zip(padded, counts, strict=True)))
    names = {i: f"t{i}" for i in range(5)}
    buckets = Expansion([cls], (), names, size).buckets([flow], [Tree((0,), ((SOURCE, 0),), (0,))])
    counter, at = BucketCounter(size), (0, 0)
    for unit, part, count in zip(units, parts, counts, strict=True):
        at = counter.add(at, unit.box, itemsize(part.dtype), unit.step, count)
    assert at == (len(buckets) - 1, buckets[-1].used_bytes)
    assert -(-flow.nbytes // size) <= len(buckets) <= bucket_room(flow.nbytes, size)
    assert [b.bucket_idx for b in buckets] == list(range(len(buckets)))
    taken = sum(p.nbytes for b in buckets for p in b.pieces)
    assert taken == sum(u.nbytes * c for u, c in zip(units, counts, strict=True))
    assert all(0 < b.used_bytes <= size for b in buckets)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_rings_of_few_buckets_never_wait_for_themselves(seed, ring):
    assert ring_run(*ring_job(seed), ring)


def test_a_ring_whose_ranks_disagree_about_the_order_does_wait():
    stuck = 0
    for seed in range(20):
        sources, sinks = ring_job(seed)
        stuck += not ring_run(sources, [list(reversed(s)) if i % 2 else s for i, s in enumerate(sinks)], 1)
    assert stuck > 5


def ring_job(seed):
    rng = random.Random(seed)
    plan = planned(fleet(rng, rng.randint(2, 5), apart=True), random_cluster(rng))
    return [list(s.buckets) for s in source_slices(plan)], [list(s.buckets) for s in sink_slices(plan)]


def ring_run(sources, sinks, ring):
    """Move buckets hop by hop, each rank in the order of its slice with ``ring`` buckets at a time.

    A bucket stays in a rank's ring until everybody to whom the rank passes it on has it. True if all arrives.
    """
    queues = {("source", r): [b.bucket_idx for b in bs] for r, bs in enumerate(sources)}
    queues |= {("sink", s): [b.bucket_idx for b in bs] for s, bs in enumerate(sinks)}
    by_idx = {b.bucket_idx: b for bs in sources for b in bs}
    got = {(("source", b.src_rank), idx) for idx, b in by_idx.items()}
    while any(queues.values()):
        moved = False
        for idx, bucket in by_idx.items():
            for src, dst in bucket.hops:
                sender = ("source", bucket.src_rank) if src == SOURCE else ("sink", src)
                here, there = queues[sender][:ring], queues["sink", dst][:ring]
                if idx in here and idx in there and (sender, idx) in got and (("sink", dst), idx) not in got:
                    got.add((("sink", dst), idx))
                    moved = True
        for who, queue in queues.items():
            while queue and (who, queue[0]) in got and _passed_on(by_idx[queue[0]], who, got):
                queue.pop(0)
                moved = True
        if not moved:
            return False
    return True


def _passed_on(bucket, who, got):
    kind, number = who
    me = SOURCE if kind == "source" else number
    return all((("sink", dst), bucket.bucket_idx) in got for src, dst in bucket.hops if src == me)


# ---- memory


@pytest.mark.parametrize("size", [65536, 4 << 20])
def test_memory_that_a_plan_states_is_what_slices_stage(size):
    tensors = MODEL if size == 65536 else qwen3_0p6b_tensors()
    sink = tp_sink(tensors, [["e"] * 2, ["f"] * 2], "fp8_block128")
    plan = make_plan(fsdp_source(tensors, ["h"] * 4), sink, None, PlanOptions(size))
    for slice_ in source_slices(plan):
        stated, real = plan.source_memory_bytes(slice_.rank), slice_.staging_bytes
        assert stated == real
        assert plan.source_memory_bytes(slice_.rank, delta=True) == 2 * stated + size
    for slice_ in sink_slices(plan):
        idx, real = slice_.sink_idx, slice_.staging_bytes
        stated = plan.sink_memory_bytes(idx)
        assert stated == real
        assert plan.sink_memory_bytes(idx, "paused") == min(stated, RING_BUCKETS * size)
        assert plan.sink_memory_bytes(idx, delta=True) == 2 * stated + size
        assert plan.sink_memory_bytes(idx, "paused", delta=True) == min(stated, RING_BUCKETS * size) + stated + size


def test_memory_of_ranks_and_modes_that_are_not_there_is_refused():
    plan = delta_plan(None)
    for ask in (
        lambda: plan.source_memory_bytes(2),
        lambda: plan.sink_memory_bytes(-1),
        lambda: plan.sink_memory_bytes(0, "frozen"),
    ):
        with pytest.raises(ConfigError):
            ask()


def test_bytes_of_a_plan_add_up():
    plan = make_plan(fsdp_source(MODEL, ["a", "b"]), tp_sink(MODEL, [["c"] * 2, ["d"] * 2]), None, PlanOptions(65536))
    whole = expand_plan(plan)
    sizes = [(sum(p.nbytes for p in b.pieces), b) for b in whole.buckets]
    assert plan.wire_bytes == sum(n for n, _ in sizes)
    assert plan.sink_bytes == sum(n * len(b.sinks) for n, b in sizes) == plan.needed_bytes
    assert plan.delivered_bytes == sum(n * len(b.hops) for n, b in sizes)
    assert msgspec.structs.replace(plan).flow_bytes == plan.flow_bytes


# ---- the size that the planner chooses


LARGE = dense_tensors(16, 4096, 32, 8, 128, 14336, 32768)
NODE = gpu_group("n", 1, 8)


def chosen(source_hosts, replicas, *groups, cluster=True, **options):
    source, sink = fsdp_source(LARGE, source_hosts), tp_sink(LARGE, replicas)
    return make_plan(source, sink, Cluster(groups) if cluster else None, PlanOptions(**options))


def test_buckets_inside_one_node_are_large_enough_for_its_rates():
    places = (["n-0"] * 8, [["n-0"] * 2] * 4)
    plan = chosen(*places, NODE)
    assert plan.bucket_bytes >= 16 << 20
    assert plan.score < 0.6 * chosen(*places, NODE, bucket_bytes=4 << 20).score


def test_nics_of_groups_that_have_no_ranks_say_nothing():
    engines, slow = gpu_group("e", 4, 8, nic_gbps=50.0), gpu_group("x", 1, 8, nic_gbps=0.01)
    places = (["n-0"] * 8, [[f"e-{i}"] * 8 for i in range(4)])
    assert chosen(*places, NODE, engines, slow).bucket_bytes == chosen(*places, NODE, engines).bucket_bytes
    slower = gpu_group("e", 4, 8, nic_gbps=0.5)
    assert chosen(*places, NODE, slower).bucket_bytes < chosen(*places, NODE, engines).bucket_bytes


def test_buckets_of_long_ways_are_large_enough_that_nics_do_not_wait_for_messages():
    groups, places = (NODE, gpu_group("e", 2, 8)), (["n-0"] * 8, [[f"e-{i}"] * 8 for i in range(2)])
    source, sink = fsdp_source(LARGE, places[0]), tp_sink(LARGE, places[1])
    near, far = (make_plan(source, sink, Cluster(groups, alpha_s=alpha_s)) for alpha_s in (5e-6, 1e-3))
    assert near.bucket_bytes <= 8 << 20 < far.bucket_bytes
    options = PlanOptions(bucket_bytes=8 << 20)
    assert far.time_s < 0.6 * make_plan(source, sink, Cluster(groups, alpha_s=1e-3), options).time_s


def test_buckets_that_nothing_fills_are_not_waited_for():
    source, sink = fsdp_source(MODEL, ["n-0"]), tp_sink(MODEL, [["n-0"]])
    times = [make_plan(source, sink, Cluster((NODE,)), PlanOptions(n << 20)).time_s for n in (64, 1024)]
    assert times[0] == times[1]


def test_without_a_cluster_buckets_have_their_default_size():
    assert chosen(["n-0"] * 8, [["n-0"] * 2] * 4, cluster=False).bucket_bytes == DEFAULT_BUCKET_BYTES


def test_a_planner_chooses_another_size_when_the_fleet_has_become_another_one():
    source = fsdp_source(LARGE, ["n-0"] * 8)
    cluster = Cluster((NODE, gpu_group("e", 16, 8, nic_gbps=0.25)))
    planner = Planner(source, cluster)
    one, many = (tp_sink(LARGE, [[f"e-{i}"] * 8 for i in range(n)]) for n in (1, 16))
    sizes = [planner.plan(sink).bucket_bytes for sink in (one, many, one)]
    fresh = [Planner(source, cluster).plan(sink).bucket_bytes for sink in (one, many, one)]
    assert sizes == fresh
    assert sizes[0] >= 4 * sizes[1]
    before = planner.plan(one)
    assert planner.plan(one).classes is before.classes


# ---- what packing costs, and messages


def brute_packed(plan):
    """For each trainer rank the bytes of all weights that its pieces read, and of all pieces that it writes."""
    out = [0] * plan.num_sources
    expanded = expand_plan(plan)
    for bucket in expanded.buckets:
        for piece in bucket.pieces:
            part = expanded.parts[piece.part_idx]
            packed = get_recipe(part.recipe).packed
            read = piece.box.num_elements * 2 * packed if part.role == "weight" else piece.nbytes
            out[bucket.src_rank] += read + piece.nbytes
    return out


@pytest.mark.parametrize("recipe", ["bf16", "fp8_block128", "nvfp4"])
def test_packing_reads_the_trainers_dtype_and_writes_the_wires(recipe, monkeypatch):
    seen = {}
    real = wsync.plan.replan.plan_times
    monkeypatch.setattr(wsync.plan.replan, "plan_times", lambda *a, **k: seen.update(k) or real(*a, **k))
    cluster = Cluster((gpu_group("n", 1, 8, hbm_gbps=1.0), gpu_group("e", 2, 8)))
    source, sink = fsdp_source(MODEL, ["n-0"] * 4), tp_sink(MODEL, [["e-0"] * 2, ["e-1"] * 2], recipe)
    plan = make_plan(source, sink, cluster, PlanOptions(65536))
    packed = brute_packed(plan)
    assert list(seen["packed_bytes"]) == packed
    assert list(seen["flow_buckets"]) == list(plan.flow_buckets)
    # Memory of 1 GB/s is what binds: the bound counts what is packed at least once, the plan what its ranks pack.
    assert plan.binding_cut.startswith("quantise on ")
    assert max(packed) / 4 / 1e9 <= plan.lower_bound_s <= max(packed) / 1e9 * (1 + 1e-9)
    assert plan.time_s >= max(packed) / 1e9


def test_a_patched_plan_counts_its_messages_as_a_fresh_one_does(monkeypatch):
    seen = []
    real = wsync.plan.replan.plan_times
    monkeypatch.setattr(
        wsync.plan.replan, "plan_times", lambda *a, **k: seen.append(k["flow_buckets"]) or real(*a, **k)
    )
    planner = Planner(fsdp_source(MODEL, ["n"] * 4), None, PlanOptions(4096))
    for names in ("ab", "abc", "ac"):
        plan = planner.plan(tp_sink(MODEL, [[x] * 2 for x in names]))
        assert tuple(seen[-1]) == plan.flow_buckets
