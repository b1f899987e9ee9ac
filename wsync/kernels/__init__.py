"""CPU kernels behind descriptors: pack and quantise, amax and scales, unpack, transforms, digests.

Every operation takes raw addresses, releases the GIL, may be called from several threads on disjoint memory, and gives
the same bits for every ``num_threads`` (0: all processors of the process; the caller's thread works too) and every
``isa`` (``"auto"``: the widest, or what the environment variable ``WSYNC_ISA`` says; ``"avx512"``; ``"avx2"``;
``"scalar"``).

Memory that a descriptor names must stay valid and, where it is read, unchanged for the whole call: the kernels check
descriptors, not addresses.
"""

from wsync.kernels.delta import Cuts, Encoded, delta_apply, delta_cuts, delta_encode
from wsync.kernels.ops import (
    PackResult,
    amax,
    best_isa,
    digest,
    installed_digest,
    isas,
    memcpy,
    mismatched_duplicate,
    num_processors,
    pack,
    padding_digest,
    scales_from_amax,
    transform,
    unpack,
    zero_digest,
)
from wsync.kernels.weights import dequantize, quantize

__all__ = [
    "Cuts",
    "Encoded",
    "PackResult",
    "amax",
    "best_isa",
    "delta_apply",
    "delta_cuts",
    "delta_encode",
    "dequantize",
    "digest",
    "installed_digest",
    "isas",
    "memcpy",
    "mismatched_duplicate",
    "num_processors",
    "pack",
    "padding_digest",
    "quantize",
    "scales_from_amax",
    "transform",
    "unpack",
    "zero_digest",
]
