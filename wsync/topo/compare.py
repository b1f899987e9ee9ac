"""Hosts of one kind, compared with each other: groups that look alike, and what the others have different."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from wsync.topo.findings import Finding, Subject, Verdict, guide_link, worst
from wsync.topo.golden import findings_of, name_of
from wsync.topo.golden_facts import Facts, facts_of, fingerprint
from wsync.topo.model import Machine

COMPARE_VERSION = 1
"""Version of ``wsync topo compare --json``."""


class Group(msgspec.Struct, frozen=True):
    """Hosts with one fingerprint."""

    fingerprint: str
    hosts: tuple[str, ...]


class Comparison(msgspec.Struct, frozen=True):
    """The groups, the largest first, and findings for all hosts that are not in it.

    Attributes:
        verdict: of the findings.
        categories: kinds of facts that were compared: those that every host has.
        groups: of hosts.
        findings: what outliers have different.
    """

    verdict: Verdict
    categories: tuple[str, ...]
    groups: tuple[Group, ...]
    findings: tuple[Finding, ...]
    format_version: int = COMPARE_VERSION


def compare(machines: Sequence[Machine]) -> Comparison:
    """Compare hosts with the majority; without one, the largest groups with each other."""
    readable = [m for m in machines if not any(g.fatal for g in m.gaps)]
    all_facts = {i: facts_of(m) for i, m in enumerate(readable)}
    shared = _shared(all_facts.values())
    facts: dict[int, Facts] = {i: {c: f[c] for c in shared} for i, f in all_facts.items()}
    members: dict[str, list[int]] = {}
    for i, of_host in facts.items():
        members.setdefault(fingerprint(of_host), []).append(i)
    order = sorted(members, key=lambda p: (-len(members[p]), members[p][0]))
    groups = tuple(Group(p, tuple(name_of(readable[i]) for i in members[p])) for p in order)
    findings = [*_unread(machines), *_dropped(all_facts.values(), shared, readable)]
    if len(groups) > 1:
        findings += _outliers(readable, facts, [members[p] for p in order])
    return Comparison(worst(findings), shared, groups, tuple(findings))


def _shared(facts: Iterable[Facts]) -> tuple[str, ...]:
    sets = [set(f) for f in facts]
    return tuple(sorted(set.intersection(*sets))) if sets else ()


def _outliers(machines: Sequence[Machine], facts: dict[int, Facts], groups: list[list[int]]) -> list[Finding]:
    out: list[Finding] = []
    total, first = len(machines), groups[0]
    if 2 * len(first) <= total:
        sizes = ", ".join(f"{len(g)} like {name_of(machines[g[0]])}" for g in groups[:4])
        out.append(
            Finding(
                "host.no-majority",
                "WARN",
                Subject(),
                f"{total} hosts are of {len(groups)} kinds, and no kind has most of them: {sizes}",
                "hosts of one kind",
                "compare hosts of one kind; differences below are from the first group",
                guide_link("host.no-majority"),
            )
        )
    reference = f"{name_of(machines[first[0]])} and {len(first) - 1} others of {total} hosts have"
    if len(first) == 1:
        reference = f"{name_of(machines[first[0]])} has"
    for i in (i for group in groups[1:] for i in group):
        host = name_of(machines[i])
        found = findings_of(host, facts[first[0]], facts[i], "host.differs", "")
        out += [msgspec.structs.replace(f, expected=f"as {reference} it") for f in found]
    return out


def _unread(machines: Sequence[Machine]) -> list[Finding]:
    link = guide_link("input.unreadable")
    return [
        Finding("input.unreadable", "UNKNOWN", Subject(name_of(m)), g.what, "a whole input", "record it again", link)
        for m in machines
        for g in m.gaps
        if g.fatal
    ]


def _dropped(all_facts: Iterable[Facts], shared: tuple[str, ...], machines: Sequence[Machine]) -> list[Finding]:
    """Kinds of facts that some hosts have and others do not."""
    every = list(all_facts)
    known = sorted({c for f in every for c in f} - set(shared))
    out = []
    for category in known:
        lacking = [name_of(m) for m, f in zip(machines, every, strict=True) if category not in f]
        out.append(
            Finding(
                "host.not-compared",
                "INFO",
                Subject(devices=tuple(lacking)),
                f"{category}: not in the inputs of {len(lacking)} of {len(every)} hosts ({', '.join(lacking[:4])})",
                "the same tools' output of all hosts",
                "record it there, too: this is not compared",
                guide_link("host.not-compared"),
            )
        )
    if machines and not shared:
        link = guide_link("host.not-compared")
        out.append(Finding("host.not-compared", "UNKNOWN", Subject(), "no fact is known of all hosts", "", "", link))
    return out
