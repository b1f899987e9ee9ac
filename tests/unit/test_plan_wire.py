"""Plans and slices as bytes: strict, versioned, and small."""

import contextlib
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsync.errors import FormatVersionError, WireError
from wsync.plan import (
    CompactSlice,
    PlanOptions,
    compact_sink,
    compact_source,
    decode_plan,
    encode_plan,
    expand_sink,
    expand_source,
    make_plan,
    plan_digest,
)
from wsync.plan.names import Names, pack_names, unpack_names
from wsync.plan.types import MAX_BUCKETS
from wsync.spec.box import Box
from wsync.spec.serde import FORMAT_VERSION, decode, encode
from wsync.testing.generators import dense_tensors, fsdp_source, tp_sink

MODEL = dense_tensors(2, 256, 4, 2, 64, 512, 1000)
PLAN = make_plan(
    fsdp_source(MODEL, ["a", "b"]), tp_sink(MODEL, [["c"] * 2, ["d"] * 2], "nvfp4"), None, PlanOptions(65536)
)
DATA = encode_plan(PLAN)


def changed(**fields):
    """The bytes of the plan with some fields replaced, or added."""
    return msgspec.msgpack.encode({**msgspec.msgpack.decode(DATA), **fields})


def test_a_truncated_plan_is_refused_wherever_it_ends():
    rng = random.Random(0)
    for end in (0, 1, len(DATA) - 1, *(rng.randrange(len(DATA)) for _ in range(200))):
        with pytest.raises(WireError):
            decode_plan(DATA[:end])
    with pytest.raises(WireError):
        decode_plan(DATA + b"\0")


@pytest.mark.parametrize(
    ("data", "found", "why"),
    [
        (b"", "0 bytes", "truncated"),
        (b'{"groups": [], "links": []}', '27 bytes that begin with b\'{"groups": [], "\'', "Expected `object`"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "108 bytes that begin with b'\\x89PNG", "Expected `str`"),
        (b"\xff\xfe" * 4, "8 bytes that begin with b'\\xff\\xfe", "Expected `object`, got `int`"),
        (b"\x91" * 5000, "5000 bytes that begin with b'\\x91", "Expected `object`, got `array`"),
        (b"\x81\xa1a" * 5000, "15000 bytes that begin with b'\\x81\\xa1a", "recursion"),
        (msgspec.msgpack.encode({"a": 1}), "4 bytes that begin with b'\\x81\\xa1a\\x01'", "`format_version`"),
        (DATA[:-1], f"{len(DATA) - 1} bytes that begin with", "truncated"),
    ],
)
def test_what_is_no_plan_is_called_that_and_says_what_it_begins_with(data, found, why):
    with pytest.raises(WireError) as refused:
        decode_plan(data)
    assert refused.value.message.startswith(found)
    assert "no plan of wsync" in refused.value.message
    assert why in refused.value.message
    assert "_Version" not in str(refused.value)
    assert "wsync plan -o" in refused.value.hint


def test_a_newer_plan_is_named_as_such_even_if_it_has_new_fields():
    with pytest.raises(FormatVersionError, match=str(FORMAT_VERSION + 1)):
        decode_plan(changed(format_version=FORMAT_VERSION + 1, news=1))
    newer = msgspec.structs.replace(compact_sink(PLAN, 0), format_version=FORMAT_VERSION + 1)
    with pytest.raises(FormatVersionError, match=str(FORMAT_VERSION + 1)):
        expand_sink(newer)


def test_unknown_fields_and_wrong_types_are_refused_at_every_depth():
    tree = msgspec.msgpack.decode(DATA)["trees"][0]
    for fields in (
        {"news": 1},
        {"num_sinks": "4"},
        {"time_s": None},
        {"trees": [[*tree, 1]]},
        {"flows": [[0, 0, 0, 0, [[0, 0, 0, 0, 1, 7]], 1, -1]]},
        {"bounds": [["cut", "slow"]]},
    ):
        with pytest.raises(WireError):
            decode_plan(changed(**fields))


def replaced(path, **fields):
    """The plan with fields replaced of what stands first at ``path``."""
    found = getattr(PLAN, path)
    return msgspec.structs.replace(PLAN, **{path: (msgspec.structs.replace(found[0], **fields), *found[1:])})


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (replaced("flows", src_rank=2), "trainer rank 2 of 2"),
        (replaced("flows", tree_idx=len(PLAN.trees)), f"tree {len(PLAN.trees)} of {len(PLAN.trees)}"),
        (replaced("flows", stage=2), "stage 2 of 2"),
        (replaced("flows", first_bucket=1 << 20), "begins at bucket"),
        (replaced("flows", entries=(msgspec.structs.replace(PLAN.flows[0].entries[0], class_idx=99),)), "class 99 of"),
        (replaced("flows", entries=(msgspec.structs.replace(PLAN.flows[0].entries[0], unit_idx=-1),)), "unit -1 of"),
        (replaced("flows", entries=(msgspec.structs.replace(PLAN.flows[0].entries[0], end=0),)), "member -1 of"),
        (replaced("trees", sinks=(0, 1, 2)), "is for sinks"),
        (replaced("trees", hops=((0, 1),), rails=(0,), sinks=(1,)), "hop from 0 to 1"),
        (replaced("trees", hops=((-1, 1), (-1, 1)), rails=(0, 0), sinks=(1,)), "hop from -1 to 1"),
        (replaced("trees", hops=((-1, 4),), rails=(0,), sinks=(4,)), "to 4 of 4"),
        (replaced("trees", rails=()), "but rails of 0"),
        (replaced("classes", members=(99,)), "tensor 99 of"),
        (msgspec.structs.replace(PLAN, bucket_bytes=0), "bucket_bytes is 0"),
        (msgspec.structs.replace(PLAN, scale_groups=()), "scale group 0 of 0"),
        (msgspec.structs.replace(PLAN, names=PLAN.names[:1]), "tensor"),
    ],
)
def test_a_plan_that_points_outside_itself_is_refused(plan, words):
    with pytest.raises(WireError, match=words):
        decode_plan(encode_plan(plan))


UNIT = PLAN.classes[0].units[0]
PART = PLAN.classes[0].parts[0]


def with_unit(**fields):
    """The plan with fields replaced of its first unit."""
    return replaced("classes", units=(msgspec.structs.replace(UNIT, **fields), *PLAN.classes[0].units[1:]))


def with_entry(**fields):
    entries = PLAN.flows[0].entries
    return replaced("flows", entries=(msgspec.structs.replace(entries[0], **fields), *entries[1:]))


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (msgspec.structs.replace(PLAN, num_sinks=10**12), "num_sinks is 1000000000000, allowed are 1 to"),
        (msgspec.structs.replace(PLAN, num_sources=10**12), "num_sources is 1000000000000, allowed are 1 to"),
        (msgspec.structs.replace(PLAN, bucket_bytes=1 << 62), f"bucket_bytes is {1 << 62}, allowed are"),
        (msgspec.structs.replace(PLAN, bucket_bytes=-256), "bucket_bytes is -256, allowed are"),
        (msgspec.structs.replace(PLAN, needed_bytes=-1), "needed_bytes is -1"),
        (msgspec.structs.replace(PLAN, amax_elements=-5), "amax_elements is -5"),
        (msgspec.structs.replace(PLAN, amax_elements=0), "of 0|allowed are 0 to 0"),
        (msgspec.structs.replace(PLAN, time_s=float("nan")), "time_s is nan"),
        (msgspec.structs.replace(PLAN, fill_s=-1.0), "fill_s is -1.0"),
        (msgspec.structs.replace(PLAN, amax_s=float("inf")), "amax_s is inf"),
        (replaced("bounds", seconds=float("nan")), "bound .* is nan"),
        (with_unit(nbytes=-1), "unit has -1 bytes"),
        (with_unit(nbytes=UNIT.nbytes + 1), f"unit has {UNIT.nbytes + 1} bytes, .* has {UNIT.nbytes}"),
        (with_unit(wire_bytes=-5), "wire_bytes of a unit is -5"),
        (with_unit(wire_bytes=UNIT.nbytes + 1), f"allowed are 0 to {UNIT.nbytes}"),
        (with_unit(step=(0, 0)), r"steps of \(0, 0\)"),
        (with_unit(step=(1 << 20, 1)), r"that fit into a bucket of 65536"),
        (with_unit(mode=9), "mode 9, allowed are 0, 1 and 2"),
        (with_unit(box=Box((0, 0), (10**9, 10**9))), r"shape \(1000000000, 1000000000\) in a part"),
        (with_unit(box=Box((0,), (1,))), r"offset \(0,\)"),
        (with_unit(box=Box((-1, 0), UNIT.box.shape)), r"offset \(-1, 0\)"),
        (with_unit(part=3), "part 3 of"),
        (replaced("classes", parts=()), "0 parts"),
        (replaced("classes", recipe="fp3"), "recipe 'fp3'"),
        (replaced("classes", parts=(msgspec.structs.replace(PART, dtype="fp3"),)), "dtype 'fp3'"),
        (replaced("classes", parts=(msgspec.structs.replace(PART, shape=(-1,)),)), r"shape \(-1,\)"),
        (replaced("classes", parts=(msgspec.structs.replace(PART, shape=(1 << 40, 1 << 40)),)), "allowed are 46116"),
        (replaced("classes", grid_elements=1 << 40), f"grid_elements is {1 << 40}"),
        (replaced("classes", amax_first=-1), "amax_first of a class is -1"),
        (replaced("classes", amax=((0, 0, Box((1 << 40, 0), (1, 1))),)), "box at offset"),
        (replaced("classes", amax=((7, 0, UNIT.box),)), "trainer rank 7 of 2"),
        (replaced("flows", nbytes=-1), "flow has -1 bytes, its entries have"),
        (replaced("flows", delta_bytes=-7), "delta_bytes of a flow is -7"),
        (replaced("flows", entries=()), "0 entries"),
        (replaced("flows", first_bucket=-3), "begins at bucket -3"),
        (replaced("trees", rails=tuple(-2 for _ in PLAN.trees[0].rails)), "rail of a hop is -2"),
        (with_entry(shard_idx=-1), "shard of an entry is -1"),
    ],
)
def test_a_plan_of_sizes_that_cannot_be_is_refused(plan, words):
    with pytest.raises(WireError, match=words):
        decode_plan(encode_plan(plan))


def test_numbers_of_buckets_end_where_tags_do():
    last = PLAN.flows[-1]
    flows = (*PLAN.flows[:-1], msgspec.structs.replace(last, first_bucket=MAX_BUCKETS - 3))
    with pytest.raises(WireError, match=f"allowed are 0 to {MAX_BUCKETS - 1}"):
        decode_plan(encode_plan(msgspec.structs.replace(PLAN, flows=flows)))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bucket_bytes": 0}, "bucket_bytes is 0"),
        ({"bucket_bytes": -256}, "bucket_bytes is -256"),
        ({"classes": ()}, r"class \d+ of 0"),
        ({"trees": ()}, "tree 0 of 0"),
        ({"tensors": ()}, "0 tensors, but"),
        ({"names": Names(b"", ())}, "but 0 names"),
        ({"scale_groups": ()}, "scale group 0 of 0"),
        ({"index": -4}, "index of a slice is -4"),
        ({"index": 9}, "slice for .* 9 has a"),
        ({"amax_elements": -1}, "amax_elements is -1"),
    ],
)
@pytest.mark.parametrize("side", ["source", "sink"])
def test_a_slice_that_points_outside_itself_is_refused(side, fields, words):
    compact, expand = {"source": (compact_source, expand_source), "sink": (compact_sink, expand_sink)}[side]
    wrong = msgspec.structs.replace(compact(PLAN, 0), **fields)
    with pytest.raises(WireError, match=words):
        expand(decode(encode(wrong), CompactSlice))


def test_a_slice_whose_tensors_are_out_of_order_is_refused():
    compact = compact_sink(PLAN, 0)
    with pytest.raises(WireError, match="allowed is ascending order"):
        expand_sink(msgspec.structs.replace(compact, tensors=compact.tensors[::-1]))


def test_any_flipped_byte_of_a_slice_is_refused_or_expands():
    rng = random.Random(2)
    for side in (0, 1):
        data = encode(compact_sink(PLAN, 0) if side else compact_source(PLAN, 0))
        for _ in range(300):
            at = rng.randrange(len(data))
            wrong = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
            with contextlib.suppress(WireError):
                (expand_sink if side else expand_source)(decode(wrong, CompactSlice))


def test_any_flipped_byte_is_refused_or_changes_the_digest():
    rng, digest, read = random.Random(1), plan_digest(PLAN), 0
    for _ in range(300):
        at = rng.randrange(len(DATA))
        wrong = DATA[:at] + bytes([DATA[at] ^ 1 << rng.randrange(8)]) + DATA[at + 1 :]
        try:
            plan = decode_plan(wrong)
        except (WireError, FormatVersionError):
            continue
        read += 1
        assert plan_digest(plan) != digest
    assert read  # names, for one, can be anything


def test_a_slice_is_for_one_side():
    with pytest.raises(WireError, match=r"slice for a source was expected, one for a sink came"):
        expand_source(compact_sink(PLAN, 0))
    with pytest.raises(WireError, match=r"slice for a sink was expected, one for a source came"):
        expand_sink(compact_source(PLAN, 0))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab.é", max_size=12) | st.text("x", min_size=250, max_size=600), max_size=20))
def test_names_come_back(names):
    packed = pack_names(names)
    assert unpack_names(packed) == names
    assert sum(map(len, packed.rest)) <= sum(map(len, names))


def test_names_that_do_not_fit_together_are_refused():
    with pytest.raises(WireError, match="2 shared lengths came with 1 names"):
        unpack_names(Names(b"\0\0", ("a",)))
    with pytest.raises(WireError, match=r"shares 2 characters with 'a', which has 1"):
        unpack_names(Names(b"\0\2", ("a", "b")))


def test_names_of_experts_cost_a_few_bytes_each():
    names = [f"model.layers.{i}.mlp.experts.{e}.down_proj.weight" for i in range(61) for e in range(128)]
    packed = pack_names(names)
    assert len(packed.shared) + sum(map(len, packed.rest)) < 25 * len(names)
    by_layer = sorted(names, key=lambda n: n.split(".experts.")[0])
    assert unpack_names(pack_names(by_layer)) == by_layer
