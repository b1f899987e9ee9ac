"""Who sends what to whom: balance, locality, trees, order, bounds and slices."""

from collections import Counter

import msgspec
import pytest

import wsync.plan.blocks
from wsync.plan import PlanOptions, expand_plan, make_plan, plan_digest, sink_slices, source_slices
from wsync.plan.types import MODE_FUSED, MODE_SCALED, SOURCE
from wsync.spec import Cluster, Link, Nic, NicPath, NodeGroup, RankInfo, TensorSpec
from wsync.testing.generators import dense_tensors, fsdp_source, moe_tensors, qwen3_0p6b_tensors, tp_sink

TINY = dense_tensors(4, 256, 4, 2, 64, 512, 1000)
SMALL = PlanOptions(65536)


def sent_bytes(plan):
    sent = Counter()
    for bucket in expand_plan(plan).buckets:
        sent[bucket.src_rank] += sum(p.nbytes for p in bucket.pieces)
    return sent


def test_replicated_trainers_share_the_sending():
    plan = make_plan(fsdp_source(TINY, ["h"] * 4, replicas=4), tp_sink(TINY, [["h"] * 2]), None, SMALL)
    sent = sent_bytes(plan)
    assert len(sent) == 4
    assert max(sent.values()) - min(sent.values()) <= SMALL.bucket_bytes


def test_a_faster_node_sends_more():
    groups = (
        NodeGroup("slow", 1, 1000.0, hosts=("a",), nics=(Nic(10.0),)),
        NodeGroup("fast", 1, 1000.0, hosts=("b",), nics=(Nic(40.0),)),
        NodeGroup("engine", 1, 1000.0, hosts=("e",), nics=(Nic(100.0),)),
    )
    plan = make_plan(fsdp_source(TINY, ["a", "b"], replicas=2), tp_sink(TINY, [["e"]]), Cluster(groups), SMALL)
    sent = sent_bytes(plan)
    total = sum(sent.values())
    assert abs(sent[0] - total / 5) <= SMALL.bucket_bytes / 2
    assert abs(sent[1] - total * 4 / 5) <= SMALL.bucket_bytes / 2


def test_a_node_that_holds_the_bytes_serves_itself():
    plan = make_plan(fsdp_source(TINY, ["a", "b"], replicas=2), tp_sink(TINY, [["a"], ["b"]]), None, SMALL)
    assert all(b.sinks == (b.src_rank,) for b in expand_plan(plan).buckets)


def test_bytes_enter_a_node_through_one_sink_and_heads_take_turns():
    tensors = (TensorSpec("w", (4096, 64), "bfloat16"),)
    nics = tuple(Nic(50.0, i, (NicPath(i, "PIX"),)) for i in range(4))
    gpus = {"num_gpus": 4, "hbm_gbps": 3000.0, "pcie_gbps": 60.0, "nvlink_gbps": 400.0, "nvlink_domain": 4}
    cluster = Cluster((NodeGroup("g", 2, 200.0, ("t", "e"), nics=nics, **gpus),), alpha_s=0.0)
    plan = make_plan(fsdp_source(tensors, ["t"]), tp_sink(tensors, [["e"] * 4]), cluster, PlanOptions(8192))
    whole = expand_plan(plan)
    heads = Counter()
    for bucket in whole.buckets:
        (head,) = (dst for src, dst in bucket.hops if src == SOURCE)
        assert bucket.hops == ((SOURCE, head), *((head, s) for s in range(4) if s != head))
        heads[head] += 1
    assert len(whole.buckets) == 64
    assert heads == {0: 16, 1: 16, 2: 16, 3: 16}


def test_all_sinks_of_a_sender_start_early():
    plan = make_plan(fsdp_source(TINY, ["h"]), tp_sink(TINY, [["h"] * 4]), None, PlanOptions(16384))
    whole = expand_plan(plan)
    groups = {b.sinks for b in whole.buckets}
    first = {b.sinks for b in whole.buckets[: len(groups)]}
    assert len(groups) == 5
    assert first == groups


def test_numbers_go_round_the_senders():
    plan = make_plan(fsdp_source(TINY, ["h"] * 2), tp_sink(TINY, [["h"]]), None, SMALL)
    whole = expand_plan(plan)
    assert [b.src_rank for b in whole.buckets[:6]] == [0, 1, 0, 1, 0, 1]


def test_tied_weights_are_sent_once():
    source, sink = fsdp_source(TINY, ["h"]), tp_sink(TINY, [["h"]])
    rank = sink.ranks[0]
    embed = next(c for c in rank.copies if c.tensor == "model.embed_tokens.weight")
    again = msgspec.structs.replace(embed, tensor="lm_head.weight", storage_idx=len(rank.storages))
    storage = msgspec.structs.replace(rank.storages[embed.storage_idx], name="lm_head")
    both = msgspec.structs.replace(
        rank,
        recipes={**rank.recipes, "lm_head.weight": "bf16"},
        storages=(*rank.storages, storage),
        copies=(*rank.copies, again),
    )
    two = make_plan(source, msgspec.structs.replace(sink, ranks=(both,)), None, SMALL)
    assert two.flows == make_plan(source, sink, None, SMALL).flows
    assert two.aliases == {"lm_head.weight": "model.embed_tokens.weight"}


def test_wire_bytes_are_those_of_the_model_where_nothing_is_replicated():
    tensors = qwen3_0p6b_tensors()
    plan = make_plan(fsdp_source(tensors, ["h"] * 2), tp_sink(tensors, [["h"] * 2]))
    whole = expand_plan(plan)
    assert plan.wire_bytes == 596_049_920 * 2
    assert sum(b.used_bytes for b in whole.buckets) < 1.001 * plan.wire_bytes


def test_aligned_shards_need_no_exchange_and_fuse_everything():
    tensors = qwen3_0p6b_tensors()
    plan = make_plan(fsdp_source(tensors, ["h"] * 2), tp_sink(tensors, [["h"] * 2], "fp8_block128"))
    whole = expand_plan(plan)
    assert plan.amax_elements == 0
    assert not any(whole.amax_regions)
    modes = Counter(p.mode for b in whole.buckets for p in b.pieces if "_proj" in whole.parts[p.part_idx].name)
    assert modes[MODE_FUSED] > 0
    assert modes[MODE_SCALED] == 0


def test_thin_shards_exchange_every_block():
    tensors = (TensorSpec("q_proj", (256, 256), "bfloat16"),)
    plan = make_plan(fsdp_source(tensors, ["h"] * 32), tp_sink(tensors, [["h"]], "fp8_block128"), None, SMALL)
    whole = expand_plan(plan)
    assert plan.amax_elements == 4
    assert [len(r) for r in whole.amax_regions] == [1] * 32
    assert {p.mode for b in whole.buckets if b.stage == 0 for p in b.pieces} == {MODE_SCALED}


def test_only_the_block_at_the_edge_is_exchanged():
    tensors = (TensorSpec("q_proj", (1000, 128), "bfloat16"),)
    plan = make_plan(fsdp_source(tensors, ["h"] * 2), tp_sink(tensors, [["h"]], "fp8_block128"), None, SMALL)
    whole = expand_plan(plan)
    assert [r.box.shape for rank in whole.amax_regions for r in rank] == [(116, 128), (12, 128)]
    assert plan.amax_elements == 8


def test_what_two_recipes_share_is_not_shared_and_what_two_replicas_share_is():
    tensors = (TensorSpec("q_proj", (512, 256), "bfloat16"),)
    source = fsdp_source(tensors, ["h"])
    same = tp_sink(tensors, [["h"], ["h"]], "fp8_block128")
    other = tp_sink(tensors, [["h"]], "fp8_block128_f32")
    assert make_plan(source, same).wire_bytes == 512 * 256 + 4 * 2 * 4
    mixed = msgspec.structs.replace(same, ranks=(*same.ranks, msgspec.structs.replace(other.ranks[0], replica="other")))
    assert make_plan(source, mixed).wire_bytes == 2 * (512 * 256 + 4 * 2 * 4)


def test_equal_tensors_are_intersected_once(monkeypatch):
    calls = []
    real = wsync.plan.blocks.partition
    monkeypatch.setattr(wsync.plan.blocks, "partition", lambda *a: calls.append(1) or real(*a))
    for layers in (2, 40):
        tensors = dense_tensors(layers, 256, 4, 2, 64, 512, 1000)
        make_plan(fsdp_source(tensors, ["h"] * 4), tp_sink(tensors, [["h"] * 2], "fp8_block128"))
    assert len(calls) % 2 == 0
    assert len(calls) // 2 < 40


# ---- bounds


def nodes(*hosts: str, gbps: float = 50.0) -> Cluster:
    return Cluster((NodeGroup("n", len(hosts), 1e6, hosts=hosts, nics=(Nic(gbps),)),), alpha_s=0.0)


def bounds(plan) -> dict[str, float]:
    return {b.name: b.seconds for b in plan.bounds}


def test_bounds_have_their_closed_forms():
    """U bytes of a replica that spans one node, N engine nodes, T trainer nodes, B per node."""
    tensors = (TensorSpec("experts", (64, 4096), "bfloat16"),)
    nbytes, rate = 64 * 4096 * 2, 50e9
    trainers, engines = ["t0", "t1"], [["e0", "e0"], ["e1", "e1"], ["e2", "e2"]]
    plan = make_plan(
        fsdp_source(tensors, trainers), tp_sink(tensors, engines), nodes(*trainers, "e0", "e1", "e2"), SMALL
    )
    found = bounds(plan)
    for i in range(3):
        assert found[f"ingress of node e{i}"] == pytest.approx(nbytes / rate)
    for i in range(2):
        assert found[f"egress of node t{i}"] == pytest.approx(nbytes / 2 / rate)
    assert found["egress of all trainer nodes"] == pytest.approx(nbytes / (2 * rate))
    assert found["ingress of all engine nodes"] == pytest.approx(nbytes / (3 * rate))
    assert found["traffic between nodes"] == pytest.approx(3 * nbytes / (5 * rate))
    assert plan.binding_cut.startswith("ingress of node e")
    # Two trainer nodes send two of three copies, so that one bucket is passed on when all others have arrived.
    bucket_s, ends_s = 65536 / rate, 2 * 65536 / 1e15
    assert plan.time_s == pytest.approx(nbytes / rate + bucket_s + ends_s, rel=1e-9)
    assert {sum(src == SOURCE for src, _ in t.hops) for t in plan.trees} == {2}
    alone = make_plan(
        fsdp_source(tensors, trainers),
        tp_sink(tensors, engines),
        nodes(*trainers, "e0", "e1", "e2"),
        msgspec.structs.replace(SMALL, relay=False),
    )
    assert alone.time_s == pytest.approx(3 * nbytes / 2 / rate + ends_s, rel=1e-9)
    assert alone.binding_cut == "egress of all trainer nodes"
    assert alone.lower_bound_s == pytest.approx(3 * nbytes / 2 / rate)


def test_a_plan_for_one_engine_node_is_optimal():
    trainers = ["t0", "t1", "t2", "t3"]
    plan = make_plan(fsdp_source(TINY, trainers), tp_sink(TINY, [["e"] * 2]), nodes(*trainers, "e"), SMALL)
    assert plan.binding_cut == "ingress of node e"
    assert plan.lower_bound_s == pytest.approx(plan.wire_bytes / 50e9, rel=1e-9)
    # What both ranks need is passed on in the memory of the node; a bucket is packed and unpacked there.
    padded = sum(flow.nbytes for flow in plan.flows)
    assert plan.wire_bytes < padded < 1.003 * plan.wire_bytes
    assert plan.time_s == pytest.approx(padded / 50e9 + 3 * 65536 / 1e15, rel=1e-9)


def test_a_shared_link_binds_where_it_is_the_narrowest():
    groups = (
        NodeGroup("west", 2, 1e6, hosts=("t0", "t1"), nics=(Nic(50.0),)),
        NodeGroup("east", 2, 1e6, hosts=("e0", "e1"), nics=(Nic(50.0),)),
    )
    cluster = Cluster(groups, (Link("wan", ("west",), ("east",), 1.0),))
    plan = make_plan(fsdp_source(TINY, ["t0", "t1"]), tp_sink(TINY, [["e0"], ["e1"]]), cluster, SMALL)
    unique = make_plan(fsdp_source(TINY, ["t0", "t1"]), tp_sink(TINY, [["e0"]]), cluster, SMALL).wire_bytes
    assert plan.binding_cut == "link wan from west"
    assert plan.lower_bound_s == pytest.approx(unique / 1e9)
    padded = sum(flow.nbytes for flow in plan.flows)
    assert unique < padded < 1.001 * unique
    # Each engine node passes on what it gets over the link: one hop with its alpha, and a bucket packed and unpacked.
    fill_s = cluster.alpha_s + 65536 / 50e9 + 2 * 65536 / 1e15
    assert plan.time_s == pytest.approx(padded / 1e9 + fill_s, rel=1e-9)


def test_bytes_on_one_host_cost_its_memory():
    plan = make_plan(fsdp_source(TINY, ["h"] * 2), tp_sink(TINY, [["h"] * 2]), None, SMALL)
    assert plan.binding_cut == "host memory of node h"
    assert plan.lower_bound_s == pytest.approx((plan.wire_bytes + plan.needed_bytes) / 10e9, rel=1e-9)
    assert not any(b.name.startswith(("ingress", "traffic")) for b in plan.bounds)


# ---- slices


def test_slices_cover_the_plan_and_carry_only_their_own_parts():
    source = fsdp_source(TINY, ["h"] * 4, replicas=2)
    plan = make_plan(source, tp_sink(TINY, [["h"] * 2], "fp8_block128"), None, SMALL)
    whole = expand_plan(plan)
    digest = plan_digest(plan)
    sources, sinks = source_slices(plan), sink_slices(plan)
    assert {s.plan_digest for s in (*sources, *sinks)} == {digest}
    by_idx = {b.bucket_idx: b for b in whole.buckets}
    assert sorted(b.bucket_idx for s in sources for b in s.buckets) == sorted(by_idx)
    for slice_ in (*sources, *sinks):
        used = {p.part_idx for b in slice_.buckets for p in b.pieces}
        used |= {r.part_idx for r in getattr(slice_, "amax_regions", ())}
        assert used == set(range(len(slice_.parts)))
        assert slice_.staging_bytes == len(slice_.buckets) * SMALL.bucket_bytes
        for bucket in slice_.buckets:
            found = by_idx[bucket.bucket_idx]
            names = [slice_.parts[p.part_idx].name for p in bucket.pieces]
            assert names == [whole.parts[p.part_idx].name for p in found.pieces]
            assert [p.box for p in bucket.pieces] == [p.box for p in found.pieces]
    for sink_idx, slice_ in enumerate(sinks):
        assert [b.bucket_idx for b in slice_.buckets] == [b.bucket_idx for b in whole.buckets if sink_idx in b.sinks]
    assert all([b.stage for b in s.buckets] == sorted(b.stage for b in s.buckets) for s in sources)


def test_a_sink_that_needs_nothing_has_an_empty_slice():
    sink = tp_sink(TINY, [["h"] * 2])
    idle = msgspec.structs.replace(sink.ranks[1], copies=())
    plan = make_plan(fsdp_source(TINY, ["h"]), msgspec.structs.replace(sink, ranks=(sink.ranks[0], idle)))
    assert sink_slices(plan)[1].buckets == ()


def test_another_host_makes_another_plan():
    source, sink = fsdp_source(TINY, ["a"]), tp_sink(TINY, [["a"]])
    moved = msgspec.structs.replace(source, ranks=(RankInfo("b"),))
    assert plan_digest(make_plan(source, sink)) != plan_digest(make_plan(moved, sink))


def test_stacked_experts_travel_by_expert():
    tensors = moe_tensors(1, 256, 4, 2, 64, 8, 128, 1000)
    plan = make_plan(fsdp_source(tensors, ["h"] * 4), tp_sink(tensors, [["h"] * 4], "fp8_block128"))
    whole = expand_plan(plan)
    for bucket in whole.buckets:
        for piece in bucket.pieces:
            if "experts" in whole.parts[piece.part_idx].name:
                assert bucket.sinks == (bucket.src_rank,)
                assert piece.box.shape[0] == 2
