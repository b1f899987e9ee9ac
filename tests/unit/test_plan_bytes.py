"""Plans run on plain arrays: every byte that is needed arrives, once, with the right value, on the right road."""

import random
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_runs import fleet, num_relays, planned, random_cluster, run_plan, slow_trainer

from wsync.plan import decode_plan, encode_plan, expand_plan, plan_digest, sink_slices, source_slices
from wsync.plan.flows import LOCAL
from wsync.plan.grids import grids_of
from wsync.plan.types import ALIGNMENT, MODE_FUSED, MODE_SCALED, SOURCE
from wsync.spec.box import contiguous_strides
from wsync.spec.dtypes import itemsize
from wsync.spec.recipes import get_recipe
from wsync.testing.generators import random_scenario

SEEDS = st.integers(0, 2**32 - 1)


def run_one(seed: int, max_tensors: int = 5) -> None:
    rng = random.Random(seed)
    scenario = random_scenario(rng, max_tensors=max_tensors)
    cluster = random_cluster(rng) if rng.random() < 0.7 else None
    run_plan(scenario, planned(scenario, cluster), seed, cluster)


def run_fleet(seed: int) -> None:
    rng = random.Random(seed)
    apart = rng.random() < 0.5
    scenario = fleet(rng, rng.randint(3, 7), apart=apart)
    cluster = slow_trainer(rng) if apart else random_cluster(rng)
    run_plan(scenario, planned(scenario, cluster), seed, cluster)


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_every_needed_byte_arrives_once_with_its_value_and_enters_each_island_once(seed):
    run_one(seed)


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_bytes_arrive_at_many_replicas_on_many_nodes(seed):
    run_fleet(seed)


def some_in_host_memory(rng, scenario):
    """The job with ranks that keep what is synced in host memory: none, some or all of each side."""

    def moved(info, share):
        return msgspec.structs.replace(info, memory="host" if rng.random() < share else "device")

    shares = rng.choice((0.0, 0.5, 1.0)), rng.choice((0.0, 0.5, 1.0))
    source = msgspec.structs.replace(scenario.source, ranks=tuple(moved(r, shares[0]) for r in scenario.source.ranks))
    ranks = tuple(msgspec.structs.replace(r, info=moved(r.info, shares[1])) for r in scenario.sink.ranks)
    return replace(scenario, source=source, sink=msgspec.structs.replace(scenario.sink, ranks=ranks))


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_bytes_arrive_wherever_ranks_keep_them_and_no_bound_is_beaten(seed):
    rng = random.Random(seed)
    scenario = fleet(rng, rng.randint(2, 5)) if rng.random() < 0.5 else random_scenario(rng)
    scenario, cluster = some_in_host_memory(rng, scenario), random_cluster(rng)
    plan = planned(scenario, cluster)
    run_plan(scenario, plan, seed, cluster)
    assert plan.time_s >= plan.lower_bound_s * (1 - 1e-9)


@pytest.mark.deep
@pytest.mark.timeout(1800)
@settings(max_examples=1500, deadline=None)
@given(SEEDS)
def test_every_needed_byte_arrives_for_many_more_manifests(seed):
    run_one(seed, max_tensors=8)


@pytest.mark.deep
@pytest.mark.timeout(1800)
@settings(max_examples=600, deadline=None)
@given(SEEDS)
def test_bytes_arrive_at_many_more_fleets(seed):
    run_fleet(seed)


def test_relays_carry_what_a_slow_trainer_cannot():
    relayed = 0
    for seed in range(6):
        rng = random.Random(seed)
        scenario, cluster = fleet(rng, 6, apart=True), slow_trainer(rng)
        plan = planned(scenario, cluster)
        run = run_plan(scenario, plan, seed, cluster)
        assert bool(run.relayed) == bool(num_relays(plan))
        relayed += run.relayed
        alone = replace(scenario, options=msgspec.structs.replace(scenario.options, relay=False))
        assert run_plan(alone, planned(alone, cluster), seed, cluster).relayed == 0
    assert relayed > 100


# ---- a run finds what a wrong planner does


def without_last(tree):
    if len(tree.hops) == 1:
        return tree
    return msgspec.structs.replace(tree, sinks=tree.sinks[:-1], hops=tree.hops[:-1], rails=tree.rails[:-1])


def hop_to_itself(tree):
    (_, first), *rest = tree.hops
    return msgspec.structs.replace(tree, hops=((first, first), *rest))


def to_all(tree):
    """Everybody gets everything."""
    hops = tuple((SOURCE, s) for s in range(4))
    return msgspec.structs.replace(tree, sinks=(0, 1, 2, 3), hops=hops, rails=(0,) * 4)


def star(tree):
    """The sender serves everybody itself, on whatever island they are."""
    hops = tuple((SOURCE, s) for s in tree.sinks)
    return msgspec.structs.replace(tree, hops=hops, rails=(0,) * len(hops))


def two_on_one_host() -> tuple:
    """A job with two replicas of two ranks on one host, which is not the trainer's."""
    for seed in range(100):
        rng = random.Random(seed)
        scenario = fleet(rng, 2, apart=True)
        ranks = tuple(
            msgspec.structs.replace(r, info=msgspec.structs.replace(r.info, host="h1")) for r in scenario.sink.ranks
        )
        if len(ranks) == 4 and len({r.replica for r in ranks}) == 2:
            scenario = replace(scenario, sink=msgspec.structs.replace(scenario.sink, ranks=ranks))
            plan = planned(scenario)
            if any(len(t.sinks) > 1 for t in plan.trees) and any(len(t.sinks) < 4 for t in plan.trees):
                return scenario, seed
    raise AssertionError("no seed makes such a job")


@pytest.mark.parametrize("change", [without_last, hop_to_itself, to_all, star])
def test_a_run_fails_for_wrong_trees(change):
    scenario, seed = two_on_one_host()
    plan = planned(scenario)
    run_plan(scenario, plan, seed)
    wrong = msgspec.structs.replace(plan, trees=tuple(change(t) for t in plan.trees))
    with pytest.raises(AssertionError):
        run_plan(scenario, wrong, seed)


def test_a_run_fails_for_flows_that_lack_a_member_or_send_one_twice():
    scenario, seed = two_on_one_host()
    plan = planned(scenario)
    flow = plan.flows[0]
    fewer = msgspec.structs.replace(flow, entries=flow.entries[1:])
    for flows in ((fewer, *plan.flows[1:]), (*plan.flows, msgspec.structs.replace(flow, first_bucket=1 << 20))):
        flows = tuple(f for f in flows if f.entries)
        with pytest.raises(AssertionError):
            run_plan(scenario, msgspec.structs.replace(plan, flows=flows), seed)


# ---- what buckets and slices promise


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_buckets_keep_their_promises(seed):
    scenario = random_scenario(random.Random(seed))
    whole = planned(scenario)
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


@settings(max_examples=15, deadline=None)
@given(SEEDS)
def test_equal_inputs_give_equal_bytes_and_survive_the_wire(seed):
    one, two = (random_scenario(random.Random(seed)) for _ in range(2))
    plan, again = planned(one), planned(two)
    assert encode_plan(plan) == encode_plan(again)
    assert plan_digest(plan) == plan_digest(again)
    assert decode_plan(encode_plan(plan)) == plan


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_slices_expand_to_their_part_of_the_whole_plan_in_its_order(seed):
    rng = random.Random(seed)
    scenario = fleet(rng, 3)
    plan = planned(scenario, random_cluster(rng))
    whole = expand_plan(plan)
    facts = [bucket_facts(b, whole.parts) for b in whole.buckets]
    for slice_ in source_slices(plan):
        mine = [bucket_facts(b, slice_.parts) for b in slice_.buckets]
        assert mine == [f for f, b in zip(facts, whole.buckets, strict=True) if b.src_rank == slice_.rank]
        regions = [(slice_.parts[r.part_idx], *msgspec.structs.astuple(r)[1:]) for r in slice_.amax_regions]
        expected = whole.amax_regions[slice_.rank]
        assert regions == [(whole.parts[r.part_idx], *msgspec.structs.astuple(r)[1:]) for r in expected]
    for slice_ in sink_slices(plan):
        mine = [bucket_facts(b, slice_.parts) for b in slice_.buckets]
        assert mine == [f for f, b in zip(facts, whole.buckets, strict=True) if slice_.sink_idx in b.sinks]


def bucket_facts(bucket, parts) -> tuple:
    """A bucket with its parts in place of their numbers, which each rank has its own of."""
    pieces = tuple((parts[p.part_idx], *msgspec.structs.astuple(p)[1:]) for p in bucket.pieces)
    return (*msgspec.structs.astuple(msgspec.structs.replace(bucket, pieces=())), pieces)


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_no_plan_is_faster_than_its_bound(seed):
    rng = random.Random(seed)
    scenario = random_scenario(rng)
    plan = planned(scenario, random_cluster(rng))
    assert plan.time_s >= plan.lower_bound_s
    assert plan.score >= 1.0
    assert [b.seconds for b in plan.bounds] == sorted((b.seconds for b in plan.bounds), reverse=True)
    if any(len(t.hops) > 1 or t.rails != (LOCAL,) for t in plan.trees):  # not only from a GPU to itself
        assert plan.binding_cut
