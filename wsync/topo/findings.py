"""What a check says: findings, their severity, and whom they concern."""

from __future__ import annotations

from typing import Literal

import msgspec

Severity = Literal["INFO", "UNKNOWN", "WARN", "CRIT"]
Verdict = Literal["OK", "WARN", "CRIT", "UNKNOWN"]

SEVERITY_RANK: dict[str, int] = {"OK": 0, "INFO": 0, "UNKNOWN": 1, "WARN": 2, "CRIT": 3}
"""A known fault says more than a missing part: WARN and CRIT stand above UNKNOWN."""

GUIDE = "docs/guides/topo.md"


class Subject(msgspec.Struct, frozen=True, omit_defaults=True):
    """Whom a finding concerns.

    Attributes:
        host: its name, or None where no input tells it.
        devices: labels (``GPU3``, ``mlx5_0``), or other parts of the host (``NUMA node 7``).
        bus_ids: of the devices, those that are known.
        ranks: of an NCCL communicator.
    """

    host: str | None = None
    devices: tuple[str, ...] = ()
    bus_ids: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()


class Finding(msgspec.Struct, frozen=True, omit_defaults=True):
    """One finding.

    Attributes:
        id: stable name, ``area.what``; anchors of the guide have the same.
        severity: INFO is worth knowing and no fault.
        subject: whom it concerns.
        evidence: what was seen, and in which input.
        expected: what should have been seen.
        remedy: what to do.
        link: where the guide explains it.
        symptoms: findings that this one explains.
    """

    id: str
    severity: Severity
    subject: Subject
    evidence: str
    expected: str = ""
    remedy: str = ""
    link: str = ""
    symptoms: tuple[Finding, ...] = ()


def guide_link(finding_id: str) -> str:
    """Where the guide explains a finding."""
    return f"{GUIDE}#{finding_id.replace('.', '').lower()}"


def worst(findings: tuple[Finding, ...] | list[Finding]) -> Verdict:
    """The verdict that findings add up to."""
    rank = max((SEVERITY_RANK[f.severity] for f in findings), default=0)
    verdicts: tuple[Verdict, ...] = ("OK", "UNKNOWN", "WARN", "CRIT")
    return verdicts[rank]
