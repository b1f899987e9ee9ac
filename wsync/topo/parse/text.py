"""What all parsers of text share: cleaning, limits, bus ids, lists of CPUs and NUMA nodes."""

from __future__ import annotations

import re
from collections.abc import Iterable

from wsync.errors import ConfigError

MAX_INPUT_BYTES = 16 << 20
"""Of one file. The XML of a 576-GPU domain has about 600 kB, the log of a large job more."""
MAX_LINE_CHARS = 1 << 16
MAX_WORDS_CHARS = 4096
"""Of a line of names and values; longer ones are none, and would keep patterns busy."""
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
"""First bytes of a text that PowerShell wrote."""
MAX_RATE = 1e6
"""Of a port or link, in any unit that is used here."""
MAX_DEVICES = 4096
"""Of one kind in one input; a larger index is damage, not a machine."""

_ANSI = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|[()][A-Z0-9])")
_QUOTE = re.compile(r"^[ \t]*[>|]+[ \t]?", re.M)
_BUS = re.compile(r"(?:([0-9a-fA-F]{1,8}):)?([0-9a-fA-F]{2}):([0-9a-fA-F]{2})(?:\.([0-7]))?")


def decode(data: bytes, name: str) -> str:
    """The text of a file, without escape codes, NULs and carriage returns.

    Raises:
        ConfigError: over `MAX_INPUT_BYTES`.
    """
    if len(data) > MAX_INPUT_BYTES:
        raise ConfigError(
            f"{name} has {len(data)} bytes, allowed are {MAX_INPUT_BYTES}", hint="cut out the part of one machine"
        )
    if data[:2] in UTF16_MARKS:
        return clean(data.decode("utf-16", "replace"))
    return clean(data.decode("utf-8-sig", "replace"))


def clean(text: str) -> str:
    """Without escape codes, NULs, carriage returns and a mail's marks of quotation; hard spaces become plain ones."""
    if "\x1b" in text:
        text = _ANSI.sub("", text)
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x00", "").replace("\xa0", " ")
    if text.lstrip()[:1] in (">", "|"):
        text = _QUOTE.sub("", text)
    return text


def bus_id(text: str) -> str | None:
    """``0000:19:00.0`` of ``00000000:19:00.0``, ``PCI:0000:19:00``, ``19:00.0``; None where there is none.

    NCCL's name of a fabric without a bus id (``fffffff:ff:ff.0``) stays what it is.
    """
    found = _BUS.search(text)
    if found is None:
        return None
    domain, bus, device, function = found.groups()
    width = 7 if domain is not None and domain.lower() == "fffffff" else 4
    return f"{int(domain or '0', 16):0{width}x}:{bus}:{device}.{function or 0}".lower()


def bus_id_of_number(number: int) -> str:
    """The bus id that NCCL packs into one number: domain from bit 20, bus from 12, device from 4, function from 0."""
    return f"{number >> 20:04x}:{number >> 12 & 0xFF:02x}:{number >> 4 & 0xFF:02x}.{number & 0xF:x}"


def expand(ranges: str) -> tuple[int, ...] | None:
    """The numbers of ``0,3-9,11``; None for what is not such a list."""
    found: list[int] = []
    for part in ranges.split(","):
        bounds = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if bounds is None:
            return None
        low = int(bounds[1])
        high = int(bounds[2]) if bounds[2] else low
        if high < low or high - low > MAX_DEVICES:
            return None
        found.extend(range(low, high + 1))
    return tuple(found)


def numbers(items: Iterable[int], limit: int = 8) -> str:
    """``0-3, 5`` of 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for i in sorted(set(items)):
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    shown = [f"{a}" if a == b else f"{a}-{b}" for a, b in runs]
    return ", ".join(shown[:limit]) + (", ..." if len(shown) > limit else "")


def gbit(text: str | None) -> float | None:
    """Gbit/s of ``200 Gb/sec (4X HDR)``; None where none stands there, or one that no port has."""
    found = re.match(r"\d{1,9}(?:\.\d{1,9})?", text or "")
    return possible_rate(float(found[0])) if found else None


def possible_rate(rate: float) -> float | None:
    """The rate, unless no link has it; 0 is none."""
    return rate if 0 < rate <= MAX_RATE else None


def speed_gtps(text: str | None) -> float | None:
    """GT/s per lane of ``32.0 GT/s PCIe``, ``16GT/s``; None where none stands there."""
    found = re.search(r"(\d+(?:\.\d+)?)\s*GT/s", text or "")
    return float(found[1]) if found else None
