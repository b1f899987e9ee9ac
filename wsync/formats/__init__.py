"""The recipes' reference arithmetic, the e4m3 and bf16 codecs, and the digest: plain and slow."""

from wsync.formats.bf16 import round_to_bf16
from wsync.formats.digest import DIGEST_KEY, digest_bytes, digest_words
from wsync.formats.e4m3 import decode_e4m3, encode_e4m3
from wsync.formats.reference import dequantize_reference, part_names, quantize_reference

__all__ = [
    "DIGEST_KEY",
    "decode_e4m3",
    "dequantize_reference",
    "digest_bytes",
    "digest_words",
    "encode_e4m3",
    "part_names",
    "quantize_reference",
    "round_to_bf16",
]
