"""One line with performance data, as Nagios, Icinga and others read it.

Source: Monitoring Plugins Development Guidelines, "Plugin Output" and "Performance data".
"""

from __future__ import annotations

from wsync.topo.findings import Finding, Verdict
from wsync.topo.render.summary import count_findings, plural, root_findings, where
from wsync.topo.report import Report

WORDS: dict[Verdict, str] = {"OK": "OK", "WARN": "WARNING", "CRIT": "CRITICAL", "UNKNOWN": "UNKNOWN"}
MAX_TEXT = 600
"""Characters before the performance data; monitoring systems cut at 1024 or 4096."""


def nagios_line(report: Report, verdict: Verdict | None = None) -> str:
    """``TOPO CRITICAL - node7 GPU1: nvlink.gpu-isolated: ... | 'crit'=1;;0;0 ...``, without a line end.

    The first finding of the worst severity is told, others are counted. Thresholds in the performance data are those of
    the verdict: any CRIT is critical, any WARN a warning.

    Args:
        report: what was found.
        verdict: the word to begin with, where ``--fail-on`` makes it another than the report's.
    """
    counts = count_findings(root_findings(report))
    hosts = len(report.machines)
    bad = sum(m.verdict != "OK" for m in report.machines)
    values = [
        f"crit={counts['CRIT']};;0;0",
        f"warn={counts['WARN']};0;;0",
        f"unknown={counts['UNKNOWN']};;;0",
        f"info={counts['INFO']};;;0",
        f"hosts={hosts};;;0",
        f"hosts_not_ok={bad};;;0;{hosts}",
        f"gpus={sum(m.num_gpus for m in report.machines)};;;0",
        f"nics={sum(m.num_nics for m in report.machines)};;;0",
    ]
    return f"{status_text(verdict or report.verdict, _say(report))} | {' '.join(values)}"


def status_text(verdict: Verdict, text: str) -> str:
    """The part before the performance data; what the format reserves is replaced."""
    plain = " ".join(text.replace("|", "/").split())
    plain = "".join(c if c.isprintable() else "?" for c in plain)
    if len(plain) > MAX_TEXT:
        plain = plain[: MAX_TEXT - 3] + "..."
    return f"TOPO {WORDS[verdict]} - {plain}"


def _say(report: Report) -> str:
    findings = [f for f in root_findings(report) if f.severity != "INFO"]
    if not findings:
        hosts, gpus = len(report.machines), sum(m.num_gpus for m in report.machines)
        nics = sum(m.num_nics for m in report.machines)
        return f"{plural(hosts, 'host')}, {plural(gpus, 'GPU')}, {plural(nics, 'NIC')}, nothing above INFO"
    others = f" (+{len(findings) - 1} more)" if len(findings) > 1 else ""
    return f"{_subject(findings[0])}{findings[0].id}: {findings[0].evidence}{others}"


def _subject(finding: Finding) -> str:
    parts = [p for p in (finding.subject.host, where(finding)) if p]
    return f"{' '.join(parts)}: " if parts else ""
