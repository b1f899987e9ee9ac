"""`wsync.quantize` and `wsync.dequantize`: whole weights, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from kernel_boxes import ISAS, raw_bytes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from wsync.errors import ConfigError, DtypeMismatchError, NonFiniteError, RecipeError, ShapeMismatchError
from wsync.formats import decode_e4m3
from wsync.kernels import dequantize, quantize
from wsync.spec.recipes import RECIPES, get_recipe, recipe_parts

ROUNDING = tuple(recipe for recipe in RECIPES if recipe != "raw")
QUANTISED = tuple(name for name, facts in RECIPES.items() if facts.quantised)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def weight_of(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (torch.from_numpy(np.random.default_rng(1).standard_normal(shape).astype(np.float32)) * 0.02).to(dtype)


def fitting(shape: tuple[int, ...], recipe: str) -> tuple[int, ...]:
    """``shape`` with its last dimension up to whole groups."""
    group = get_recipe(recipe).group
    return (*shape[:-1], -(-shape[-1] // group) * group)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(raw_bytes(a), raw_bytes(b))


@pytest.mark.parametrize("recipe", ROUNDING)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(300, 260), (128, 128), (3, 130, 140), (2, 2, 64, 50), (1, 7), (0, 16), (2, 0, 4)])
def test_every_backend_gives_the_same_bits(recipe, dtype, shape):
    weight = weight_of(fitting(shape, recipe), dtype)
    reference = quantize(weight, recipe, "reference")
    back = {d: dequantize(reference, recipe, d, "reference") for d in (*DTYPES, torch.float64)}
    for backend in ("cpu", "auto"):
        parts = quantize(weight, recipe, backend)
        assert list(parts) == list(reference)
        assert all(same_bits(parts[name], reference[name]) for name in parts)
        assert all(same_bits(dequantize(parts, recipe, d, backend), back[d]) for d in back)


@pytest.mark.parametrize("recipe", ROUNDING)
def test_strided_weights_are_quantized_where_they_lie(recipe):
    storage = weight_of((32, 192, 300), torch.bfloat16)
    views = (
        storage[:3, ::2, 12:],
        storage[:3].transpose(1, 2),
        storage[1:5, 3:, ::3],
        storage.permute(2, 1, 0)[:4],
        storage[1].t(),
    )
    for view in views:
        view = view[..., : view.shape[-1] // get_recipe(recipe).group * get_recipe(recipe).group]
        expected = quantize(view.contiguous(), recipe, "reference")
        got = quantize(view, recipe, "cpu")
        assert all(same_bits(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", ROUNDING)
def test_strided_rows_that_end_anywhere_in_a_tile_are_quantized_where_they_lie(recipe, dtype, isa, monkeypatch):
    monkeypatch.setenv("WSYNC_ISA", isa)
    for cols in (1, 1025, 2049):
        cols = fitting((cols,), recipe)[0]
        stored = weight_of((cols + 3, 3), dtype)
        stored[cols:] = float("nan")  # beyond the view: never read
        view = stored[:cols].t()
        expected = quantize(view.contiguous(), recipe, "reference")
        got = quantize(view, recipe, "cpu")
        assert all(same_bits(got[name], expected[name]) for name in expected), cols


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_parts_have_the_names_dtypes_and_shapes_that_the_recipe_declares(recipe):
    weight = weight_of((3, 130, 160), torch.bfloat16)
    parts = quantize(weight, recipe)
    declared = recipe_parts("weight", tuple(weight.shape), "bfloat16", recipe)
    assert {n: (str(p.dtype).removeprefix("torch."), tuple(p.shape)) for n, p in parts.items()} == {
        part.name: (part.dtype, part.shape) for part in declared
    }
    assert dequantize(parts, recipe, torch.bfloat16).shape == weight.shape


@pytest.mark.parametrize("recipe", ["fp8_block128", "fp8_block128_f32"])
def test_dequantized_weights_are_within_half_a_step(recipe):
    weight = weight_of((300, 260), torch.float32)
    parts = quantize(weight, recipe)
    back = dequantize(parts, recipe)
    scale = parts["weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :260]
    half_step = torch.maximum(weight.abs() * 2.0**-4, scale * 2.0**-10)
    assert bool(((back - weight).abs() <= half_step * (1 + 1e-6)).all())
    assert torch.equal(back, decode_e4m3(parts["weight"]) * scale)


def test_arrays_and_dlpack_objects_are_taken_as_tensors_are():
    weight = weight_of((40, 50), torch.float32)
    read_only = weight.numpy().copy()
    read_only.flags.writeable = False

    class Exported:
        def __dlpack__(self, **kwargs):
            return weight.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return weight.__dlpack_device__()

    expected = quantize(weight, "fp8_block128")
    for given in (weight.numpy(), read_only, Exported(), torch.nn.Parameter(weight)):
        got = quantize(given, "fp8_block128")
        assert all(same_bits(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("recipe", ROUNDING)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_weight_is_refused_with_its_first_index(backend, recipe, value):
    weight = weight_of((2, 3, 150, 160), torch.bfloat16)
    weight[1, 2, 130, 7] = value
    weight[1, 0, 149, 139] = value
    with pytest.raises(NonFiniteError) as caught:
        quantize(weight, recipe, backend)
    assert "(1, 0, 149, 139)" in str(caught.value)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("recipe", ROUNDING)
def test_torchs_default_dtype_and_device_change_nothing(recipe, backend):
    weight = weight_of((3, 130, 160), torch.float32)
    expected = quantize(weight, recipe, backend)
    back = {d: dequantize(expected, recipe, d, backend) for d in (torch.bfloat16, torch.float64)}
    nothing = quantize(weight[:, :0], recipe, backend)
    usual = torch.get_default_dtype()
    for default in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(default)
        try:
            with torch.device("meta"):
                got = quantize(weight, recipe, backend)
                decoded = {d: dequantize(got, recipe, d, backend) for d in back}
                empty = quantize(weight[:, :0], recipe, backend)
        finally:
            torch.set_default_dtype(usual)
        assert all(same_bits(got[name], expected[name]) for name in expected)
        assert all(same_bits(decoded[d], back[d]) for d in back)
        assert all(same_bits(empty[name], nothing[name]) for name in nothing)


@pytest.mark.parametrize("isa", ISAS)
def test_every_byte_of_an_e8m0_scale_is_decoded_and_the_last_one_is_no_number(isa, monkeypatch):
    monkeypatch.setenv("WSYNC_ISA", isa)
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1).expand(256, 2).contiguous()
    codes = torch.arange(64, dtype=torch.uint8).expand(256, 64).contiguous()  # finite ones, and zero
    parts = {"weight": codes, "weight_scale": scales}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got, want = dequantize(parts, "mxfp8", dtype, "cpu"), dequantize(parts, "mxfp8", dtype, "reference")
        assert torch.equal(got[:255], want[:255])
        assert bool(got[255].isnan().all())
        assert bool(want[255].isnan().all())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_weight_that_only_bf16_makes_infinite_is_refused_as_such(backend):
    weight = torch.ones(4, 6)
    weight[2, 5] = 3.4e38
    with pytest.raises(NonFiniteError, match=r"element \(2, 5\) is 3\.39\d*e\+38, which bf16 has no finite value for"):
        quantize(weight, "bf16", backend)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_arguments_of_another_type_are_refused_by_name():
    weight = torch.ones(4, 64)
    parts = quantize(weight, "fp8_channel")
    for call, error, says in (
        (lambda: quantize(weight, ["bf16"]), RecipeError, r"recipe \['bf16'\] is unknown"),
        (lambda: quantize(weight, "bf16", ["cpu"]), ConfigError, r"backend \['cpu'\] is unknown"),
        (lambda: quantize(torch.nested.nested_tensor([weight, weight[:2]]), "bf16"), DtypeMismatchError, "nested"),
        (lambda: dequantize([weight], "bf16"), ConfigError, "but they are list"),
        (lambda: dequantize(parts, "fp8_channel", "float32"), DtypeMismatchError, "dtype is 'float32'"),
        (lambda: dequantize(parts, "fp8_channel", torch.int8), DtypeMismatchError, "dtype is torch.int8"),
    ):
        with pytest.raises(error, match=says):
            call()


def test_what_a_recipe_cannot_encode_is_refused_by_name():
    with pytest.raises(RecipeError, match="'int7'"):
        quantize(torch.zeros(4, 4), "int7")
    with pytest.raises(RecipeError, match=r"\(4,\)"):
        quantize(torch.zeros(4), "fp8_block128")
    with pytest.raises(DtypeMismatchError, match="float64"):
        quantize(torch.zeros(4, 4, dtype=torch.float64), "bf16")
    with pytest.raises(DtypeMismatchError, match="list"):
        quantize([1.0], "bf16")
    with pytest.raises(ConfigError, match="'gpu' is unknown"):
        quantize(torch.zeros(4, 4), "bf16", "gpu")
    with pytest.raises(ConfigError, match="meta"):
        quantize(torch.zeros(4, 4, device="meta"), "bf16")
    with pytest.raises(RecipeError, match="multiple of 32"):
        quantize(torch.zeros(4, 48), "mxfp8")
    with pytest.raises(ConfigError, match="'gpu' is unknown"):
        dequantize({"weight": torch.zeros(4, 4)}, "bf16", backend="gpu")
    with pytest.raises(RecipeError, match="weight_scale_inv"):
        dequantize({"weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn)}, "fp8_block128")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("recipe", ROUNDING)
def test_views_that_negate_or_turn_around_are_taken_by_their_values(recipe, backend):
    weight = weight_of((130, 160), torch.float32)
    expected = quantize(-weight, recipe, "reference")
    got = quantize(torch._neg_view(weight), recipe, backend)
    assert all(same_bits(got[name], expected[name]) for name in expected)
    turned = quantize(weight.numpy()[::-1, ::-1], recipe, backend)
    expected = quantize(weight.flip(0, 1), recipe, "reference")
    assert all(same_bits(turned[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def dtensor(tmp_path_factory):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('gloo') / 'store'}", rank=0, world_size=1
    )
    yield distribute_tensor(torch.ones(256, 256), init_device_mesh("cpu", (1,)), [Shard(0)])
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_tensor_without_plain_memory_is_refused_by_name(recipe, backend, dtensor):
    with FakeTensorMode():
        fake = torch.ones(4, 4)
    freed = torch.ones(4, 4)
    freed.untyped_storage().resize_(0)
    for weight, error, says in (
        (dtensor, DtypeMismatchError, r"it is a DTensor of shape \(256, 256\)"),
        (fake, DtypeMismatchError, r"it is a FakeTensor of shape \(4, 4\)"),
        (torch.eye(4).to_sparse(), DtypeMismatchError, r"it has torch\.sparse_coo"),
        (torch.eye(4).to_sparse_csr(), DtypeMismatchError, r"it has torch\.sparse_csr"),
        (freed, ConfigError, r"needs 64 bytes, its storage has 0"),
        (np.ones((4, 4), ">f4"), DtypeMismatchError, ">f4"),
        (torch.ones(4, 4, device="meta"), ConfigError, "is on meta"),
    ):
        with pytest.raises(error, match=says):
            quantize(weight, recipe, backend)


@pytest.mark.parametrize("recipe", QUANTISED)
def test_parts_of_any_strides_and_bytes_of_small_floats_are_decoded(recipe):
    weight = weight_of((2, 130, 160), torch.bfloat16)
    parts = quantize(weight, recipe)
    expected = dequantize(parts, recipe, torch.bfloat16, "reference")
    turned = {n: p.transpose(0, -1).contiguous().transpose(0, -1) if p.dim() > 1 else p for n, p in parts.items()}
    plain = {n: p.view(torch.uint8) if p.dtype == torch.float8_e4m3fn else p for n, p in turned.items()}
    for given_parts in (turned, plain):
        assert same_bits(dequantize(given_parts, recipe, torch.bfloat16, "cpu"), expected)


@pytest.mark.parametrize("recipe", ["fp8_block128", "fp8_block128_f32"])
def test_parts_that_do_not_fit_are_refused_with_both_values(recipe):
    codes = torch.zeros(256, 200, dtype=torch.float8_e4m3fn)
    scales = torch.ones(2, 2)
    for weight, scale, error, says in (
        (codes, torch.ones(1, 1), ShapeMismatchError, r"\(256, 200\) has scales of shape \(2, 2\).*have \(1, 1\)"),
        (codes, torch.ones(2, 2, 1), ShapeMismatchError, r"have \(2, 2, 1\)"),
        (codes[0], scales, ShapeMismatchError, r"2 or more dimensions, but this one has \(200,\)"),
        (codes.to(torch.bfloat16), scales, DtypeMismatchError, r"float8_e4m3fn, but this one is torch\.bfloat16"),
        (codes.to(torch.float8_e5m2), scales, DtypeMismatchError, r"float8_e4m3fn, but this one is torch\.float8_e5m2"),
        (codes, scales.to(torch.bfloat16), DtypeMismatchError, r"float32, but these are torch\.bfloat16"),
        (codes, scales.to("meta"), ConfigError, "'weight_scale_inv' is on meta"),
        (codes, scales.to_sparse(), DtypeMismatchError, r"it has torch\.sparse_coo"),
    ):
        for backend in ("cpu", "reference"):
            with pytest.raises(error, match=says):
                dequantize({"weight": weight, "weight_scale_inv": scale}, recipe, backend=backend)
    raw = dequantize({"weight": codes.view(torch.uint8), "weight_scale_inv": scales}, recipe)
    assert torch.equal(raw, torch.zeros(256, 200))
