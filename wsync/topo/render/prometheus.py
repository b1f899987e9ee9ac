"""Metrics for node_exporter's textfile collector.

A label's value may be any UTF-8, with backslash, quote and line feed escaped; readers disagree on what else they take
(Prometheus ends at a NUL, some split lines at a carriage return), so that other control characters are replaced.

Source: Prometheus documentation, "Exposition formats", text format 0.0.4; node_exporter README, "Textfile Collector".
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable

from wsync.topo.findings import Verdict
from wsync.topo.render.summary import count_findings, distinct, host_names
from wsync.topo.report import MachineReport, Report

VERDICT_VALUES: dict[Verdict, int] = {"OK": 0, "WARN": 1, "CRIT": 2, "UNKNOWN": 3}

METRICS: dict[str, str] = {
    "wsync_topo_verdict": "Verdict on the host: 0 OK, 1 WARN, 2 CRIT, 3 UNKNOWN.",
    "wsync_topo_machine_info": "Always 1; what the host was recognised as.",
    "wsync_topo_complete": "1 if no input of the host lacks a part.",
    "wsync_topo_gpus": "GPUs in sight.",
    "wsync_topo_nics": "NICs in sight.",
    "wsync_topo_findings": "Findings of each severity; symptoms of another finding are not counted.",
    "wsync_topo_finding": "A finding above INFO, by its id and the devices that it concerns.",
    "wsync_topo_last_check_timestamp_seconds": "When this was written, in seconds since 1970.",
}
"""Gauges and their help texts. Stable: a metric may be added, and never renamed."""

LINE_ENDS = "\u2028\u2029"
REPLACEMENT = "\ufffd"

Sample = tuple[str, dict[str, str], float]


def prometheus_text(report: Report, now_s: float) -> str:
    """The metrics of all hosts, grouped by name, each label set once.

    Args:
        report: the verdict.
        now_s: time of the check, in seconds since 1970; alert on its age to notice a check that no longer runs.
    """
    hosts = distinct(_plain(name) for name in host_names(report))
    samples = [s for m, name in zip(report.machines, hosts, strict=True) for s in _of_machine(m, name)]
    samples += _of_findings(report, hosts)
    samples.append(("wsync_topo_last_check_timestamp_seconds", {}, now_s))
    lines = []
    for metric, help_text in METRICS.items():
        lines += [f"# HELP {metric} {help_text}", f"# TYPE {metric} gauge"]
        lines += [f"{metric}{_labels(labels)} {_number(value)}" for name, labels, value in samples if name == metric]
    return "\n".join(lines) + "\n"


def _of_machine(machine: MachineReport, name: str) -> Iterable[Sample]:
    host = {"host": name}
    yield "wsync_topo_verdict", host, VERDICT_VALUES[machine.verdict]
    yield "wsync_topo_machine_info", {**host, "platform": machine.platform, "joined": machine.joined}, 1
    yield "wsync_topo_complete", host, int(machine.complete)
    yield "wsync_topo_gpus", host, machine.num_gpus
    yield "wsync_topo_nics", host, machine.num_nics
    for severity, count in count_findings(machine.findings).items():
        yield "wsync_topo_findings", {**host, "severity": severity}, count


def _of_findings(report: Report, hosts: list[str]) -> Iterable[Sample]:
    """Findings with equal labels are one sample: a second one would make the collector refuse the whole file."""
    found = [(_plain(f.subject.host or ""), f) for f in report.findings]
    found += [(name, f) for m, name in zip(report.machines, hosts, strict=True) for f in m.findings]
    keys = Counter(
        (name, f.id, f.severity, _plain(" ".join(f.subject.devices[:16]))) for name, f in found if f.severity != "INFO"
    )
    for (host, finding_id, severity, devices), count in keys.items():
        labels = {"host": host, "id": finding_id, "severity": severity, "devices": devices}
        yield "wsync_topo_finding", labels, count


def _labels(labels: dict[str, str]) -> str:
    parts = [f'{name}="{_escape(value)}"' for name, value in labels.items()]
    return "{" + ",".join(parts) + "}" if parts else ""


def _plain(value: str) -> str:
    """Without what a reader may stumble over: control characters but the line feed, which is escaped; surrogates."""
    return "".join(REPLACEMENT if _is_refused(c) else c for c in value)


def _is_refused(char: str) -> bool:
    return char != "\n" and (unicodedata.category(char) in ("Cc", "Cs") or char in LINE_ENDS)


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:.3f}"
