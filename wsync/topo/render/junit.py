"""JUnit XML, which CI systems show: a suite for each host, a case for each finding.

Source: the de-facto schema of Jenkins' xUnit plugin (``testsuites``, ``testsuite``, ``testcase``, ``failure``,
``error``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from wsync.topo.findings import Finding
from wsync.topo.render.summary import host_names, where
from wsync.topo.report import Report


def junit_xml(report: Report) -> str:
    """WARN and CRIT are failures, UNKNOWN is an error, INFO passes with its text; a suite without one has a pass."""
    root = ElementTree.Element("testsuites", name="wsync topo")
    for machine, name in zip(report.machines, host_names(report), strict=True):
        _add_suite(root, name or "this machine", machine.findings)
    if report.findings:
        _add_suite(root, "between hosts", report.findings)
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def _add_suite(root: ElementTree.Element, name: str, findings: Sequence[Finding]) -> None:
    failures = sum(f.severity in ("WARN", "CRIT") for f in findings)
    errors = sum(f.severity == "UNKNOWN" for f in findings)
    counts = {"tests": str(max(1, len(findings))), "failures": str(failures), "errors": str(errors)}
    suite = ElementTree.SubElement(root, "testsuite", {"name": _clean(name), **counts})
    if not findings:
        ElementTree.SubElement(suite, "testcase", classname="topo", name="nothing found")
    for finding in findings:
        _add_case(suite, finding)


def _add_case(suite: ElementTree.Element, finding: Finding) -> None:
    area = finding.id.partition(".")[0]
    name = f"{finding.id} {where(finding)}".strip()
    case = ElementTree.SubElement(suite, "testcase", classname=f"topo.{area}", name=_clean(name))
    told = [finding.evidence, f"expected: {finding.expected}", f"what to do: {finding.remedy}", finding.link]
    text = _clean("\n".join(t for t in told if t and not t.endswith(": ")))
    if finding.severity == "INFO":
        ElementTree.SubElement(case, "system-out").text = text
        return
    kind = "error" if finding.severity == "UNKNOWN" else "failure"
    ElementTree.SubElement(case, kind, type=finding.severity, message=_clean(finding.evidence)).text = text


def _clean(text: str) -> str:
    """Without the characters that XML 1.0 cannot have."""
    return re.sub(r"[^\t\n\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]", "?", text)
