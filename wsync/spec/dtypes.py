"""Dtypes by their torch names, without torch."""

from __future__ import annotations

from wsync.errors import DtypeMismatchError

ITEMSIZE: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e8m0fnu": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
    "uint64": 8,
    "float64": 8,
}
"""Bytes of one element. The keys are the dtypes that wsync moves."""


def itemsize(dtype: str) -> int:
    """Bytes of one element of ``dtype``.

    Raises:
        DtypeMismatchError: wsync does not move this dtype.
    """
    try:
        return ITEMSIZE[dtype]
    except KeyError:
        known = ", ".join(ITEMSIZE)
        raise DtypeMismatchError(f"dtype {dtype!r} is not one of those that wsync moves ({known})") from None


def same_bytes(a: str, b: str) -> bool:
    """Whether memory of dtype ``a`` holds values of dtype ``b`` as they are: equal, or 8-bit floats kept as uint8."""
    return a == b or (a == "uint8" and b.startswith("float8_")) or (b == "uint8" and a.startswith("float8_"))
