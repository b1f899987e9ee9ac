"""Copies and bf16, packing and unpacking, against torch's own indexing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_boxes import ISAS, bucket, finite_bf16, pack_desc, raw_bytes, unpack_desc

from wsync import kernels
from wsync.formats import digest_bytes, round_to_bf16
from wsync.plan.descriptors import OP_BF16, OP_COPY, SRC_BYTES, SRC_F32_EXACT

INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
UNCOUNTED = (1 << 64) - 1


@st.composite
def boxes(draw, max_extent: int = 40, max_last: int = 300):
    """A storage shape, slices of it with steps, and a permutation: a strided box of up to four dimensions."""
    rank = draw(st.integers(1, 4))
    shape, cut = [], []
    for d in range(rank):
        extent = draw(st.integers(1, max_last if d == rank - 1 else max(2, max_extent // (rank * 2))))
        offset, tail, step = draw(st.integers(0, 3)), draw(st.integers(0, 3)), draw(st.sampled_from([1, 1, 1, 2]))
        shape.append(offset + extent * step + tail)
        cut.append(slice(offset, offset + extent * step, step))
    order = draw(st.permutations(range(rank))) if draw(st.booleans()) else list(range(rank))
    return tuple(shape), tuple(cut), tuple(order)


def view_of(storage: torch.Tensor, box) -> torch.Tensor:
    return storage[box[1]].permute(box[2])


def noise(shape: tuple[int, ...], elem_bytes: int, seed: int) -> torch.Tensor:
    raw = np.random.default_rng(seed).integers(0, 256, size=int(np.prod(shape)) * elem_bytes, dtype=np.uint8)
    return torch.from_numpy(raw).view(INTS[elem_bytes]).reshape(shape)


@settings(max_examples=80, deadline=None)
@given(
    box=boxes(), elem_bytes=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 99), shift=st.sampled_from([0, 8, 64])
)
def test_a_copied_box_is_what_torch_makes_contiguous_and_unpack_is_its_inverse(box, elem_bytes, seed, shift):
    storage = noise(box[0], elem_bytes, seed)
    source = view_of(storage, box)
    expected = raw_bytes(source)
    word = 1000 + seed
    for isa in ISAS:
        out = bucket(shift + len(expected) + 64, fill=0xAA)
        result = kernels.pack(pack_desc(source, OP_COPY, dst_offset=shift, wire_word=word), out.ctypes.data, 1, isa=isa)
        assert result == (digest_bytes(expected, word), None)
        assert np.array_equal(out[shift : shift + len(expected)], expected)
        assert (out[:shift] == 0xAA).all()
        assert (out[shift + len(expected) :] == 0xAA).all()

        back = torch.zeros_like(storage)
        descs = unpack_desc(view_of(back, box), src_offset=shift, wire_word=word)
        assert kernels.unpack(descs, out.ctypes.data, 1, isa=isa) == result.digest
        assert kernels.installed_digest(descs, 1, isa=isa) == result.digest
        untouched = torch.zeros_like(storage)
        view_of(untouched, box).copy_(source)
        assert torch.equal(back, untouched)


@settings(max_examples=40, deadline=None)
@given(box=boxes(), seed=st.integers(0, 99), dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float16]))
def test_bf16_of_a_box_is_the_reference_rounding(box, seed, dtype):
    rng = np.random.default_rng(seed)
    storage = torch.from_numpy(rng.standard_normal(box[0]).astype(np.float32)).to(dtype)
    source = view_of(storage, box)
    rounded = source if dtype == torch.bfloat16 else round_to_bf16(source.to(torch.float32).contiguous())
    expected = raw_bytes(rounded)
    for isa in ISAS:
        out = bucket(len(expected))
        result = kernels.pack(pack_desc(source, OP_BF16, wire_word=3), out.ctypes.data, 1, isa=isa)
        assert result == (digest_bytes(expected, 3), None)
        assert np.array_equal(out, expected)


def test_f32_rounds_to_bf16_like_torch_for_every_bf16_and_around_every_tie():
    high = np.arange(0x10000, dtype=np.uint32)[:, None] << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    bits = (high | low).reshape(-1)
    bits = bits[(bits & 0x7FFFFFFF) < 0x7F7F8000]
    values = torch.from_numpy(bits.view(np.float32))
    expected = values.to(torch.bfloat16)
    assert torch.equal(round_to_bf16(values).view(torch.int16), expected.view(torch.int16))
    for isa in ISAS:
        out = bucket(2 * len(bits))
        assert kernels.pack(pack_desc(values, OP_BF16), out.ctypes.data, 1, isa=isa).bad is None
        assert np.array_equal(out, raw_bytes(expected))


def test_many_pieces_give_the_same_bytes_and_digest_for_every_number_of_threads():
    rng = np.random.default_rng(5)
    sources = [finite_bf16(rng, (rows, 515)) for rows in (1, 200, 700, 33)]
    sources += [torch.from_numpy(rng.standard_normal((400, 256)).astype(np.float32)).t()]
    descs, offset = [], 0
    for i, source in enumerate(sources):
        descs.append(pack_desc(source, OP_BF16, dst_offset=offset, wire_word=offset // 8, piece_idx=i))
        offset += -(-2 * source.numel() // 256) * 256
    expected = None
    for isa in ISAS:
        for num_threads in (1, 2, 5, 0):
            out = bucket(offset)
            got = kernels.pack(np.concatenate(descs), out.ctypes.data, num_threads, isa=isa)
            expected = expected or (got, out.tobytes())
            assert (got, out.tobytes()) == expected


def test_pack_digest_and_padding_digest_make_the_digest_of_the_whole_bucket():
    rng = np.random.default_rng(6)
    pieces, descs, offset, word = [], [], 0, 4096
    for i, shape in enumerate([(3, 5), (129, 7), (64, 64), (1,)]):
        source = finite_bf16(rng, shape)
        descs.append(pack_desc(source, OP_BF16, dst_offset=offset, wire_word=word + offset // 8, piece_idx=i))
        pieces.append((source, offset, 2 * source.numel()))
        offset += -(-2 * source.numel() // 256) * 256
    out = bucket(offset)
    got = kernels.pack(np.concatenate(descs), out.ctypes.data).digest
    padding = kernels.padding_digest(offset, [(at, nbytes) for _, at, nbytes in pieces], word)
    assert (got + padding) % (1 << 64) == kernels.digest(out.ctypes.data, offset, word)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_the_first_non_finite_element_is_named(isa, value, dtype):
    rng = np.random.default_rng(7)
    good = torch.from_numpy(rng.standard_normal((300, 300)).astype(np.float32)).to(dtype)
    worse = good.clone()
    for row, col in ((299, 1), (170, 299), (170, 3)):
        worse[row, col] = value
    descs = [pack_desc(t, OP_BF16, dst_offset=i << 18, piece_idx=10 + i) for i, t in enumerate((good, worse, worse))]
    out = bucket(3 << 18)
    for num_threads in (1, 3):
        assert kernels.pack(np.concatenate(descs), out.ctypes.data, num_threads, isa=isa).bad == (11, 170 * 300 + 3)
    turned = pack_desc(worse.t(), OP_BF16, piece_idx=4)
    assert kernels.pack(turned, out.ctypes.data, isa=isa).bad == (4, 1 * 300 + 299)


@pytest.mark.parametrize("isa", ISAS)
def test_a_finite_f32_that_would_round_to_infinity_is_refused_and_the_largest_that_does_not_is_kept(isa):
    bits = np.array([0x7F7F7FFF, 0xFF7F7FFF, 0x7F7F8000], dtype=np.uint32)
    values = torch.from_numpy(bits.view(np.float32))
    out = bucket(64)
    assert kernels.pack(pack_desc(values[:2], OP_BF16), out.ctypes.data, isa=isa).bad is None
    assert kernels.pack(pack_desc(values, OP_BF16), out.ctypes.data, isa=isa).bad == (0, 2)
    exact = pack_desc(values, OP_BF16, src_dtype=SRC_F32_EXACT)
    assert kernels.pack(exact, out.ctypes.data, isa=isa).bad == (0, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_copies_of_bytes_do_not_look_at_values(dtype):
    values = torch.tensor([float("nan"), float("inf")], dtype=dtype)
    assert kernels.pack(pack_desc(values, OP_COPY, src_dtype=SRC_BYTES), bucket(64).ctypes.data).bad is None


FLOATS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


@settings(max_examples=60, deadline=None)
@given(box=boxes(), seed=st.integers(0, 99), dtype=st.sampled_from(sorted(FLOATS, key=str)), data=st.data())
def test_a_copied_float_keeps_its_bytes_and_the_first_that_torch_calls_not_finite_is_named(box, seed, dtype, data):
    storage = noise(box[0], dtype.itemsize, seed).view(dtype)
    storage[~storage.isfinite()] = torch.finfo(dtype).max
    source = view_of(storage, box)
    expected = raw_bytes(source.view(FLOATS[dtype]))
    place = data.draw(st.integers(0, source.numel() - 1))
    bad = data.draw(st.sampled_from([float("nan"), -float("nan"), float("inf"), float("-inf")]))
    for isa in ISAS:
        out = bucket(len(expected))
        result = kernels.pack(pack_desc(source, OP_COPY, wire_word=9), out.ctypes.data, 1, isa=isa)
        assert result == (digest_bytes(expected, 9), None)
        assert np.array_equal(out, expected)
    source[np.unravel_index(place, tuple(source.shape))] = bad
    for isa in ISAS:
        desc = pack_desc(source, OP_COPY, piece_idx=7)
        assert kernels.pack(desc, bucket(len(expected)).ctypes.data, 1, isa=isa).bad == (7, place)


@pytest.mark.parametrize("isa", ISAS)
def test_values_that_would_not_survive_a_rounding_may_be_copied(isa):
    values = torch.tensor([3.4e38, -3.4028234e38, 1e-45], dtype=torch.float32)
    assert not bool(values.to(torch.bfloat16).isfinite().all())
    assert kernels.pack(pack_desc(values, OP_COPY), bucket(64).ctypes.data, isa=isa).bad is None
    wide = torch.tensor([1.7976931348623157e308, 5e-324], dtype=torch.float64)
    assert kernels.pack(pack_desc(wide, OP_COPY), bucket(64).ctypes.data, isa=isa).bad is None


@pytest.mark.parametrize("isa", ISAS)
def test_an_uncounted_destination_is_written_but_not_digested(isa):
    data = noise((64, 96), 2, 1)
    first, second = torch.zeros_like(data), torch.zeros(64, 200, dtype=torch.int16)
    descs = np.concatenate([unpack_desc(first, wire_word=8), unpack_desc(second[:, 3:99], wire_word=UNCOUNTED)])
    got = kernels.unpack(descs, data.data_ptr(), isa=isa)
    assert got == digest_bytes(raw_bytes(data), 8) == kernels.installed_digest(descs, isa=isa)
    assert torch.equal(first, data)
    assert torch.equal(second[:, 3:99], data)


def test_installed_digest_notices_a_changed_element():
    live = noise((128, 64), 2, 2)
    descs = unpack_desc(live[:, :60])
    before = kernels.installed_digest(descs)
    live[5, 63] += 1
    assert kernels.installed_digest(descs) == before
    live[5, 59] += 1
    assert kernels.installed_digest(descs) != before


def test_memcpy_copies_for_every_number_of_threads():
    data = np.random.default_rng(8).integers(0, 256, size=(3 << 20) + 5, dtype=np.uint8)
    for num_threads in (1, 2, 0):
        out = np.zeros_like(data)
        kernels.memcpy(out.ctypes.data, data.ctypes.data, len(data), num_threads)
        assert np.array_equal(out, data)
