"""Golden files: how a machine of a kind looks when it is right, to compare others with.

A golden file is JSON with a version, the facts of one machine and their fingerprint; it names no host, UUID or bus id,
so that one file serves all machines of the kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from wsync.errors import ConfigError, DigestError, FormatVersionError
from wsync.spec.files import write_file
from wsync.spec.json_text import encode_json
from wsync.topo.files import read_regular
from wsync.topo.findings import Finding, Severity, Subject, Verdict, guide_link, worst
from wsync.topo.golden_facts import SERIOUS, Difference, Facts, differences, facts_of, fingerprint
from wsync.topo.model import Machine
from wsync.topo.parse.text import MAX_INPUT_BYTES

GOLDEN_VERSION = 1
"""Version of golden files and of the reports about them."""
KIND: Literal["wsync-topology-golden"] = "wsync-topology-golden"


class Golden(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A golden file."""

    fingerprint: str
    facts: dict[str, dict[str, str]]
    format_version: int = GOLDEN_VERSION
    kind: Literal["wsync-topology-golden"] = KIND


class GoldenReport(msgspec.Struct, frozen=True):
    """Hosts compared with a golden file."""

    verdict: Verdict
    fingerprint: str
    hosts: dict[str, str]
    findings: tuple[Finding, ...]
    format_version: int = GOLDEN_VERSION


class _Version(msgspec.Struct):
    kind: str
    format_version: int


def make_golden(machines: Sequence[Machine]) -> Golden:
    """The golden file of machines that are all alike.

    Raises:
        ConfigError: none, an input that is not whole, or machines that differ; the message has the first differences.
    """
    if not machines:
        raise ConfigError("a golden file needs at least 1 machine, got 0")
    for gap in (g for m in machines for g in m.gaps):
        raise ConfigError(
            f"{gap.source} lacks {gap.what}" if not gap.fatal else gap.what, hint="a golden file needs whole inputs"
        )
    facts = facts_of(machines[0])
    for machine in machines[1:]:
        other = facts_of(machine)
        if other != facts:
            found = "; ".join(map(str, differences(facts, other)[:4])) or "other facts were recorded"
            raise ConfigError(
                f"{name_of(machine)} ({fingerprint(other)}) is not like {name_of(machines[0])} ({fingerprint(facts)}): "
                f"{found}",
                hint="`wsync topo compare` says which hosts are alike",
            )
    if not facts:
        raise ConfigError("the inputs have no facts to keep")
    return Golden(fingerprint(facts), facts)


def encode_golden(golden: Golden) -> bytes:
    """Indented JSON."""
    return encode_json(golden)


def decode_golden(data: bytes, name: str) -> Golden:
    """Read a golden file, strictly.

    Raises:
        FormatVersionError: of another version.
        DigestError: its facts were changed and its fingerprint was not.
        ConfigError: too long, not JSON, or something else.
    """
    if len(data) > MAX_INPUT_BYTES:
        raise ConfigError(f"{name} has {len(data)} bytes, allowed are {MAX_INPUT_BYTES}")
    try:
        head = msgspec.json.decode(data, type=_Version)
        if head.kind == KIND and head.format_version != GOLDEN_VERSION:
            raise FormatVersionError(
                f"{name}: a golden file of version {head.format_version}, this wsync reads {GOLDEN_VERSION}"
            )
        golden = msgspec.json.decode(data, type=Golden)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{name} is no golden file: {e}", hint="`wsync topo golden save` writes one") from e
    found = fingerprint(golden.facts)
    if found != golden.fingerprint:
        raise DigestError(f"{name}: its facts have the fingerprint {found}, it says {golden.fingerprint}")
    return golden


def load_golden(path: str | Path) -> Golden:
    """Read a golden file. Raises as `decode_golden`; one that cannot be read is a `ConfigError`."""
    return decode_golden(read_regular(path, MAX_INPUT_BYTES + 1), str(path))


def save_golden(golden: Golden, path: str | Path) -> None:
    """Write a golden file: whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    write_file(path, encode_golden(golden), 0o644)


def is_golden(path: str | Path) -> bool:
    """Whether a file says that it is a golden file."""
    try:
        return msgspec.json.decode(read_regular(path, MAX_INPUT_BYTES + 1), type=_Version).kind == KIND
    except (ConfigError, ValueError, RecursionError):
        return False


def check_golden(golden: Golden, machines: Sequence[Machine]) -> GoldenReport:
    """Compare machines with a golden file."""
    findings: list[Finding] = []
    hosts = {}
    for machine in machines:
        facts = facts_of(machine)
        hosts[name_of(machine)] = fingerprint(facts)
        findings += findings_of(machine.host, golden.facts, facts, "host.golden-differs", "the golden file")
        findings += _unread(machine)
        absent = [c for c in golden.facts if c not in facts]
        if absent:
            findings.append(_not_compared(machine.host, absent, len(golden.facts)))
    return GoldenReport(worst(findings), golden.fingerprint, hosts, tuple(findings))


def findings_of(host: str | None, expected: Facts, found: Facts, finding_id: str, reference: str) -> list[Finding]:
    """One finding for each category that differs; the device that all differences share is its subject."""
    by_category: dict[str, list[Difference]] = {}
    for difference in differences(expected, found):
        by_category.setdefault(difference.category, []).append(difference)
    out = []
    for category, some in by_category.items():
        serious = category in SERIOUS and any(d.expected is not None for d in some)
        severity: Severity = "CRIT" if serious else "WARN"
        shown = "; ".join(map(str, some[:6])) + (f" and {len(some) - 6} more" if len(some) > 6 else "")
        out.append(
            Finding(
                finding_id,
                severity,
                Subject(host, devices_of(some)),
                f"{category}: {shown}",
                f"as {reference} has it",
                "`wsync topo check` this host; where it is right as it is now, save the golden file again",
                guide_link(finding_id),
            )
        )
    return out


def devices_of(some: Sequence[Difference]) -> tuple[str, ...]:
    """The devices that are in every difference, else all devices, in order."""
    sets = [d.name.partition(" ")[0].split("-") for d in some]
    common = [x for x in sets[0] if all(x in s for s in sets)]
    named = common if common and len(some) > 1 else list(dict.fromkeys(x for s in sets for x in s))
    return tuple(x for x in named if x not in ("number", "command"))


def name_of(machine: Machine) -> str:
    """The host, or its first input."""
    return machine.host or (machine.sources[0] if machine.sources else "a machine")


def _unread(machine: Machine) -> list[Finding]:
    link = guide_link("input.unreadable")
    return [
        Finding("input.unreadable", "UNKNOWN", Subject(machine.host), g.what, "a whole input", "record it again", link)
        for g in machine.gaps
        if g.fatal
    ]


def _not_compared(host: str | None, absent: list[str], total: int) -> Finding:
    all_absent = len(absent) == total
    return Finding(
        "host.not-compared",
        "UNKNOWN" if all_absent else "INFO",
        Subject(host),
        f"{len(absent)} of {total} kinds of facts are not in the inputs: {', '.join(absent)}",
        "the inputs that the golden file was made from",
        "record the same tools' output as then",
        guide_link("host.not-compared"),
    )
