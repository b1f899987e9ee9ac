"""Measured rates against what others published of the same machines, and against each other.

A rate below 90 % of the published one is WARN, below 80 % CRIT; so is a cell of a matrix against the matrix's median. A
run of smaller payloads than the published one is not judged.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from wsync.topo.bandwidth_parse import Table
from wsync.topo.findings import Finding, Severity, Subject, Verdict, guide_link, worst
from wsync.topo.platforms import profile_of_product

BANDWIDTH_VERSION = 1
"""Version of ``wsync topo import-bandwidth --json``."""
WARN_SHARE, CRIT_SHARE = 0.9, 0.8
PAIR_SHARE = 0.78
"""Of the links' nominal rate that a copy between two GPUs reaches: Azure passes H100 at 335, A100 at 235 GB/s."""
_PAIR = "pair"
_HOST_TO_GPU = "host_to_device"


class Reference(msgspec.Struct, frozen=True):
    """A published rate: of a GPU model, a test and a number of GPUs (0: any), at a payload (0: any)."""

    model: str
    test: str
    num_gpus: int
    gbps: float
    nbytes: int
    source: str
    ring_gbps: float = 0.0


_GIB = 1 << 30
REFERENCES = (
    Reference("A100", "all_reduce", 8, 235.0, 8 * _GIB, "superbenchmark"),
    Reference("A100", "broadcast", 8, 233.0, 8 * _GIB, "superbenchmark"),
    Reference("A100", "all_gather", 8, 223.0, 8 * _GIB, "superbenchmark"),
    Reference("A100", _PAIR, 0, 276.0, 0, "nvbandwidth README"),
    Reference("A100", _HOST_TO_GPU, 0, 26.0, 0, "nvbandwidth README"),
    Reference("H200", "all_reduce", 8, 473.0, 8 * _GIB, "stas00/ml-engineering", 366.0),
    Reference("H200", _HOST_TO_GPU, 0, 55.4, 0, "stas00/ml-engineering"),
    Reference("H100", "all_reduce", 8, 460.0, 8 * _GIB, "Azure's node health check", 366.0),
    Reference("H100", "all_reduce", 16, 475.0, 8 * _GIB, "nccl-tests #256"),
    Reference("H100", "all_reduce", 64, 387.0, 8 * _GIB, "coreweave/nccl-tests"),
    Reference("B200", "all_reduce", 8, 838.0, 8 * _GIB, "stas00/ml-engineering", 682.0),
    Reference("B200", "all_reduce", 32, 382.0, 16 * _GIB, "stas00/ml-engineering, EFA 400 Gbit/s"),
    Reference("GB200", "all_reduce", 72, 847.0, 8 * _GIB, "coreweave/nccl-tests"),
    Reference("GB200", "all_reduce", 144, 820.0, 16 * _GIB, "coreweave/nccl-tests"),
    Reference("GB200", "all_reduce", 1440, 406.0, 16 * _GIB, "coreweave/nccl-tests"),
    Reference("GB300", "all_reduce", 8, 685.0, 512 << 20, "datacrunch-research/nccl-eBPF"),
    Reference("GH200", _HOST_TO_GPU, 0, 359.0, 0, "superbenchmark"),
)
MODELS = ("GB300", "GB200", "GH200", "B300", "B200", "H200", "H100", "H800", "H20", "A100", "A800", "V100", "L40S")


class Result(msgspec.Struct, frozen=True):
    """One line of an output, judged.

    Attributes:
        source, line: where.
        test: what ran.
        subject: row of a matrix, or the number of ranks.
        gbps: the best bus bandwidth of a collective, the least of a matrix's row.
        reference_gbps: published; None where nothing comparable is.
        verdict: of this line.
        note: why it is not judged, or which publication it is judged by.
    """

    source: str
    line: int
    test: str
    subject: str
    gbps: float
    reference_gbps: float | None
    verdict: Verdict
    note: str = ""


class BandwidthReport(msgspec.Struct, frozen=True):
    """All lines and what is wrong with them.

    Attributes:
        measured: least rate by part of a machine, for ``wsync topo plan --measured``.
    """

    verdict: Verdict
    results: tuple[Result, ...]
    findings: tuple[Finding, ...]
    measured: dict[str, float]
    format_version: int = BANDWIDTH_VERSION


def judge_tables(tables: Sequence[Table], model: str | None = None) -> BandwidthReport:
    """Judge all tables.

    Args:
        tables: of one or more outputs.
        model: of the GPUs (``A100``), where the outputs do not say it or say it wrongly.
    """
    results: list[Result] = []
    findings: list[Finding] = []
    measured: dict[str, float] = {}
    for table in tables:
        name = model.upper() if model else _model_of(table, tables)
        lines = list(_judge_collective(table, name) if table.tool == "nccl-tests" else _judge_matrix(table, name))
        results += [result for result, _ in lines]
        findings += [f for _, some in lines for f in some]
        findings += _wrong(table)
        findings += _outliers(table)
        findings += _odd_columns(table)
        part = {_PAIR: "nvlink", _HOST_TO_GPU: "pcie"}.get(_kind(table.test))
        if part and lines:
            least = min(result.gbps for result, _ in lines)
            measured[part] = min(measured.get(part, least), least)
    if results and worst(findings) == "OK" and all(r.verdict == "UNKNOWN" for r in results):
        findings.append(_not_judged(results))
    return BandwidthReport(worst(findings), tuple(results), tuple(findings), measured)


def _not_judged(results: Sequence[Result]) -> Finding:
    notes = "; ".join(list(dict.fromkeys(r.note for r in results))[:4])
    return Finding(
        "bandwidth.not-judged", "UNKNOWN", Subject(), f"no line can be compared: {notes}", "a test with a known rate",
        "name the GPU with --gpu; run all_reduce_perf up to 8 GiB, or nvbandwidth's device_to_device tests",
        guide_link("bandwidth.not-judged"),
    )  # fmt: skip


def _model_of(table: Table, tables: Sequence[Table]) -> str:
    """The model that the table names; else the only one that any table of the same output does."""
    own = _known(table.gpus)
    return own or _known([g for t in tables if t.source == table.source for g in t.gpus])


def _known(names: Sequence[str]) -> str:
    found = {m for n in names for m in [next((m for m in MODELS if re.search(rf"\b{m}\b", n)), None)] if m}
    return found.pop() if len(found) == 1 else ""


def _kind(test: str) -> str:
    """What a test of nvbandwidth or nvloom measures, where one direction runs at a time."""
    if "bidir" in test or "all" in test or "local" in test or "latency" in test:
        return ""
    if re.match(r"(?:multinode_)?device_to_device|pairwise", test):
        return _PAIR
    return _HOST_TO_GPU if test.startswith("host_to_device") else ""


def _judge_collective(table: Table, model: str) -> Iterator[tuple[Result, list[Finding]]]:
    rates = [(rate, int(size)) for rate, size in zip(table.cells[0], table.columns, strict=True) if rate is not None]
    best, _ = max(rates)
    largest = max(size for _, size in rates)
    subject = f"{table.num_ranks} ranks"
    reference = _reference(model, table.test, table.num_ranks)
    yield _judge(table, table.line, subject, best, reference, model, largest)


def _judge_matrix(table: Table, model: str) -> Iterator[tuple[Result, list[Finding]]]:
    kind = _kind(table.test)
    reference = _reference(model, kind, 0) if kind else None
    if reference is None and kind == _PAIR:
        reference = _pair_reference(table, model)
    width = table.num_devices or len(table.columns)
    for label, row, line in zip(table.rows, table.cells, table.lines, strict=True):
        known = [c for c in row[:width] if c is not None]
        if known:
            yield _judge(table, line, f"row {label}", min(known), reference, model, 0)


_SXM = {"A100": "-SXM", "A800": "-SXM", "V100": "-SXM"}


def _pair_reference(table: Table, model: str) -> Reference | None:
    """What a pair on NVSwitches reaches by the links of its model, where nobody published it.

    Meshes and bridges give a pair a part of the links, which a table of rates does not tell.
    """
    named = next((name for name in table.gpus if model in name), model + _SXM.get(model, "")) if model else ""
    profile = profile_of_product(named) if named else None
    if profile is None or not profile.soldered or profile.cube_mesh or "switch" not in profile.joined:
        return None
    if not profile.links or not profile.link_gbps or (len(table.rows) == 4 and "mesh" in profile.joined):
        return None
    rate = PAIR_SHARE * profile.links * profile.link_gbps
    source = f"{profile.links} links of {profile.link_gbps:g} GB/s, of which a pair reaches {PAIR_SHARE:.0%}"
    return Reference(model, _PAIR, 0, rate, 0, source)


def _reference(model: str, test: str, num_gpus: int) -> Reference | None:
    return next(
        (r for r in REFERENCES if (r.model, r.test) == (model, test) and r.num_gpus in (0, num_gpus)),
        None,
    )


def _judge(
    table: Table, line: int, subject: str, gbps: float, reference: Reference | None, model: str, nbytes: int
) -> tuple[Result, list[Finding]]:
    where = (table.source, line, table.test or "?", subject, gbps)
    if reference is None:
        note = f"no published rate of {table.test or 'this test'} on {model or 'an unknown GPU'}"
        return Result(*where, None, "UNKNOWN", note), []
    if reference.nbytes > 4 * nbytes and reference.nbytes:
        note = f"the largest payload is {nbytes} bytes, the published rate is of {reference.nbytes}"
        return Result(*where, reference.gbps, "UNKNOWN", note), []
    share = gbps / reference.gbps
    note = f"{share:.0%} of {reference.gbps:g} GB/s ({reference.source})"
    if share >= WARN_SHARE:
        return Result(*where, reference.gbps, "OK", note), []
    if reference.ring_gbps and gbps >= WARN_SHARE * reference.ring_gbps:
        text = f"as fast as a ring ({reference.ring_gbps:g} GB/s): NVLink SHARP is not used"
        finding = _finding(
            table, line, "bandwidth.no-nvls", "WARN", (), f"{subject}: {gbps:g} GB/s, {note}, {text}", "NVLink SHARP",
            "see NCCL_NVLS_ENABLE, the fabric manager, and NCCL's log for nvls channels",
        )  # fmt: skip
        return Result(*where, reference.gbps, "WARN", note), [finding]
    severity: Literal["WARN", "CRIT"] = "CRIT" if share < CRIT_SHARE else "WARN"
    finding = _finding(
        table, line, "bandwidth.low", severity, (), f"{table.test}, {subject}: {gbps:g} GB/s, {note}",
        f"{WARN_SHARE * reference.gbps:.4g} GB/s", "`wsync topo check` the machine; see which GPU or NIC is slow",
    )  # fmt: skip
    return Result(*where, reference.gbps, severity, note), [finding]


def _wrong(table: Table) -> Iterator[Finding]:
    if table.num_wrong:
        yield _finding(
            table, table.line, "bandwidth.wrong-results", "CRIT", (), f"{table.test}: {table.num_wrong} wrong elements",
            "0", "memory or links corrupt data: take the machine out of service and find the GPU",
        )  # fmt: skip


def _outliers(table: Table) -> Iterator[Finding]:
    """Cells far below the median of their matrix; of a GPU that all of them share only that one is named."""
    gpus = "device_to_device" in table.test
    if not gpus and _kind(table.test) != _HOST_TO_GPU:
        return
    width = table.num_devices or len(table.columns)
    cells = [
        (row, table.columns[j], value)
        for row, values in zip(table.rows, table.cells, strict=True)
        for j, value in enumerate(values[:width])
        if value is not None
    ]
    if len(cells) < 4:
        return
    middle = statistics.median(value for _, _, value in cells)
    low = [c for c in cells if c[2] < WARN_SHARE * middle]
    if not low:
        return
    sets = [{a, b} if gpus else {b} for a, b, _ in low]
    shared = sorted(set.intersection(*sets)) if len(low) > 1 else []
    devices = shared or list(dict.fromkeys(x for a, b, _ in low for x in ((a, b) if gpus else (b,))))
    least = min(value for _, _, value in low)
    text = ", ".join(f"{a}-{b} {value:g}" for a, b, value in low[:6]) + (" ..." if len(low) > 6 else "")
    yield _finding(
        table, table.line, "bandwidth.outlier", "CRIT" if least < CRIT_SHARE * middle else "WARN",
        tuple(_label(table, d) for d in devices),
        f"{table.test}: {len(low)} of {len(cells)} cells below 90 % of the median {middle:.4g} GB/s: {text}",
        "equal rates", "`wsync topo check` the machine; look at the links of what all slow cells share",
    )  # fmt: skip


def _label(table: Table, name: str) -> str:
    """nvbandwidth counts GPUs, nvloom processes (one for each GPU)."""
    if not name.isdecimal():
        return name
    return f"process {name}" if table.tool == "nvloom" else f"GPU{name}"


def _odd_columns(table: Table) -> Iterator[Finding]:
    if table.tool == "nvbandwidth" and 0 < table.num_devices < len(table.columns):
        yield _finding(
            table, table.line, "bandwidth.columns-odd", "INFO", (),
            f"{table.test}: {len(table.columns)} columns, but {table.num_devices} devices are listed", "as many",
            "the output was edited, or joined of two; further columns are not judged",
        )  # fmt: skip


def _finding(
    table: Table, line: int, finding_id: str, severity: Severity, devices: tuple[str, ...], text: str, expected: str,
    remedy: str,
) -> Finding:  # fmt: skip
    where = f"{table.source}:{line}: " if line else f"{table.source}: "
    subject = Subject(devices=devices)
    return Finding(finding_id, severity, subject, where + text, expected, remedy, guide_link(finding_id))
