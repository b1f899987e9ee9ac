"""Exit statuses of verdicts."""

from __future__ import annotations

from wsync.topo.findings import Verdict

NAGIOS: dict[Verdict, int] = {"OK": 0, "WARN": 1, "CRIT": 2, "UNKNOWN": 3}
"""Source: Monitoring Plugins Development Guidelines, plugin return codes."""


def exit_of(verdict: Verdict) -> int:
    """Exit status of a verdict."""
    return NAGIOS[verdict]
