"""Descriptors: fixed-size records that bind a plan's slice to addresses. CPU, CUDA and Triton execute the same ones.

The byte layout is the contract with ``csrc/core/descriptors.h``, which repeats it field by field; a test compares
sizes and offsets. All addresses are absolute. Extents and strides are outer to inner; unused dimensions have extent 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wsync.errors import ManifestError

NUM_DIMS = 4
"""Dimensions of a descriptor. Boxes of more dimensions are collapsed or split when the program is compiled."""

OP_COPY = 0
"""Bytes as they are (``elem_bytes`` each); refuses non-finite values of a float source dtype, `SRC_BYTES` is not
looked at. Takes every source dtype but `SRC_F32`, which asks for a rounding."""
OP_BF16 = 1
"""bf16 source, or f32 source rounded to bf16 (RNE); refuses non-finite values."""
OP_FP8_BLOCK128 = 2
"""e4m3 with power-of-two scales; every scale block of the box is whole: its amax is taken here."""
OP_FP8_BLOCK128_F32 = 3
"""e4m3 with f32 scales; every scale block of the box is whole."""
OP_FP8_SCALED = 4
"""e4m3 with scales that the scale table already holds (power of two or not): blocks cut by an edge."""

SRC_BYTES = 0
SRC_BF16 = 1
SRC_F32 = 2
SRC_F16 = 3
SRC_F32_EXACT = 4
SRC_F64 = 5
"""Source dtypes: any bytes, bf16, f32 (rounded to bf16 first), f16 (as given, through exact f32), f32 (as given), f64
(of copies only)."""

PACK_DESC = np.dtype(
    [
        ("src", "<u8"),  # address of the box's first element
        ("src_stride", "<i8", (NUM_DIMS,)),  # in elements
        ("extent", "<i8", (NUM_DIMS,)),  # the packed form is row major over these
        ("dst_offset", "<u8"),  # bytes from the bucket's base; a multiple of 256
        ("wire_word", "<u8"),  # digest key of the first 8-byte word: logical wire offset / 8
        ("scales", "<u8"),  # address of the f32 scale of the box's first scale block, or 0
        ("scale_stride", "<i8"),  # f32 elements from one row of scale blocks to the next
        ("row_phase", "<i4"),  # first row modulo the block's rows, in the tensor's own grid
        ("col_phase", "<i4"),
        ("op", "<i4"),
        ("src_dtype", "<i4"),
        ("elem_bytes", "<i4"),  # bytes of one source element
        ("piece_idx", "<i4"),  # position of this descriptor in its bucket, for messages
    ]
)
"""Packs one box into a bucket. The fp8 operations quantise ``extent[2] x extent[3]`` matrices, one for each outer
index; their ``extent[0]`` and ``extent[1]`` are 1 (the compiler emits one descriptor per matrix)."""

AMAX_DESC = np.dtype(
    [
        ("src", "<u8"),
        ("src_stride", "<i8", (2,)),
        ("extent", "<i8", (2,)),
        ("amax", "<u8"),  # address of the f32 amax of the box's first scale block, in the exchanged vector
        ("amax_stride", "<i8"),  # f32 elements between rows of scale blocks
        ("scales", "<u8"),  # address of the same block's scale in the rank's table, written after the exchange
        ("scale_stride", "<i8"),
        ("row_phase", "<i4"),
        ("col_phase", "<i4"),
        ("src_dtype", "<i4"),
        ("recipe_op", "<i4"),  # OP_FP8_BLOCK128 or OP_FP8_BLOCK128_F32: which rule turns amax into a scale
    ]
)
"""A part of a scale block that another rank or piece shares: its amax is exchanged before packing."""

UNPACK_DESC = np.dtype(
    [
        ("dst", "<u8"),  # address of the box's first element in engine memory
        ("dst_stride", "<i8", (NUM_DIMS,)),  # in elements
        ("extent", "<i8", (NUM_DIMS,)),
        ("src_offset", "<u8"),  # bytes from the bucket's base
        ("wire_word", "<u8"),
        ("elem_bytes", "<i4"),
        ("piece_idx", "<i4"),
    ]
)
"""Scatters one packed box into engine memory."""


def descriptor_dims(strides: Sequence[int], shape: Sequence[int], name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Strides and extents of a descriptor: dimensions of one element dropped, filled up on the outside.

    Raises:
        ManifestError: more than `NUM_DIMS` dimensions remain; ``name`` says of what. The planner makes no such piece.
    """
    kept = [(s, n) for s, n in zip(strides, shape, strict=True) if n != 1]
    if len(kept) > NUM_DIMS:
        raise ManifestError(
            f"a piece of {name!r} has {len(kept)} dimensions (shape {tuple(shape)}), descriptors have {NUM_DIMS}"
        )
    fill = NUM_DIMS - len(kept)
    return (0,) * fill + tuple(s for s, _ in kept), (1,) * fill + tuple(n for _, n in kept)
