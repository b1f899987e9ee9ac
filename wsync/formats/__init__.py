"""The recipes' reference arithmetic, the codecs of small floats, and the digest: plain and slow."""

from wsync.formats.bf16 import round_to_bf16
from wsync.formats.digest import DIGEST_KEY, digest_bytes, digest_words
from wsync.formats.e2m1 import decode_e2m1, encode_e2m1
from wsync.formats.e4m3 import decode_e4m3, encode_e4m3
from wsync.formats.e8m0 import decode_e8m0, encode_e8m0_ceil
from wsync.formats.reference import dequantize_reference, part_names, quantize_reference
from wsync.formats.requant import requantize_e8m0_reference

__all__ = [
    "DIGEST_KEY",
    "decode_e2m1",
    "decode_e4m3",
    "decode_e8m0",
    "dequantize_reference",
    "digest_bytes",
    "digest_words",
    "encode_e2m1",
    "encode_e4m3",
    "encode_e8m0_ceil",
    "part_names",
    "quantize_reference",
    "requantize_e8m0_reference",
    "round_to_bf16",
]
