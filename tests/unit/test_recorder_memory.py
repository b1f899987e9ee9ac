"""The recorder on loaders that read memory again: live tensors, and scratch memory that is used twice."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorder_checks import check, param, raw

from wsync.adapters.engines import record_loader
from wsync.errors import MissingTensorError, RecordError
from wsync.spec.manifest import TensorSpec

TWO = {"a": (4, 8), "b": (4, 8)}
ONE = {"a": (4, 8)}


def table(shapes):
    return [TensorSpec(n, s, "bfloat16") for n, s in shapes.items()]


def loaded(params, weights):
    for name, t in weights:
        params[name].data.copy_(t)


# What live memory holds while the loader runs.


def read_modify_write(p, weights):
    for name, t in weights:
        full, first = p["p"].data.clone(), {"a": 0, "b": 4}[name]
        full[first : first + 4] = t
        p["p"].data.copy_(full)


def tied_by_copy(p, weights):
    loaded(p, weights)
    p["q"].data.copy_(p["a"].data)


def duplicated_heads(p, weights):
    for _, t in weights:
        p["p"].data[:4].copy_(t)
    p["p"].data[4:] = p["p"].data[:4]


def permuted_in_place(p, weights):
    loaded(p, weights)
    p["a"].data.copy_(p["a"].data.view(2, 2, 8).transpose(0, 1).reshape(4, 8))


def swapped(p, weights):
    loaded(p, weights)
    kept = p["a"].data.clone()
    p["a"].data.copy_(p["b"].data)
    p["b"].data.copy_(kept)


def copied_to_itself(p, weights):
    loaded(p, weights)
    p["a"].data.copy_(p["a"].data.contiguous())


def through_float_and_scratch(p, weights):
    loaded(p, weights)
    scratch = torch.zeros(4, 8)
    scratch[:2] = p["a"].data[2:].float()
    p["q"].data.copy_(scratch.bfloat16())


@pytest.mark.parametrize(
    ("load", "shapes", "live"),
    [
        (read_modify_write, TWO, {"p": (8, 8)}),
        (tied_by_copy, ONE, {"a": (4, 8), "q": (4, 8)}),
        (duplicated_heads, ONE, {"p": (8, 8)}),
        (permuted_in_place, ONE, {"a": (4, 8)}),
        (swapped, TWO, TWO),
        (copied_to_itself, ONE, {"a": (4, 8)}),
        (through_float_and_scratch, ONE, {"a": (4, 8), "q": (4, 8)}),
    ],
)
def test_live_memory_that_is_read_again_holds_what_was_loaded_into_it(load, shapes, live):
    params = {n: param(*s) for n, s in live.items()}
    recording = check(lambda weights: load(params, weights), shapes, params)
    assert recording.coverage.complete
    assert recording.coverage.covered == recording.coverage.total or load is through_float_and_scratch


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda p: p["q"].data.copy_(p["a"].data * 2), r"aten.mul.* computed from 'a'.*\(into the engine's 'q'\)"),
        (lambda p: p["q"].data.copy_((p["a"].data.t().contiguous() * 2).t()), "aten.mul.* computed from 'a'"),
        (lambda p: p["q"].data.copy_(torch.zeros(4, 8).bfloat16().add_(p["a"].data)), "aten.add_.* computed from 'a'"),
        (lambda p: p["q"].data.copy_(torch.add(p["a"].data, 1, out=torch.empty(4, 8).bfloat16())), "aten.add.out"),
        (lambda p: p["q"].data.copy_(p["a"].data.view(torch.uint8).clone().view(torch.bfloat16)), "into the engine's"),
        (lambda p: p["a"].data.copy_(p["q"].data), "copies the engine's 'q' into its 'a', but the checkpoint has not"),
        (lambda p: p["q"].data.copy_(p["q"].data.flip(0)), "copies the engine's 'q' into its 'q', but the checkpoint"),
        (lambda p: p["q"].data.copy_(p["q"].data.cumsum(0)), "aten.cumsum.* computed from 'q'"),
        (lambda p: p["q"].data.zero_() if (p["a"].data != 0).any() else None, r"reads the value of 'a' with item\(\)"),
        (lambda p: p["q"].data.fill_(p["a"].data[0, 0].item() * 2), "__mul__"),
        (lambda p: p["a"].data.view(torch.int16).numpy(), r"uses numpy\(\) on 'a'"),
        (lambda p: torch.equal(p["a"].data, p["q"].data), "needs its values"),
    ],
)
def test_values_that_depend_on_live_memory_otherwise_are_refused_by_name(act, words):
    params = {"a": param(4, 8), "q": param(4, 8)}

    def load(weights):
        loaded(params, weights)
        act(params)

    with pytest.raises(RecordError, match=words):
        record_loader(load, table(ONE), params, None)
    assert all(bool((p == 7).all()) for p in params.values())


def test_live_bytes_that_are_put_back_do_not_count_as_loaded():
    params = {"a": param(4, 8)}

    def load(weights):
        before = params["a"].data.clone()
        loaded(params, weights)
        params["a"].data.copy_(before)

    with pytest.raises(MissingTensorError, match="fills 0 of the 32 elements of the engine's 'a'"):
        record_loader(load, table(ONE), params, None)


def test_views_shapes_and_new_tensors_like_a_live_one_may_be_used():
    params = {"a": param(4, 8), "q": param(4, 8), "c": param(4, 8)}

    def load(weights):
        for name, t in weights:
            left, right = params[name].data.split(4, dim=1)
            left.copy_(t[:, :4])
            for row, source in zip(right.unbind(0), t[:, 4:].unbind(0), strict=True):
                row.copy_(source)
        assert params["a"].data.is_contiguous()
        params["q"].data.copy_(torch.zeros_like(params["a"].data))
        new = params["a"].data.new_empty(4, 8)
        new.copy_(params["a"].data.expand_as(new))
        params["c"].data.copy_(new)

    recording = check(load, ONE, params)
    assert (recording.coverage.covered, recording.coverage.constant) == (64, 32)


# Memory of the loader that is used again.


def staging(p, weights, allocate):
    buffer, waiting = None, {}
    for name, t in weights:
        buffer = allocate(t) if buffer is None else buffer
        buffer.copy_(t)
        waiting[name] = buffer.clone()
    for name, t in waiting.items():
        p[name].data.copy_(t)


def halves_swapped(p, weights):
    for name, t in weights:
        w = t.clone()
        first = w[:2].clone()
        w[:2], w[2:] = w[2:], first
        p[name].data.copy_(w)


def shifted(p, weights):
    for name, t in weights:
        w = t.clone()
        w[1:] = w[:-1].clone()
        p[name].data.copy_(w)


def computed_later(p, weights):
    for name, t in weights:
        w = t.clone()
        before = w.clone()
        w.mul_(2)
        p[name].data.copy_(before)
        w.copy_(t)
        p[name].data.copy_(w)


@pytest.mark.parametrize(
    "load",
    [
        lambda p, ws: staging(p, ws, lambda t: torch.empty(4, 8, dtype=torch.bfloat16)),
        lambda p, ws: staging(p, ws, torch.empty_like),
        lambda p, ws: staging(p, ws, lambda t: torch.zeros(4, 8)),
        halves_swapped,
        shifted,
        computed_later,
    ],
)
def test_memory_that_is_used_again_keeps_what_was_copied_out_of_it_before(load):
    params = {n: param(*s) for n, s in TWO.items()}
    recording = check(lambda weights: load(params, weights), TWO, params)
    assert recording.coverage.covered == 64


def zeroed_on_other_ranks(p, weights):
    for name, t in weights:
        if name == "b":
            t.zero_()
        p[name].data.copy_(t)


def padded_in_place(p, weights):
    for name, t in weights:
        before = t[1:].clone()
        t[:1].fill_(3)
        t[2:, 4:] = t[:2, :4]
        p[name].data.copy_(t.t().contiguous().t())
        t[:3].copy_(before)
        p[name].data[3:].copy_(t[:1])


def computed_elsewhere(p, weights):
    for name, t in weights:
        before = t[2:].clone()
        t[2:].mul_(2)
        p[name].data[:2].copy_(t[:2])
        p[name].data[2:].copy_(before)


@pytest.mark.parametrize("load", [zeroed_on_other_ranks, padded_in_place, computed_elsewhere])
def test_a_loader_may_write_into_the_checkpoints_own_tensors(load):
    params = {n: param(*s) for n, s in TWO.items()}
    recording = check(lambda weights: load(params, weights), TWO, params)
    assert recording.coverage.complete
    assert recording.needs_verification or load is computed_elsewhere


def test_a_long_chain_of_copies_is_followed():
    params = {"p": param(600, 2)}

    def load(weights):
        grown = torch.zeros(0, 2, dtype=torch.bfloat16)
        for _, t in weights:
            grown = torch.cat([grown, t])
        params["p"].data.copy_(grown)

    recording = record_loader(load, [TensorSpec(str(i), (1, 2), "bfloat16") for i in range(600)], params, None)
    assert sorted(c.dst_offset for c in recording.copies) == [2 * i for i in range(600)]


def test_a_group_of_copies_may_overwrite_scratch_memory_with_plain_values():
    params = {"a": param(4, 8)}

    def load(weights):
        scratch = torch.zeros(4, 8, dtype=torch.bfloat16)
        for _, t in weights:
            scratch.copy_(t)
            torch._foreach_copy_([scratch[:1], torch.zeros(1)], [torch.ones(1, 8, dtype=torch.bfloat16), torch.ones(1)])
            params["a"].data.copy_(scratch)

    recording = check(load, ONE, params)
    assert (recording.coverage.covered, recording.coverage.constant) == (24, 8)


def test_scratch_memory_that_was_never_written_is_refused():
    params = {"p": param(8, 8)}

    def load(weights):
        scratch = torch.empty(8, 8, dtype=torch.bfloat16)
        for _, t in weights:
            scratch[:4] = t
        params["p"].data.copy_(scratch)

    with pytest.raises(RecordError, match="memory that it never wrote: 32 elements at \\(4, 0\\)"):
        record_loader(load, table(ONE), params, None)
    with pytest.raises(RecordError, match="memory that it never wrote"):
        record_loader(lambda ws: params["p"].data.copy_(torch.empty(8, 8)), table(ONE), params, None)


def test_scratch_memory_in_another_element_size_is_refused():
    params = {"a": param(4, 8)}

    def load(weights):
        scratch = torch.zeros(4, 8, dtype=torch.bfloat16)
        for _, t in weights:
            scratch.copy_(t)
            scratch.view(torch.uint8)[:, :4].copy_(torch.ones(4, 4, dtype=torch.uint8))
            params["a"].data.copy_(scratch)

    with pytest.raises(RecordError, match="cannot be followed"):
        record_loader(load, table(ONE), params, None)


def test_constants_written_through_a_view_of_their_bits_keep_their_bits():
    params = {"a": param(4, 8)}

    def load(weights):
        scratch = torch.zeros(4, 8, dtype=torch.int16)
        for _, t in weights:
            scratch[:2] = t.view(torch.int16)[:2]
        scratch[2] = 5
        params["a"].data.view(torch.int16).copy_(scratch)

    check(load, ONE, params)


SLICES = [slice(0, 4), slice(0, 2), slice(2, 4), slice(1, 3), slice(0, 4, 2), slice(1, 4, 2)]


@given(
    st.lists(
        st.tuples(st.sampled_from(["copy", "clone", "fill"]), *[st.integers(0, 6)] * 2, *[st.integers(0, 5)] * 2),
        max_size=14,
    )
)
@settings(max_examples=300, deadline=None)
def test_any_program_of_copies_is_recorded_as_it_runs_or_refused(program):
    params = {"p": param(4, 3), "q": param(4, 3)}

    def load(weights):
        tensors = [t for _, t in weights]
        places = [params["p"].data, params["q"].data, torch.zeros(4, 3, dtype=torch.bfloat16), tensors[0].clone()]
        places.append(torch.full((4, 3), 3.0))
        for kind, i, j, k, m in program:
            dst = places[i % len(places)][SLICES[k]]
            src = ([*tensors, *places])[j % (len(places) + 2)]
            # Torch refuses some copies within one memory.
            src = src.clone() if j % (len(places) + 2) - 2 == i % len(places) else src
            if kind == "clone":
                places[2 + i % 3] = src.clone()
            elif kind == "fill":
                dst.fill_(j)
            elif dst.shape[0] == 4:
                dst.copy_(src)
            else:
                dst.copy_(src[SLICES[m]] if src[SLICES[m]].shape == dst.shape else src[2:3])
        params["p"].data.copy_(places[3])

    try:
        recording = check(load, {"a": (4, 3), "b": (4, 3)}, params, allow_missing=["q"])
    except (RecordError, MissingTensorError):
        return
    after = [raw(recording.storage_view(i)).clone() for i in range(len(recording.storages))]
    recording.write_constants()
    for i, expected in enumerate(after):
        np.testing.assert_array_equal(raw(recording.storage_view(i)).numpy(), expected.numpy())
