"""Unpacking what is not packed: strided and broadcast sources, fills, exponents of scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_boxes import ISAS, raw_bytes, unpack_desc

from wsync import kernels
from wsync.errors import ConfigError
from wsync.formats import digest_bytes
from wsync.plan.descriptors import UNPACK_COPY, UNPACK_EXPONENT, UNPACK_FILL

INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
UNCOUNTED = (1 << 64) - 1


def noise(numel: int, elem_bytes: int, seed: int) -> torch.Tensor:
    raw = np.random.default_rng(seed).integers(0, 256, size=numel * elem_bytes, dtype=np.uint8)
    return torch.from_numpy(raw).view(INTS[elem_bytes])


@st.composite
def strided(draw, max_extent: int = 24):
    """Extents and strides in elements, of a source whose elements may repeat, and how many elements it spans."""
    rank = draw(st.integers(1, 4))
    shape = [draw(st.integers(1, max_extent if d else 6)) for d in range(rank)]
    order = draw(st.permutations(range(rank)))
    strides, span = [0] * rank, 1
    for d in order:
        if draw(st.integers(0, 3)) == 0:
            continue  # a broadcast dimension
        strides[d] = span * draw(st.sampled_from([1, 1, 2]))
        span = strides[d] * shape[d]
    needed = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    return tuple(shape), tuple(strides), needed


def destination(shape: tuple[int, ...], dtype: torch.dtype, turned: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Storage of twos with a margin around, and the view of it that is written."""
    stored = tuple(n + 3 for n in (shape[::-1] if turned else shape))
    storage = torch.full(stored, 2, dtype=dtype)
    view = storage[tuple(slice(1, 1 + n) for n in (shape[::-1] if turned else shape))]
    return storage, view.permute(*range(len(shape))[::-1]) if turned else view


@settings(max_examples=80, deadline=None)
@given(
    source=strided(),
    elem_bytes=st.sampled_from([1, 2, 4, 8]),
    turned=st.booleans(),
    offset=st.sampled_from([0, 8, 24]),
    seed=st.integers(0, 99),
)
def test_any_source_strides_give_what_torch_reads_through_them(source, elem_bytes, turned, offset, seed):
    shape, strides, needed = source
    wire = noise(needed + offset // elem_bytes, elem_bytes, seed)
    expected = wire[offset // elem_bytes :].as_strided(shape, strides)
    want = raw_bytes(expected)
    for isa in ISAS:
        storage, view = destination(shape, wire.dtype, turned)
        descs = unpack_desc(view, src_stride=strides, src_offset=offset, wire_word=5)
        assert kernels.unpack(descs, wire.data_ptr(), 2, isa=isa) == digest_bytes(want, 5)
        assert kernels.installed_digest(descs, 2, isa=isa) == digest_bytes(want, 5)
        untouched, again = destination(shape, wire.dtype, turned)
        again.copy_(expected)
        assert torch.equal(storage, untouched)


def test_long_sources_in_another_order_are_the_same_for_every_number_of_threads():
    wire = noise(700 * 900, 2, 1)
    turned = wire.view(700, 900).t()
    want = raw_bytes(turned)
    for isa in ISAS:
        for num_threads in (1, 3):
            live = torch.zeros(900, 700, dtype=torch.int16)
            descs = unpack_desc(live, src_stride=(1, 900), wire_word=11)
            assert kernels.unpack(descs, wire.data_ptr(), num_threads, isa=isa) == digest_bytes(want, 11)
            assert torch.equal(live, turned)
            live.zero_()
            descs["wire_word"] = UNCOUNTED
            assert kernels.unpack(descs, wire.data_ptr(), num_threads, isa=isa) == 0
            assert torch.equal(live, turned)


@pytest.mark.parametrize(("elem_bytes", "fill"), [(1, 0x7F), (2, 0x3F80), (4, 0x12345678), (4, 0)])
def test_fills_write_the_low_bytes_of_the_value_and_read_nothing(elem_bytes, fill):
    value = np.frombuffer(np.uint32(fill).tobytes()[:elem_bytes], np.uint8)
    want = np.tile(value, 33 * 77)
    for isa in ISAS:
        storage, view = destination((33, 77), INTS[elem_bytes], turned=False)
        descs = unpack_desc(view, op=UNPACK_FILL, fill=fill, wire_word=3)
        unmapped = 1 << 12  # never read
        assert kernels.unpack(descs, unmapped, 1, isa=isa) == digest_bytes(want, 3)
        assert kernels.installed_digest(descs, 1, isa=isa) == digest_bytes(want, 3)
        assert np.array_equal(raw_bytes(view), want)
        assert storage[0].eq(2).all()
        assert storage[:, 0].eq(2).all()
        assert storage[34:].eq(2).all()


def test_exponents_of_powers_of_two_become_e8m0_bytes_in_any_order():
    exponents = torch.arange(0, 255, dtype=torch.int64)
    bits = torch.where(exponents == 0, 1 << 22, exponents << 23).to(torch.int32)
    scales = bits.view(torch.float32)
    assert torch.equal(scales.to(torch.float64), 2.0 ** (exponents - 127).to(torch.float64))
    grid = scales.view(15, 17)
    want = exponents.to(torch.uint8).view(15, 17).t().contiguous()
    for isa in ISAS:
        live = torch.zeros(4, 17, 15, dtype=torch.uint8)
        descs = unpack_desc(live, src_stride=(0, 1, 17), op=UNPACK_EXPONENT, wire_word=9)
        digest = kernels.unpack(descs, grid.data_ptr(), 1, isa=isa)
        assert torch.equal(live, want.expand(4, 17, 15))
        assert digest == digest_bytes(raw_bytes(live), 9) == kernels.installed_digest(descs, 1, isa=isa)


@pytest.mark.parametrize(
    ("op", "box", "message"),
    [
        (3, torch.zeros(4), "op 3 is unknown"),
        (-1, torch.zeros(4), "op -1 is unknown"),
        (UNPACK_FILL, torch.zeros(4, dtype=torch.int64), "elem_bytes is 8, but a fill has 4 bytes at most"),
        (UNPACK_EXPONENT, torch.zeros(4), "elem_bytes is 4, but an exponent has 1"),
        (UNPACK_COPY, torch.zeros(4, dtype=torch.complex128), "elem_bytes is 16"),
    ],
)
def test_a_malformed_unpacking_is_refused_by_name(op, box, message):
    with pytest.raises(ConfigError, match=r"UNPACK_DESC\[0\]") as caught:
        kernels.unpack(unpack_desc(box, op=op), 64)
    assert message in str(caught.value)
    assert (box == 0).all()
