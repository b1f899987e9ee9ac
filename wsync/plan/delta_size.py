"""How many bytes a delta is expected to have, so that the plan balances what will travel and not what is there.

Source: the encoding of ``docs/wire_format.md`` ("Deltas"; `wsync.formats.delta` is its definition): each change costs
its sign and the Rice code of the gap before it. A gap of independent changes of density p is geometric.
"""

from __future__ import annotations

import math
from functools import lru_cache

from wsync.errors import ConfigError

_MAX_PARAM = 20
_RAW_FROM = 0.5
"""Where half of the elements change, a stripe travels as it is."""
_GAP_CLASSES = 8
_HEADER_BITS = 8 * (12 + 16)
"""Of a stripe: its entry and its parameters. The header of the bucket is shared by many units."""


@lru_cache(maxsize=4096)
def bits_per_change(density: float, num_elements: int) -> float:
    """Expected bits of one changed element: its sign and the gap that leads to it.

    With the Rice parameter k a gap g has ``(g >> k) + 1 + k`` bits; for a geometric gap the expectation of ``g >> k``
    is ``q / (1 - q)`` with ``q = (1 - density) ** 2**k``. No gap is longer than all ``num_elements``.
    """
    mean = (1.0 - density) / density
    k = 0
    while k < _MAX_PARAM and (1 << (k + 1)) <= mean + 0.5:
        k += 1
    # Of densities near 0, 1 - density is 1: take logarithms.
    log_q = (1 << k) * math.log1p(-density)
    longest = num_elements / (1 << k)
    return 1.0 + k + 1.0 + min(longest, math.exp(log_q) / -math.expm1(log_q))


class Densities:
    """The density of each tensor, by the longest prefix of its name.

    Args:
        density: as in `PlanOptions`.

    Raises:
        ConfigError: a density that is no number from 0 to 1, or a prefix that is no text.
    """

    def __init__(self, density: float | dict[str, float] | None) -> None:
        by_prefix = _by_prefix(density)
        for prefix, value in by_prefix.items():
            where = f"density of {prefix!r}" if prefix else "density"
            if not _is_number(value) or not 0.0 <= value <= 1.0:  # also False for NaN
                raise ConfigError(f"{where} is {value!r}, allowed is 0 to 1")
        self._prefixes = sorted(by_prefix.items(), key=lambda p: (-len(p[0]), p[0]))

    def of(self, name: str) -> float | None:
        """The density of a tensor, None where none is given: it travels whole."""
        for prefix, value in self._prefixes:
            if name.startswith(prefix):
                return value
        return None


def _by_prefix(density: float | dict[str, float] | None) -> dict[str, float]:
    if density is None:
        return {}
    if not isinstance(density, dict):
        return {"": density}
    for prefix in density:
        if not isinstance(prefix, str):
            raise ConfigError(f"density has the key {prefix!r}, allowed are prefixes of tensor names, as str")
    return density


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def expected_bytes(nbytes: int, elem_bytes: int, density: float) -> int:
    """What travels of ``nbytes`` of elements: the delta, or all of it where that is not smaller.

    Args:
        nbytes: as packed.
        elem_bytes: of one element; elements of more than two bytes are compared by 16-bit words.
        density: share of the compared elements that changes.
    """
    if density >= _RAW_FROM:
        return nbytes
    num_elements = nbytes // min(elem_bytes, 2)
    changes = num_elements * density
    bits = float(_HEADER_BITS)
    if changes:
        each = bits_per_change(density, num_elements)
        # Behind the last change of each class of exponents there is a gap, too.
        bits += changes * each + min(_GAP_CLASSES, changes) * (each - 1.0)
    return min(nbytes, math.ceil(bits / 8))
