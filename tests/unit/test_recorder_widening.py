"""Engines that hold weights in a wider dtype than the checkpoint: exact, through scratch memory, at the commit."""

import numpy as np
import pytest
import torch
from recorder_checks import check, executed, param, random_checkpoint, raw

from wsync.adapters.engines import record_loader, verify_recording, wanted_recipes
from wsync.adapters.engines.verify import coded_tensor, replay, replay_storage
from wsync.errors import DtypeMismatchError, MissingTensorError, RecordError, ShapeMismatchError
from wsync.session.laststep import LastSteps, Repack
from wsync.spec.manifest import RankInfo, TensorSpec


def by_name(params):
    def load(weights):
        for name, t in weights:
            params[name].data.copy_(t)

    return load


WIDE = [("bfloat16", "float32"), ("float16", "float32"), ("bfloat16", "float64"), ("float16", "float64")]


@pytest.mark.parametrize(("narrow", "wide"), [*WIDE, ("float32", "float64")])
def test_a_wider_live_tensor_is_filled_through_scratch_memory_of_the_checkpoints_dtype(narrow, wide):
    params = {"w": param(4, 6), "bias": param(6, dtype=getattr(torch, wide))}
    recording = check(by_name(params), {"w": (4, 6), "bias": ((6,), narrow)}, params)
    (one,) = recording.widened
    assert [s.dtype for s in recording.storages] == ["bfloat16", wide, narrow]
    assert (one.name, one.live_idx, one.scratch_idx, one.scratch.dtype) == ("bias", 1, 2, getattr(torch, narrow))
    assert [(c.tensor, c.storage_idx) for c in recording.copies] == [("w", 0), ("bias", 2)]
    assert recording.memory[2].address == one.scratch.data_ptr()
    assert recording.storage_view(2).data_ptr() == one.scratch.data_ptr()
    assert recording.manifest("r", 0, 1, RankInfo("h")).storages[2].num_elements == 6
    coverage = recording.coverage
    assert coverage.complete
    itemsize = params["bias"].element_size()
    assert (coverage.direct_bytes, coverage.widened_bytes) == (48, 6 * itemsize)
    assert (coverage.storages[1].direct_bytes, coverage.storages[1].widened_bytes) == (0, 6 * itemsize)


def install(recording, checkpoint):
    """What the transport does: every storage of the manifest gets its bytes; then the last steps."""
    for c in recording.copies:
        box = tuple(slice(o, o + n) for o, n in zip(c.box.offset, c.box.shape, strict=True))
        flat = recording.storage_view(c.storage_idx)
        flat.as_strided(c.box.shape, c.dst_strides, int(flat.storage_offset()) + c.dst_offset).copy_(
            checkpoint[c.tensor, c.role][box]
        )
    steps = recording.last_steps()
    for repack in steps.repacks:
        repack.prepare()
    return steps


def test_the_last_steps_widen_exactly_at_the_commit_and_not_before():
    params = {"w": param(4, 6), "bias": param(6, dtype=torch.float32), "wide": param(4, 3, dtype=torch.float32)}
    table = [TensorSpec("w", (4, 6), "bfloat16"), TensorSpec("bias", (6,), "bfloat16")]
    table.append(TensorSpec("wide", (4, 3), "float16"))
    recording = record_loader(by_name(params), table, params, None)
    checkpoint = random_checkpoint(table, recording.recipes)
    checkpoint["bias", "weight"][:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    steps = install(recording, checkpoint)
    assert bool((params["bias"] == 7).all())
    assert bool((params["wide"] == 7).all())
    for repack in steps.repacks:
        repack.commit()
    assert [r.name for r in steps.repacks] == ["bias", "wide"]
    assert [r.storages for r in steps.repacks] == [frozenset([3]), frozenset([4])]
    for name in params:
        assert torch.equal(raw(params[name]), raw(checkpoint[name, "weight"].to(params[name].dtype))), name


def test_an_engine_without_wider_tensors_has_no_last_steps():
    params = {"w": param(4, 6)}
    recording = record_loader(by_name(params), [TensorSpec("w", (4, 6), "bfloat16")], params, None)
    assert recording.widened == ()
    assert recording.last_steps() == LastSteps()


def test_what_an_engine_repacks_is_widened_before_it_prepares():
    params = {"a": param(3, dtype=torch.float32), "b": param(2, dtype=torch.float32)}
    table = [TensorSpec("a", (3,), "bfloat16"), TensorSpec("b", (2,), "bfloat16")]
    recording = record_loader(by_name(params), table, params, None)
    seen = []
    own = LastSteps((Repack("layer", frozenset([0]), lambda: seen.append(params["a"].tolist())),), lambda: None)
    steps = recording.last_steps(own)
    assert [(r.name, r.storages) for r in steps.repacks] == [("layer", frozenset([0, 2])), ("b", frozenset([3]))]
    assert steps.refresh is own.refresh
    recording.storage_view(2).copy_(torch.tensor([1.0, 2.0, 3.0]))
    recording.storage_view(3).fill_(5)
    for repack in steps.repacks:
        repack.prepare()
    assert seen == [[1.0, 2.0, 3.0]]
    assert params["b"].tolist() == [7.0, 7.0]
    for repack in steps.repacks:
        repack.commit()
    assert params["b"].tolist() == [5.0, 5.0]


def test_one_live_tensor_may_be_widened_in_part_and_keep_its_constants_and_its_own_bits():
    p = param(6, 5, dtype=torch.float32)

    def load(weights):
        for name, t in weights:
            if name == "narrow":
                p.data[1:3, :4].copy_(t)
            elif name == "half":
                p.data[4:, ::2].copy_(t.t())
            else:
                p.data[0].copy_(t)
        p.data[3].zero_()

    shapes = {"narrow": (2, 4), "half": ((3, 2), "float16"), "exact": ((5,), "float32")}
    with pytest.raises(MissingTensorError, match="fills 24 of the 30 elements"):
        record_loader(load, _specs(shapes), {"p": p}, None)

    def whole(weights):
        p.data.fill_(3)
        load(weights)

    recording = check(whole, shapes, {"p": p})
    assert sorted((str(w.region.dtype), w.region.elements) for w in recording.widened) == [
        ("torch.bfloat16", 8),
        ("torch.float16", 6),
    ]
    (storage,) = recording.coverage.storages
    assert (storage.direct_bytes, storage.widened_bytes, storage.constant) == (20, 56, 11)
    assert recording.recipes["exact"] == "raw"
    # Elements of the region that something else fills stay what they are.
    before = p.data.clone()
    for repack in recording.last_steps().repacks:
        repack.commit()
    changed = raw(p.data != before).view(torch.bool)
    assert int(changed.sum()) <= 14
    assert not bool(changed[0].any() or changed[3].any() or changed[1:3, 4].any() or changed[4:, 1::2].any())


def _specs(shapes):
    return [TensorSpec(n, *(s if isinstance(s[-1], str) else (s, "bfloat16"))) for n, s in shapes.items()]


def test_f32_of_the_trainer_keeps_its_bits_unless_the_loader_rounds_it():
    exact, rounded = param(3, dtype=torch.float32), param(3, dtype=torch.float32)
    table = [TensorSpec("w", (3,), "float32")]
    recording = record_loader(by_name({"w": exact}), table, {"w": exact}, None)
    assert (recording.recipes, recording.widened) == ({"w": "raw"}, ())

    def load(weights):
        for _, t in weights:
            rounded.data.copy_(t.bfloat16().float().bfloat16())

    recording = record_loader(load, table, {"w": rounded}, None)
    assert recording.recipes == {"w": "bf16"}
    assert len(recording.widened) == 1
    recording = record_loader(by_name({"w": rounded}), table, {"w": rounded}, {"w": "bf16"})
    assert recording.recipes == {"w": "raw"}


@pytest.mark.parametrize(
    ("narrow", "live", "change"),
    [
        ("float16", torch.bfloat16, lambda t: t),
        ("bfloat16", torch.float16, lambda t: t),
        ("float32", torch.float16, lambda t: t),
        ("bfloat16", torch.float32, lambda t: t.half()),
        ("float16", torch.float32, lambda t: t.bfloat16()),
        ("int32", torch.int64, lambda t: t),
        ("int64", torch.float32, lambda t: t),
        ("float8_e4m3fn", torch.bfloat16, lambda t: t),
    ],
)
def test_a_conversion_that_rounds_or_lacks_scales_is_refused(narrow, live, change):
    p = param(3, dtype=live)

    def load(weights):
        for _, t in weights:
            p.data.copy_(change(t))

    with pytest.raises(DtypeMismatchError, match=f"'w' is .* but the engine's 'p' is {str(live)[6:]}"):
        record_loader(load, [TensorSpec("w", (3,), narrow)], {"p": p}, {"w": "raw"})


def test_verification_compares_widened_bytes():
    p = param(4, 2, dtype=torch.float32)
    calls = []

    def load(weights):
        for _, t in weights:
            calls.append(1)
            p.data.copy_(t.clone() if len(calls) == 1 else t.clone().neg())

    table = [TensorSpec("w", (4, 2), "bfloat16")]
    recording = record_loader(load, table, {"p": p}, None)
    with pytest.raises(RecordError, match="leave different bytes in 'p'"):
        verify_recording(recording, load, table)
    assert bool((p == 7).all())
    calls[:] = []
    recording = record_loader(load, table, {"p": p}, None)
    calls[:] = []
    verify_recording(recording, load, table)


def test_a_replay_widens_like_the_loader():
    params = {"w": param(4, 6), "bias": param(6, dtype=torch.float32)}
    table = _specs({"w": (4, 6), "bias": (6,)})
    recording = record_loader(by_name(params), table, params, None)
    coded = {t.name: coded_tensor(t.name, t.shape, t.dtype) for t in table}
    targets = [torch.zeros_like(recording.storage_view(i)) for i in range(3)]
    replay(recording, lambda name, role: coded[name], targets)
    one = torch.zeros(6)
    replay_storage(recording, 1, one, lambda name, role: coded[name])
    for found in (targets[1], one):
        assert torch.equal(found, coded["bias"].float())
    found = executed(recording, {(n, "weight"): t for n, t in coded.items()})
    np.testing.assert_array_equal(found[1], raw(coded["bias"].float()).numpy())


# What an engine wants.


def test_the_dtypes_that_an_engine_wants_are_found_without_scales():
    live = {
        "qkv": param(8, 4, dtype=torch.float8_e4m3fn),
        "qkv_scale": param(1, 1, dtype=torch.float32),
        "norm": param(4),
        "router": param(4, dtype=torch.float32),
        "quantised": param(4, 4, dtype=torch.float8_e4m3fn),
    }

    def load(weights):
        for name, t in weights:
            if name in "qk":
                live["qkv"].data[4 * "qk".index(name) :][:4].copy_(t)
            elif name.endswith("scale_inv"):
                live["qkv_scale"].data.copy_(t)
            elif name == "packed":
                scale = t.abs().amax()
                live["quantised"].data.copy_((t / scale).to(torch.float8_e4m3fn))
            elif name != "unused":
                live[name].data.copy_(t)
                if name == "norm":
                    live["router"].data.copy_(t)

    shapes = {"q": (4, 4), "k": (4, 4), "norm": (4,), "packed": (4, 4), "unused": (2,)}
    before = {n: raw(p).clone() for n, p in live.items()}
    found = wanted_recipes(load, _specs(shapes), live)
    e4m3 = frozenset([torch.float8_e4m3fn])
    both = frozenset([torch.bfloat16, torch.float32])
    assert found == {"q": e4m3, "k": e4m3, "packed": e4m3, "norm": both}
    assert all(torch.equal(raw(p), before[n]) for n, p in live.items())
    with pytest.raises(ShapeMismatchError):
        wanted_recipes(load, _specs({"norm": (5,)}), live)


# Coverage in words.


def test_coverage_says_what_is_written_in_place_and_what_is_not():
    params = {"w": param(8, 6), "bias": param(6, dtype=torch.float32), "extra": param(2), "cache": torch.zeros(3)}

    def load(weights):
        for name, t in weights:
            if name == "w":
                params["w"].data[:4].copy_(t)
                params["w"].data[4:] = 0
            elif name == "bias":
                params["bias"].data.copy_(t)

    table = _specs({"w": (4, 6), "bias": (6,), "tied": (3,)})
    recording = record_loader(load, table, params, None, allow_missing=["extra"])
    assert recording.coverage.describe() == (
        "30 of 54 elements in 2 pieces of live memory come from the checkpoint: 48 bytes (66.6667 %) are written in "
        "place; 24 bytes of 'bias' are widened at the commit; 24 elements of 'w' keep what the loader itself sets; "
        "nothing fills 'extra', as allowed; the loader leaves the buffers 'cache' alone; it ignores the checkpoint's "
        "'tied'."
    )
