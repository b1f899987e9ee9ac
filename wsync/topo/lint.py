"""Lint of what people write for NCCL by hand: topology files and the environment.

`wsync.topo.lint_file` and `wsync.topo.lint_env` have the rules; this module joins their findings to a verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from wsync.errors import WsyncError
from wsync.topo.findings import SEVERITY_RANK, Finding, Severity, Subject, Verdict, guide_link, worst
from wsync.topo.lint_env import Assignment, lint_environment
from wsync.topo.lint_file import TopologyFile, lint_document, read_topology_file
from wsync.topo.model import Machine

LINT_VERSION = 1
"""Version of ``wsync topo lint --json``."""


class LintReport(msgspec.Struct, frozen=True):
    """Findings of all inputs, the worst first."""

    verdict: Verdict
    inputs: tuple[str, ...]
    findings: tuple[Finding, ...]
    format_version: int = LINT_VERSION


def lint(
    files: Sequence[str | Path] = (),
    environment: Sequence[Assignment] | None = None,
    machine: Machine | None = None,
    source: str = "environment",
    sysfs: Path | None = None,
    follow: bool = False,
) -> LintReport:
    """Lint topology files and an environment, each alone and against each other.

    Args:
        files: for ``NCCL_TOPO_FILE``.
        environment: assignments in their order; None for none.
        machine: what the host's own tools say of it; names and bus ids that it lacks are findings.
        source: name of the environment, for findings.
        sysfs: root of the host's sysfs, where the files are of this host.
        follow: lint the file that ``NCCL_TOPO_FILE`` names, too: the environment is that of this host.
    """
    paths = [Path(f) for f in files]
    variables = {a.name: a.value for a in environment or ()}
    findings: list[Finding] = []
    if environment is not None:
        findings += lint_environment(environment, machine, source)
        named = variables.get("NCCL_TOPO_FILE")
        if follow and named and Path(named).is_file() and Path(named) not in paths:
            paths.append(Path(named))
        elif named and not Path(named).is_file():
            findings.append(_absent(named, source, follow))
    for path in paths:
        findings += _lint_path(path, machine, variables, sysfs)
    inputs = [p.name for p in paths] + ([source] if environment is not None else [])
    ordered = sorted(dict.fromkeys(findings), key=lambda f: -SEVERITY_RANK[f.severity])
    return LintReport(worst(ordered), tuple(inputs), tuple(ordered))


def _lint_path(
    path: Path, machine: Machine | None, variables: Mapping[str, str], sysfs: Path | None
) -> tuple[Finding, ...]:
    try:
        document: TopologyFile = read_topology_file(path)
    except WsyncError as e:
        unreadable = "input.unreadable"
        expected = "a whole <system> of NCCL's"
        return (Finding(unreadable, "UNKNOWN", Subject(), e.message, expected, e.hint or "", guide_link(unreadable)),)
    return lint_document(document, machine, variables, sysfs)


def _absent(named: str, source: str, here: bool) -> Finding:
    severity: Severity = "WARN" if here else "INFO"
    return Finding(
        "lint.topo-file-absent",
        severity,
        Subject(devices=("NCCL_TOPO_FILE",)),
        f"NCCL_TOPO_FILE={named} in {source}: there is no such file" + ("" if here else " on this host"),
        "a file that every host of the job has",
        "NCCL warns once and goes on with what it detects; correct the path",
        guide_link("lint.topo-file-absent"),
    )
