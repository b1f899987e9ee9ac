"""Plans and slices as bytes: strict, versioned, and small."""

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsync.errors import FormatVersionError, WireError
from wsync.plan import (
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
from wsync.spec.serde import FORMAT_VERSION
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
