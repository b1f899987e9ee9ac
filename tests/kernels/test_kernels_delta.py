"""The delta of a bucket: compiled code against the reference, every bit flipped, anything for a code."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsync import kernels
from wsync.errors import ConfigError, WireError
from wsync.formats import delta as reference
from wsync.kernels.delta import MAX_STRIPE_BYTES

ISAS = kernels.isas()


def encode(fresh, base, cuts, seq=7, digest=99, num_threads=2, isa="auto"):
    """The code and what became of the base."""
    after, out = base.copy(), np.full(len(base), 0xA5, np.uint8)
    made = kernels.delta_encode(
        fresh.ctypes.data, after.ctypes.data, out.ctypes.data, cuts, seq, digest, num_threads, isa=isa
    )
    assert np.array_equal(after, fresh)
    return (out[: made.num_bytes].tobytes() if made.num_bytes else None), made


def apply(base, code, seq=7, digest=99, isa="auto"):
    """Guarded on both sides: nothing may be written beyond the bucket."""
    guarded = np.full(len(base) + 512, 0x5A, np.uint8)
    guarded[256:-256] = base
    encoded = np.frombuffer(code, np.uint8).copy()
    try:
        address = guarded.ctypes.data + 256
        kernels.delta_apply(address, len(base), encoded.ctypes.data, len(encoded), seq, digest, 2, isa=isa)
    finally:
        assert (guarded[:256] == 0x5A).all()
        assert (guarded[-256:] == 0x5A).all()
    return guarded[256:-256]


def weights(rng, num_words, std=0.02):
    values = (rng.standard_normal(num_words) * std).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def stepped(rng, words, share, largest=1):
    fresh = words.copy()
    at = rng.random(len(words)) < share
    fresh[at] += rng.integers(-largest, largest + 1, int(at.sum())).astype(np.uint16)
    return fresh


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    groups=st.lists(st.tuples(st.integers(1, 12), st.sampled_from([1, 2])), min_size=1, max_size=4),
    share=st.sampled_from([0.0, 1e-3, 0.02, 0.2, 0.49, 0.6, 1.0]),
    wild=st.booleans(),
)
def test_the_compiled_code_is_that_of_the_reference_and_gives_the_new_bytes(seed, groups, share, wild):
    rng = np.random.default_rng(seed)
    cuts = kernels.delta_cuts((256 * n, size) for n, size in groups)
    num_bytes = int(cuts[:, 0].sum())
    if wild:
        base = rng.integers(0, 256, num_bytes).astype(np.uint8)
        fresh = np.where(rng.random(num_bytes) < share, rng.integers(0, 256, num_bytes), base).astype(np.uint8)
    else:
        words = weights(rng, num_bytes // 2)
        base, fresh = words.view(np.uint8), stepped(rng, words, share, largest=3).view(np.uint8)
    want = reference.encode_delta(fresh, base, cuts.tolist(), 7, 99)
    for isa in ISAS:
        code, made = encode(fresh, base, cuts, isa=isa)
        assert code == want
        if code is not None:
            assert np.array_equal(apply(base, code, isa=isa), fresh)
    if want is not None:
        assert np.array_equal(reference.apply_delta(base, want, 7, 99), fresh)
    elements = sum(256 * n // size for n, size in groups)
    assert made.num_elements == elements


def test_a_large_bucket_of_many_stripes_is_the_same_on_any_number_of_threads():
    rng = np.random.default_rng(1)
    words = weights(rng, (3 << 20) // 2)
    fresh = stepped(rng, words, 0.01)
    cuts = kernels.delta_cuts([(2 << 20, 2), (1 << 20, 1)])
    assert len(cuts) == (3 << 20) // MAX_STRIPE_BYTES
    codes = {
        encode(fresh.view(np.uint8), words.view(np.uint8), cuts, num_threads=n, isa=i)[0]
        for n in (1, 2, 3)
        for i in ISAS
    }
    assert len(codes) == 1
    code = codes.pop()
    assert len(code) < len(words) * 2 / 40
    assert np.array_equal(apply(words.view(np.uint8), code), fresh.view(np.uint8))


def test_a_flip_of_any_bit_of_a_code_is_refused_or_seen_in_the_digest():
    rng = np.random.default_rng(2)
    words = weights(rng, 512)
    base, fresh = words.view(np.uint8), stepped(rng, words, 0.05, largest=2).view(np.uint8)
    code, _ = encode(fresh, base, kernels.delta_cuts([(512, 2), (512, 1)]))
    want = kernels.digest(fresh.ctypes.data, len(fresh), 5)
    num_refused = 0
    for bit in range(8 * len(code)):
        bad = bytearray(code)
        bad[bit // 8] ^= 1 << (bit % 8)
        try:
            found = apply(base, bytes(bad)).copy()
        except WireError:
            num_refused += 1
        else:
            # Some bits say the same in another way (the parameter of a class that nobody is in).
            assert np.array_equal(found, fresh) == (kernels.digest(found.ctypes.data, len(found), 5) == want)
    assert num_refused > 4 * len(code)


def test_every_field_of_the_header_and_of_the_table_is_checked():
    rng = np.random.default_rng(4)
    words = weights(rng, 384)
    base, fresh = words.view(np.uint8), stepped(rng, words, 0.05).view(np.uint8)
    fresh = fresh.copy()
    fresh[256:512] = base[256:512]  # one stripe of each kind
    fresh[512:] = rng.integers(0, 256, 256)
    code, _ = encode(fresh, base, kernels.delta_cuts([(256, 2), (256, 1), (256, 2)]))
    assert [kind for _, _, kind, _, _ in reference.ENTRY.iter_unpack(code[32:68])] == [reference.WORDS, 0, 1]
    tops = range(8 * (32 + 9), 8 * (32 + 10))  # of the coded stripe: seen in the digest
    for bit in range(8 * (32 + 36)):
        bad = bytearray(code)
        bad[bit // 8] ^= 1 << (bit % 8)
        if bit in tops:
            continue
        for isa in ISAS:
            with pytest.raises(WireError):
                apply(base, bytes(bad), isa=isa)
        with pytest.raises(WireError):
            reference.apply_delta(base, bytes(bad), 7, 99)


def test_a_stripe_that_spans_more_than_the_format_allows_is_refused():
    span = MAX_STRIPE_BYTES + 256
    entry = reference.ENTRY.pack(span, 0, reference.SAME, 0, 0)
    code = reference.HEADER.pack(reference.MAGIC, 1, 7, 99, span, 44) + entry
    base = np.zeros(span, np.uint8)
    with pytest.raises(WireError, match=rf"stripe 0 spans {span} bytes"):
        apply(base, code)
    with pytest.raises(WireError, match="stripe 0"):
        reference.apply_delta(base, code, 7, 99)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_nothing_is_written_out_of_bounds_whatever_a_code_says(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    base = rng.integers(0, 256, 1024).astype(np.uint8)
    body = bytearray(data.draw(st.binary(max_size=200)))
    kind = data.draw(st.sampled_from([2, 3]))
    for c in range(min(8, len(body))):
        body[c] %= 21
    entry = reference.ENTRY.pack(1024, len(body), kind, data.draw(st.integers(0, 255)), 0)
    size = reference.HEADER.size + len(entry) + len(body)
    code = reference.HEADER.pack(reference.MAGIC, 1, 7, 99, 1024, size) + entry + bytes(body)
    outcomes = []
    for isa in ISAS:
        try:
            outcomes.append(apply(base, code, isa=isa).tobytes())
        except WireError:
            outcomes.append(None)
    try:
        outcomes.append(reference.apply_delta(base, code, 7, 99).tobytes())
    except WireError:
        outcomes.append(None)
    assert len(set(outcomes)) == 1


def test_a_code_of_another_base_or_another_length_is_refused_with_both_values():
    rng = np.random.default_rng(3)
    words = weights(rng, 1024)
    base = words.view(np.uint8)
    code, _ = encode(stepped(rng, words, 0.02).view(np.uint8), base, kernels.delta_cuts([(2048, 2)]))
    with pytest.raises(WireError, match=r"publish 7, and publish 8 is held"):
        apply(base, code, seq=8)
    with pytest.raises(WireError, match=r"digest 99, and the one that is held had 98"):
        apply(base, code, digest=98)
    with pytest.raises(WireError, match=r"2048 bytes, this one has 1792"):
        apply(base[:1792], code)
    for cut in range(len(code)):
        with pytest.raises(WireError):
            apply(base, code[:cut] or b"\0")
    for longer in (b"\0", b"\1"):
        with pytest.raises(WireError):
            apply(base, code + longer)


@pytest.mark.parametrize("cuts", [[[100, 2]], [[256, 1]], [[0, 2]], [[MAX_STRIPE_BYTES + 256, 2]]])
def test_malformed_cuts_are_refused(cuts):
    memory = np.zeros(1024, np.uint8)
    address = memory.ctypes.data
    with pytest.raises(ConfigError, match=r"cuts\[0\]"):
        kernels.delta_encode(address, address, address, np.array(cuts, np.uint32), 1, 1)
