"""The recorder on loaders of every kind: what it records replays to what the loader does, and nothing live changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorder_checks import check, param
from torch import nn

from wsync.adapters.engines import record_loader, verify_recording
from wsync.errors import (
    DtypeMismatchError,
    MissingTensorError,
    RecipeError,
    RecordError,
    ShapeMismatchError,
    StateError,
)
from wsync.spec.manifest import RankInfo, TensorSpec


def into(p, change=lambda t: t):
    def load(weights):
        for _, t in weights:
            p.data.copy_(change(t))

    return load


@pytest.mark.parametrize(
    ("shape", "change", "num_copies"),
    [
        ((6, 4), lambda t: t, 1),
        ((4, 6), lambda t: t.t(), 1),
        ((4, 6), lambda t: t.t().contiguous(), 1),
        ((4, 6), lambda t: t.t().contiguous().clone().to(torch.bfloat16), 1),
        ((24,), lambda t: t.view(6, 4), 1),
        ((12, 4), lambda t: t.chunk(2)[1], 1),
        ((12, 4), lambda t: t.view(6, 2, 4)[:, 1], 6),
        ((12, 4), lambda t: t[::2], 6),
        ((6, 8), lambda t: t.split([3, 4, 1], dim=1)[1], 1),
        ((2, 3, 4), lambda t: t.reshape(6, 4), 1),
        ((3, 2, 4), lambda t: t.transpose(0, 1).reshape(6, 4), 1),
        ((3, 2, 4), lambda t: t.permute(1, 0, 2).contiguous().view(-1)[:24].view(6, 4), 1),
        ((6, 5), lambda t: torch.cat([t[:, :1], t[:, 2:]], dim=1), 2),
        ((4, 6), lambda t: torch.stack(list(t.unbind(0)), dim=1), 1),
        ((6, 4), lambda t: torch.cat([t[i : i + 1] for i in range(6)]), 1),
        ((2, 4), lambda t: t.repeat(3, 1), 3),
        ((2, 4), lambda t: t.repeat_interleave(3, dim=0), 3),
        ((4,), lambda t: t.expand(6, 4), 6),
        ((4,), lambda t: t, 6),
        ((5, 4), lambda t: torch.nn.functional.pad(t, (0, 0, 0, 1)), 1),
        ((6, 4), lambda t: t.to(torch.float32).to(torch.bfloat16), 1),
        ((6, 4), lambda t: t.view(torch.int16).t().contiguous().t().view(torch.bfloat16), 1),
        ((6, 4), lambda t: t.new_empty(6, 4).copy_(t), 1),
        ((6, 4), lambda t: torch.empty(6, 4, dtype=torch.bfloat16).copy_(t), 1),
        ((6, 4), lambda t: torch.zeros_like(t).copy_(t).cpu().detach(), 1),
        ((6, 4), lambda t: nn.Parameter(t, requires_grad=False), 1),
    ],
)
def test_a_loader_that_only_moves_values_is_recorded(shape, change, num_copies):
    p = param(6, 4)
    recording = check(into(p, change), {"w": shape}, {"p": p})
    assert len(recording.copies) == num_copies
    assert recording.coverage.complete


MOVES = [
    lambda t, k: t.transpose(0, -1),
    lambda t, k: t.contiguous(),
    lambda t, k: t.reshape(-1),
    lambda t, k: t.reshape(2, -1) if t.numel() % 2 == 0 else t,
    lambda t, k: t.reshape(-1, 3) if t.numel() % 3 == 0 else t,
    lambda t, k: t.narrow(0, k % t.shape[0], 1 + (t.shape[0] - 1 - k % t.shape[0]) // 2),
    lambda t, k: t.select(0, k % t.shape[0]) if t.dim() > 1 else t,
    lambda t, k: t.unsqueeze(0),
    lambda t, k: t[..., k % 2 :: 2] if t.shape[-1] > 1 else t,
    lambda t, k: t.flatten(),
    lambda t, k: torch.cat([t, t]) if t.numel() < 200 else t,
    lambda t, k: torch.stack([t, t], dim=-1) if t.numel() < 200 else t,
    lambda t, k: torch.cat([t.chunk(2)[-1], t.chunk(2)[0]]),
    lambda t, k: t.movedim(0, -1),
    lambda t, k: t.clone(),
    lambda t, k: t.squeeze(),
    lambda t, k: t.reshape(t.shape).t() if t.dim() == 2 else t,
]


@given(
    st.sampled_from([(6, 4), (12,), (2, 3, 4), (3, 5), (2, 2, 3, 2)]),
    st.lists(st.tuples(st.integers(0, len(MOVES) - 1), st.integers(0, 7)), max_size=6),
)
@settings(max_examples=120, deadline=None)
def test_any_chain_of_moves_is_recorded_as_the_loader_does_it(shape, chain):
    def change(t):
        for move, k in chain:
            if t.dim():
                t = MOVES[move](t, k)
        return t

    p = param(*change(torch.zeros(shape)).shape)
    check(into(p, change), {"w": shape}, {"p": p})


def test_a_fused_and_stacked_layout_is_recorded_piece_by_piece():
    qkv, experts = param(8, 3), param(2, 4, 3)

    def load(weights):
        for name, t in weights:
            if name in "qkv":
                first, count = {"q": (0, 4), "k": (4, 2), "v": (6, 2)}[name]
                qkv.data.narrow(0, first, count).copy_(t.narrow(0, count, count))
            elif name.startswith("e"):
                # Gate and up interleaved row by row in the engine.
                experts.data[int(name[1])].view(2, 2, 3)[:, int(name[3])].copy_(t)

    shapes = {"q": (8, 3), "k": (4, 3), "v": (4, 3), **{f"e{e}.{h}": (2, 3) for e in range(2) for h in range(2)}}
    recording = check(load, shapes, {"qkv": qkv, "experts": experts})
    assert len(recording.copies) == 7
    assert [c.dst_offset for c in recording.copies[:3]] == [0, 12, 18]


def test_writing_by_index_and_in_groups_is_recorded():
    a, b, c = param(4, 3), param(4, 3), param(2, 3)

    def load(weights):
        tensors = dict(weights)
        a.data[...] = tensors["a"]
        torch._foreach_copy_([b.data], [tensors["b"]])
        c.data[0], c.data[1:] = tensors["c"][1], tensors["c"][:1]

    check(load, {"a": (4, 3), "b": (4, 3), "c": (2, 3)}, {"a": a, "b": b, "c": c})


def test_gathered_pieces_may_wait_in_scratch_memory():
    p = param(6, 4)

    def load(weights):
        scratch = torch.zeros(6, 4, dtype=torch.bfloat16)
        for name, t in weights:
            scratch.view(3, 2, 4)[:, int(name)].copy_(t)
        scratch[0] = scratch[5]
        p.data.copy_(scratch)

    check(load, {"0": (3, 4), "1": (3, 4)}, {"p": p})


def test_scales_of_block_quantised_weights_are_recorded_with_their_weights():
    w, s = param(256, 384, dtype=torch.float8_e4m3fn), param(2, 3, dtype=torch.float32)

    def load(weights):
        for name, t in weights:
            if name == "w":
                w.data.copy_(t[256:])
            elif name == "w_scale_inv":
                s.data.copy_(t[2:])

    recording = record_loader(load, [TensorSpec("w", (512, 384), "float32")], {"w": w, "s": s}, {"w": "fp8_block128"})
    assert [(c.role, c.box.offset, c.box.shape) for c in recording.copies] == [
        ("weight", (256, 0), (256, 384)),
        ("scale", (2, 0), (2, 3)),
    ]
    assert recording.recipes == {"w": "fp8_block128"}


def test_fp8_may_be_copied_through_a_view_of_its_bits():
    w, s = param(4, 4, dtype=torch.float8_e4m3fn), param(1, 1, dtype=torch.float32)

    def load(weights):
        for name, t in weights:
            if name == "w":
                w.data.view(torch.uint8).copy_(t.view(torch.uint8))
            else:
                s.data.copy_(t)

    check(load, {"w": (4, 4)}, {"w": w, "s": s}, {"w": "fp8_block128"})


def test_f32_masters_arrive_rounded_in_bf16_memory_and_raw_in_f32_memory():
    rounded, exact, ids = param(3), param(3, dtype=torch.float32), param(2, dtype=torch.int64)
    params = {"rounded": rounded, "exact": exact, "ids": ids}
    recording = check(
        lambda weights: [params[n].data.copy_(t) for n, t in weights],
        {"rounded": ((3,), "float32"), "exact": ((3,), "float32"), "ids": ((2,), "int64")},
        params,
    )
    assert recording.recipes == {"rounded": "bf16", "exact": "raw", "ids": "raw"}


def test_a_conversion_that_no_recipe_makes_is_refused_with_both_dtypes():
    p = param(3)
    with pytest.raises(DtypeMismatchError, match=r"'w' is float16 .* but the engine's 'p' is bfloat16"):
        record_loader(into(p), [TensorSpec("w", (3,), "float16")], {"p": p}, None)
    half = param(3, dtype=torch.float16)
    with pytest.raises(DtypeMismatchError, match=r"'w' is bfloat16 .* but the engine's 'p' is float16"):
        record_loader(into(half), [TensorSpec("w", (3,), "float32")], {"p": half}, None)
    lossy = param(3)
    with pytest.raises(DtypeMismatchError):
        record_loader(
            into(lossy, lambda t: t.half().bfloat16()), [TensorSpec("w", (3,), "bfloat16")], {"p": lossy}, None
        )
    both = {"a": param(3), "b": param(3, dtype=torch.float32)}
    with pytest.raises(DtypeMismatchError, match="a tensor has one recipe"):
        record_loader(
            lambda weights: [p.data.copy_(t) for _, t in weights for p in both.values()],
            [TensorSpec("w", (3,), "float32")],
            both,
            None,
        )


@pytest.mark.parametrize(
    ("change", "operation"),
    [
        (lambda t: t * 2, "aten.mul"),
        (lambda t: t.float().add(1).bfloat16(), "aten.add"),
        (lambda t: t.clone().mul_(2), "aten.mul_"),
        (lambda t: (t + 1).t().t().contiguous(), "aten.add"),
        (lambda t: t.sort(0).values, "aten.sort"),
        (lambda t: torch.cat([t[:1], t[1:] * 2]), "aten.mul"),
        (lambda t: torch.zeros(6, 4, dtype=torch.bfloat16).add_(t), "aten.add_"),
    ],
)
def test_a_loader_that_computes_is_refused_by_operation_and_tensor(change, operation):
    p = param(6, 4)
    with pytest.raises(RecordError, match=rf"{operation}.* computed from 'model.w'.*'layers.p'"):
        record_loader(into(p, change), [TensorSpec("model.w", (6, 4), "bfloat16")], {"layers.p": p}, None)
    assert bool((p == 7).all())


def test_what_is_computed_and_never_lands_is_allowed():
    p = param(6, 4)

    def load(weights):
        for _, t in weights:
            _ = (t.float() * 2).sum()
            p.data.copy_(t)

    check(load, {"w": (6, 4)}, {"p": p})


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda p, t: p.data.mul_(2), "changes the engine's 'p' in place with aten.mul_"),
        (lambda p, t: p.data.normal_(), "changes the engine's 'p' in place with aten.normal_"),
        (lambda p, t: p.data.add_(t), "changes the engine's 'p' in place with aten.add_"),
        (
            lambda p, t: p.data.index_add_(0, torch.arange(6), t),
            "changes the engine's 'p' in place with aten.index_add_",
        ),
        (lambda p, t: p.data.copy_(t) if t.sum() > 0 else None, "reads the value|needs its values|is_nonzero"),
        (lambda p, t: p.data.copy_(t) if float(t[0, 0]) > 0 else None, r"reads the value of 'w' with item\(\)"),
        (lambda p, t: t.numpy(), r"uses numpy\(\) on 'w'"),
        (lambda p, t: p.data.copy_(torch.empty_like(t)), "memory that it never wrote"),
        (lambda p, t: p.data.copy_(t.mul_(2)), "aten.mul_.* computed from 'w'"),
        (lambda p, t: p.data.copy_(t.t_().t()), "changes 'w' with aten.t_"),
        (lambda p, t: p.data.copy_(t.nonzero()), "needs its values|failed"),
        (lambda p, t: {}["missing"], "failed at or before 'w': KeyError"),
    ],
)
def test_what_cannot_be_recorded_is_refused_and_nothing_live_changes(act, words):
    p = param(6, 4)
    with pytest.raises(RecordError, match=words):
        record_loader(lambda ws: [act(p, t) for _, t in ws], [TensorSpec("w", (6, 4), "bfloat16")], {"p": p}, None)
    assert bool((p == 7).all())


def test_a_wrong_shape_is_refused_with_both_shapes():
    p = param(6, 4)
    with pytest.raises(ShapeMismatchError, match=r"'w' of shape \(6, 5\) into the engine's 'p' of shape \(6, 4\)"):
        record_loader(into(p), [TensorSpec("w", (6, 5), "bfloat16")], {"p": p}, None)


def test_a_scalar_may_be_filled_in_by_value():
    p, q = param(1), param()

    def load(weights):
        for name, t in weights:
            (p if name == "p" else q).data.fill_(t.item())

    check(load, {"p": (1,), "q": ()}, {"p": p, "q": q})


def test_padding_is_a_constant_that_is_reported_and_not_written():
    p = param(8, 2)

    def load(weights):
        for _, t in weights:
            p.data[:5].copy_(t)
            p.data[5:].zero_()

    recording = record_loader(load, [TensorSpec("w", (5, 2), "bfloat16")], {"p": p}, None)
    (covered,) = recording.coverage.storages
    assert (covered.covered, covered.constant, covered.total, covered.complete) == (10, 6, 16, True)
    assert bool((p == 7).all())
    verify_recording(recording, load, [TensorSpec("w", (5, 2), "bfloat16")])
    recording.write_constants()
    assert bool((p[:5] == 7).all())
    assert bool((p[5:] == 0).all())


def test_zeroing_before_copying_leaves_only_the_padding_constant():
    p = param(8, 2)

    def load(weights):
        p.data.zero_()
        for _, t in weights:
            p.data[:5].copy_(t)

    recording = record_loader(load, [TensorSpec("w", (5, 2), "bfloat16")], {"p": p}, None)
    assert (recording.coverage.covered, recording.coverage.constant) == (10, 6)
    verify_recording(recording, load, [TensorSpec("w", (5, 2), "bfloat16")])


def test_the_last_write_wins_and_of_a_partly_overwritten_copy_the_rest_is_left():
    p = param(4, 2)
    table = [TensorSpec("a", (4, 2), "bfloat16"), TensorSpec("b", (4, 2), "bfloat16")]
    recording = record_loader(into(p), table, {"p": p}, None)
    assert [c.tensor for c in recording.copies] == ["b"]

    def half(weights):
        for name, t in weights:
            (p.data if name == "a" else p.data[:2]).copy_(t if name == "a" else t[:2])

    recording = check(half, {"a": (4, 2), "b": (4, 2)}, {"p": p})
    assert sorted((c.tensor, c.box.offset, c.box.shape) for c in recording.copies) == [
        ("a", (2, 0), (2, 2)),
        ("b", (0, 0), (2, 2)),
    ]


def test_tied_parameters_are_recorded_once_and_the_ignored_tensor_is_reported():
    embed = param(4, 2)

    def load(weights):
        for name, t in weights:
            if name == "embed":
                embed.data.copy_(t)

    table = [TensorSpec("embed", (4, 2), "bfloat16"), TensorSpec("head", (4, 2), "bfloat16", alias_of="embed")]
    recording = record_loader(load, table, {"embed": embed, "head": embed}, None)
    assert len(recording.copies) == len(recording.storages) == 1
    assert recording.coverage.storages[0].names == ("embed", "head")
    assert recording.coverage.unused == ("head",)
    assert recording.recipes == {"embed": "bf16"}


def test_views_of_one_arena_are_one_storage_each_and_gaps_do_not_count():
    arena = torch.zeros(64, dtype=torch.bfloat16)
    params = {"a": arena[4:10].view(2, 3), "padded": arena.as_strided((3, 4), (8, 1), 16)}
    recording = check(lambda weights: [params[n].copy_(t) for n, t in weights], {"a": (2, 3), "padded": (3, 4)}, params)
    assert [(s.name, s.num_elements) for s in recording.storages] == [("a", 6), ("padded", 20)]
    assert recording.memory[0].address == arena.data_ptr() + 8
    assert recording.coverage.total == 18
    assert recording.coverage.complete


def test_a_parameter_that_is_not_filled_is_an_error_unless_it_is_allowed():
    p, extra, cache = param(4, 2), param(3), torch.zeros(5)
    params = {"p": p, "extra": extra, "inv_freq": cache}
    table = [TensorSpec("w", (4, 2), "bfloat16"), TensorSpec("unknown", (1,), "bfloat16")]

    def load(weights):
        for name, t in weights:
            if name == "w":
                p.data.copy_(t)

    with pytest.raises(MissingTensorError, match="fills 0 of the 3 elements of the engine's 'extra'"):
        record_loader(load, table, params, None)
    recording = record_loader(load, table, params, None, allow_missing=["extra"])
    assert recording.coverage.missing == ("extra",)
    assert recording.coverage.not_loaded == ("inv_freq",)
    assert recording.coverage.unused == ("unknown",)
    assert not recording.coverage.complete

    def half(weights):
        for name, t in weights:
            if name == "w":
                p.data[:2].copy_(t[:2])

    with pytest.raises(MissingTensorError, match="fills 4 of the 8 elements of the engine's 'p'"):
        record_loader(half, table, {"p": p}, None)


def test_a_live_tensor_that_moved_is_noticed_by_name():
    p = param(4, 2)
    recording = record_loader(into(p), [TensorSpec("w", (4, 2), "bfloat16")], {"p": p}, None)
    recording.check_addresses()
    p.data = torch.zeros(4, 2, dtype=torch.bfloat16)
    with pytest.raises(StateError, match="the engine's 'p' was at address"):
        recording.check_addresses()


def test_the_manifest_carries_the_recording():
    p = param(4, 2)
    recording = record_loader(into(p), [TensorSpec("w", (4, 2), "bfloat16")], {"p": p}, lambda spec: "bf16")
    manifest = recording.manifest("r", 1, 2, RankInfo("h", 3))
    assert (manifest.replica, manifest.rank, manifest.world_size, manifest.info) == ("r", 1, 2, RankInfo("h", 3))
    assert manifest.copies == recording.copies
    assert manifest.storages[0].num_elements == recording.memory[0].num_elements == 8
    assert recording.memory[0].address == p.data_ptr()
    with pytest.raises(RecipeError, match="'int3' is unknown"):
        record_loader(into(p), [TensorSpec("w", (4, 2), "bfloat16")], {"p": p}, {"w": "int3"})


def test_verification_notices_a_loader_that_decides_by_values():
    p = param(4, 2)
    calls = []

    def load(weights):
        for _, t in weights:
            calls.append(1)
            p.data.copy_(t if len(calls) == 1 else t.flip(0))

    table = [TensorSpec("w", (4, 2), "bfloat16")]
    recording = record_loader(load, table, {"p": p}, None)
    with pytest.raises(RecordError, match="leave different bytes in 'p'"):
        verify_recording(recording, load, table)
    assert bool((p == 7).all())
