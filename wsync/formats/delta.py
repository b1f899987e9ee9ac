"""The delta of a bucket in plain Python: the definition that the kernels must equal, byte for byte.

`docs/wire_format.md` describes the bytes. An element's *class* comes from the exponent of its base value, which both
ends know: small weights change often, large ones hardly ever, so the gaps between changes are counted class by class.
A change is coded as the number of neighbouring codes between the old and the new value, mostly one.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from wsync.errors import WireError

SAME, RAW, WORDS, BYTES = range(4)
MAGIC = 0x31445357
HEADER = struct.Struct("<IIQQII")
ENTRY = struct.Struct("<IIBBH")
GAP_CLASSES, STEP_CLASSES = 8, 16
ALL_ONES = 15
MAX_UNARY = 24
MAX_GAP_PARAM = 20
MAX_SPAN = 512 << 10

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


class _Kind:
    """Elements of one size: their exponents, and their order by value."""

    def __init__(self, kind: int) -> None:
        self.bits, self.mantissa, self.headroom = (16, 7, 3) if kind == WORDS else (8, 3, 0)
        self.dtype = "<u2" if kind == WORDS else "u1"
        self.sign, self.full = 1 << (self.bits - 1), (1 << self.bits) - 1

    def elements(self, data: Bytes) -> Ints:
        return data.view(self.dtype).astype(np.int64)

    def exponents(self, codes: Ints) -> Ints:
        return (codes & (self.sign - 1)) >> self.mantissa

    def ordered(self, codes: Ints) -> Ints:
        return np.where(codes & self.sign, self.full - codes, codes + self.sign)

    def steps(self, old: Ints, new: Ints) -> Ints:
        return (((self.ordered(new) - self.ordered(old)) & self.full) ^ self.sign) - self.sign

    def moved(self, code: int, step: int) -> int:
        order = (int(self.ordered(np.array(code))) + step) & self.full
        return order - self.sign if order >= self.sign else self.full - order

    def top(self, codes: Ints) -> int:
        every = max(len(codes) // 256, 1)
        return max(int(self.exponents(codes[::every]).max()) - self.headroom, 0)

    def gap_classes(self, codes: Ints, top: int) -> Ints:
        return np.clip(self.exponents(codes) - top + GAP_CLASSES - 1, 0, GAP_CLASSES - 1)

    def step_classes(self, codes: Ints, top: int) -> Ints:
        return np.clip(self.exponents(codes) - top + STEP_CLASSES - 4, 0, STEP_CLASSES - 1)


def _rice_param(values: Ints, most: int) -> int:
    total, count, k = int(values.sum()), len(values), 0
    while k < most and count << (k + 1) <= total + count // 2:
        k += 1
    return k if count else 0


class _Writer:
    def __init__(self) -> None:
        self.bits: list[str] = []  # each with its first bit first

    def put(self, value: int, count: int) -> None:
        if count:
            self.bits.append(format(value, f"0{count}b")[::-1])

    def put_rice(self, value: int, k: int) -> None:
        if value >> k >= MAX_UNARY:
            self.bits.append("1" * MAX_UNARY)
            self.put(value, 32)
        else:
            self.bits.append("1" * (value >> k) + "0")
            self.put(value & ((1 << k) - 1), k)

    def finish(self) -> bytes:
        text = "".join(self.bits)
        text += "0" * (-len(text) % 8)
        return bytes(int(text[i : i + 8][::-1], 2) for i in range(0, len(text), 8))


class _Reader:
    def __init__(self, code: bytes) -> None:
        self.text = "".join(format(b, "08b")[::-1] for b in code)
        self.at = 0

    def take(self, count: int) -> int:
        found = self.text[self.at : self.at + count]
        if len(found) < count:
            raise WireError("a delta is malformed: it ends too early")
        self.at += count
        return int(found[::-1], 2) if count else 0

    def take_rice(self, k: int) -> int:
        ones = 0
        while ones < MAX_UNARY and self.take(1):
            ones += 1
        return self.take(32) if ones == MAX_UNARY else (ones << k) | self.take(k)


def encode_stripe(fresh: Bytes, base: Bytes, kind: int) -> tuple[int, int, bytes]:
    """Encode one stripe.

    Returns:
        Its kind on the wire (`SAME`, `RAW` or ``kind``), its ``top`` and its code.
    """
    k = _Kind(kind)
    old, new = k.elements(base), k.elements(fresh)
    changed = np.flatnonzero(old != new)
    if len(changed) == 0:
        return SAME, 0, b""
    if len(changed) >= len(old) // 2:
        return RAW, 0, fresh.tobytes()
    top = k.top(old)
    classes = k.gap_classes(old, top)
    gaps = [_gaps(classes == c, changed[classes[changed] == c]) for c in range(GAP_CLASSES)]
    gap_params = [_rice_param(g, MAX_GAP_PARAM) for g in gaps]
    steps, step_classes = k.steps(old, new)[changed], k.step_classes(old, top)[changed]
    sizes = [np.abs(steps[step_classes == s]) - 1 for s in range(STEP_CLASSES)]
    step_params = [ALL_ONES if s.sum() == 0 else _rice_param(s, ALL_ONES - 1) for s in sizes]
    writer, cursors = _Writer(), [1] * GAP_CLASSES
    for c in range(GAP_CLASSES):
        writer.put_rice(int(gaps[c][0]), gap_params[c])
    for c, step, s in zip(classes[changed].tolist(), steps.tolist(), step_classes.tolist(), strict=True):
        writer.put(int(step < 0), 1)
        if step_params[s] != ALL_ONES:
            writer.put_rice(abs(step) - 1, step_params[s])
        writer.put_rice(int(gaps[c][cursors[c]]), gap_params[c])
        cursors[c] += 1
    nibbles = bytes(step_params[s] | step_params[s + 1] << 4 for s in range(0, STEP_CLASSES, 2))
    code = bytes(gap_params) + nibbles + writer.finish()
    return (kind, top, code) if len(code) < len(base) else (RAW, 0, fresh.tobytes())


def _gaps(members: npt.NDArray[np.bool_], changed: Ints) -> Ints:
    """Unchanged members of a class before each change, and after the last one."""
    ranks = np.cumsum(members)[changed] - 1
    return np.diff(np.concatenate([[-1], ranks, [int(members.sum())]])) - 1


def apply_stripe(base: Bytes, kind: int, top: int, code: bytes) -> Bytes:
    """The stripe that ``code`` makes of ``base``.

    Raises:
        WireError: the code is malformed.
    """
    k = _Kind(kind)
    old = k.elements(base)
    new, classes, step_classes = old.copy(), k.gap_classes(old, top), k.step_classes(old, top)
    if len(code) <= 16 or max(code[:GAP_CLASSES]) > MAX_GAP_PARAM:
        raise WireError("a delta is malformed: its parameters")
    step_params = [code[GAP_CLASSES + s // 2] >> (s % 2 * 4) & 15 for s in range(STEP_CLASSES)]
    reader = _Reader(code[16:])
    members = [np.flatnonzero(classes == c) for c in range(GAP_CLASSES)]
    following = [reader.take_rice(code[c]) for c in range(GAP_CLASSES)]
    pending = {int(members[c][n]): c for c, n in enumerate(following) if n < len(members[c])}
    while pending:
        at = min(pending)
        c = pending.pop(at)
        is_down, param = reader.take(1), step_params[int(step_classes[at])]
        size = 1 if param == ALL_ONES else reader.take_rice(param) + 1
        new[at] = k.moved(int(old[at]), -size if is_down else size)
        following[c] += 1 + reader.take_rice(code[c])
        if following[c] < len(members[c]):
            pending[int(members[c][following[c]])] = c
    if following != [len(m) for m in members]:
        raise WireError("a delta is malformed: a gap leads beyond its class")
    if len(reader.text) - reader.at >= 8 or "1" in reader.text[reader.at :]:
        raise WireError("a delta is malformed: it goes on beyond its last change")
    return new.astype(k.dtype).view(np.uint8)


def encode_delta(
    fresh: Bytes, base: Bytes, cuts: Sequence[tuple[int, int]], base_seq: int, base_digest: int
) -> bytes | None:
    """The code of a bucket, or None where it would not be smaller.

    Args:
        fresh, base: ``[used_bytes]`` u8.
        cuts: bytes and kind (`WORDS` or `BYTES`) of each stripe.
        base_seq, base_digest: what names the base.
    """
    entries, codes, at = [], [], 0
    for span, kind in cuts:
        span, kind = int(span), int(kind)
        found, top, code = encode_stripe(fresh[at : at + span], base[at : at + span], kind)
        entries.append(ENTRY.pack(span, len(code), found, top, 0))
        codes.append(code)
        at += span
    body = b"".join(entries + codes)
    size = HEADER.size + len(body)
    return HEADER.pack(MAGIC, len(entries), base_seq, base_digest, at, size) + body if size < at else None


def apply_delta(base: Bytes, code: bytes, base_seq: int, base_digest: int) -> Bytes:
    """The bucket that ``code`` makes of ``base``.

    Raises:
        WireError: the code is malformed or of another base.
    """
    if len(code) < HEADER.size:
        raise WireError(f"a delta is malformed: {len(code)} bytes hold no header")
    magic, num_stripes, seq, digest, used, size = HEADER.unpack_from(code)
    if (magic, seq, digest, used, size) != (MAGIC, base_seq, base_digest, len(base), len(code)):
        raise WireError(f"a delta of {size} bytes against publish {seq} does not fit publish {base_seq}")
    if num_stripes > (size - HEADER.size) // ENTRY.size:
        raise WireError(f"a delta is malformed: {num_stripes} stripes have no room in {size} bytes")
    made, at, code_at = [], 0, HEADER.size + num_stripes * ENTRY.size
    for i in range(num_stripes):
        span, num_bytes, kind, top, zero = ENTRY.unpack_from(code, HEADER.size + i * ENTRY.size)
        fits = {SAME: num_bytes == 0, RAW: num_bytes == span}.get(kind, num_bytes < span)
        if (
            kind > BYTES
            or zero
            or not fits
            or span == 0
            or span % 256
            or span > MAX_SPAN
            or (kind <= RAW and top)
            or at + span > used
            or code_at + num_bytes > size
        ):
            raise WireError(f"a delta is malformed: stripe {i}")
        old, piece = base[at : at + span], code[code_at : code_at + num_bytes]
        if kind == SAME:
            made.append(old)
        else:
            made.append(np.frombuffer(piece, np.uint8) if kind == RAW else apply_stripe(old, kind, top, piece))
        at, code_at = at + span, code_at + num_bytes
    if at != used or code_at != size:
        raise WireError(f"a delta is malformed: it ends at byte {code_at} of {size}")
    return np.concatenate(made)
