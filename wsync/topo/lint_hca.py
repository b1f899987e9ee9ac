"""``NCCL_IB_HCA``: which devices a value selects, and what is wrong with it.

Source: NCCL 2.30.7 ``src/transport/net_ib/init.cc`` (one ``^`` and one ``=`` at the start of the whole list) and
``parseStringList``, ``matchIf`` of ``src/misc/utils.cc`` (prefixes unless exact).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from wsync.topo.findings import Finding, Severity, Subject, guide_link

MAX_DEVICES = 32
"""More entries are not read."""


class HcaValue(NamedTuple):
    """A value as NCCL takes it apart; an entry keeps its port, rail and plane."""

    excludes: bool
    exact: bool
    entries: tuple[str, ...]

    @property
    def devices(self) -> tuple[str, ...]:
        """Names, or the starts of names."""
        return tuple(e.partition(":")[0] for e in self.entries)


def parse_value(value: str) -> HcaValue:
    """Take a value apart as NCCL does; a second ``=`` stays part of its entry."""
    text = value.strip()
    excludes = text.startswith("^")
    text = text[1:] if excludes else text
    exact = text.startswith("=")
    text = text[1:] if exact else text
    return HcaValue(excludes, exact, tuple(e for e in text.split(",") if e.partition(":")[0]))


def select_devices(value: str, names: Sequence[str]) -> tuple[str, ...]:
    """Those of ``names`` that NCCL uses."""
    parsed = parse_value(value)

    def listed(name: str) -> bool:
        if not parsed.entries:
            return True
        return any(name == d if parsed.exact else name.startswith(d) for d in parsed.devices)

    return tuple(n for n in names if listed(n) != (parsed.excludes and bool(parsed.entries)))


def lint_hca(value: str, names: Sequence[str], source: str) -> Iterator[Finding]:
    """Lint one value.

    Args:
        value: of ``NCCL_IB_HCA``.
        names: of the host's devices; empty where they are not known.
        source: where the value stands.
    """
    parsed = parse_value(value)
    where = f"NCCL_IB_HCA={value} in {source}"
    twice = [e for e, n in Counter(parsed.entries).items() if n > 1]
    if twice:
        text = f"{where}: {', '.join(twice)} is listed twice"
        yield _finding(
            "lint.hca-twice", "WARN", twice, text, "each device once", "one of them was to be another device"
        )
    yield from _prefixes(parsed, value, names, where)
    yield from _against_names(parsed, value, names, where)
    if len(parsed.entries) > MAX_DEVICES:
        text = f"{where}: {len(parsed.entries)} entries"
        yield _finding("lint.hca-many", "WARN", [], text, f"at most {MAX_DEVICES}", "NCCL does not read the rest")


def _prefixes(parsed: HcaValue, value: str, names: Sequence[str], where: str) -> Iterator[Finding]:
    marked = [e for e in parsed.entries if e[0] in "=^"]
    if marked:
        clean = [e.lstrip("^=") for e in parsed.entries]
        right = ("^" if parsed.excludes else "") + "=" + ",".join(clean)
        effect = "are part of the names, so that these entries match no device"
        yield _finding(
            "lint.hca-prefix",
            "CRIT",
            [e.lstrip("^=") for e in marked],
            f"{where}: the marks of {_some(marked)} {effect}; "
            f"NCCL would use {_some(select_devices(value, names or clean)) or 'none'}",
            "one = or ^= before the whole list",
            f"NCCL_IB_HCA={right}",
        )
    if parsed.exact or marked:
        return
    wide = {d: [n for n in names if n.startswith(d) and n != d] for d in parsed.devices if d in names}
    wide = {d: more for d, more in wide.items() if more}
    if wide:
        text = "; ".join(f"{d} also selects {_some(more)}" for d, more in wide.items())
        yield _finding("lint.hca-ambiguous", "WARN", list(wide), f"{where}: {text}", "exact names", "write = before it")
    elif not names and any(d[-1].isdigit() for d in parsed.devices):
        text = f"{where}: without = each entry is the start of names, mlx5_1 also of mlx5_10"
        yield _finding("lint.hca-ambiguous", "INFO", [], text, "exact names", "write = before the list")


def _against_names(parsed: HcaValue, value: str, names: Sequence[str], where: str) -> Iterator[Finding]:
    if not names:
        return
    absent = [
        d
        for d in dict.fromkeys(parsed.devices)
        if d[0] not in "=^" and not any(n == d if parsed.exact else n.startswith(d) for n in names)
    ]
    if absent:
        text = f"{where} names {', '.join(absent)}: the host has {_some(names)}"
        yield _finding("lint.hca-absent", "WARN", absent, text, "devices of this host", "correct the list")
    if not select_devices(value, names):
        text = f"{where} selects none of {_some(names)}"
        yield _finding("lint.hca-none", "CRIT", [], text, "at least one device", "NCCL falls back to TCP sockets")


def _finding(
    finding_id: str, severity: Severity, devices: Sequence[str], evidence: str, expected: str, remedy: str
) -> Finding:
    subject = Subject(devices=tuple(devices))
    return Finding(finding_id, severity, subject, evidence, expected, remedy, guide_link(finding_id))


def _some(names: Sequence[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
