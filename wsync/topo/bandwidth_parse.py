"""Output of nccl-tests, nvbandwidth (text and JSON) and nvloom: tables of rates, with what they were measured on.

Source: the formats that nccl-tests 2.0 to 2.17, nvbandwidth 0.4 to 0.8 and nvloom 1.x print.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from wsync.errors import ConfigError
from wsync.topo.parse.text import MAX_DEVICES, decode

_RANK = re.compile(r"#\s+Rank\s+(\d{1,6}) .*? on\s+(\S+) device\s+\d{1,4} \[[^\]]*\] (.+?)\s*$")
_NCCL_ROW = re.compile(r"\s+(\d{1,15})\s+(\d{1,15})\s+([a-z]\w*)\s+(\S.*?)\s*$")
_STARTING = re.compile(r"#\s*Collective test starting:\s*(\w+)")
_DEVICE = re.compile(r"Device (\d{1,4}): (.+?)(?: \([0-9a-fA-F:.]+\))?\s*$")
_PROCESS = re.compile(
    r"Process\s+(\d{1,6}) \(([^)]*)\): device (\d{1,4}): (.+?)(?: \([0-9a-fA-F:.]+\))?(?:; rackGuid.*)?$", re.M
)
_RUNNING = re.compile(r"Running (\w+)\.?\s*$")
_CELL = re.compile(r"(N/A|\d+(?:\.\d+)?)(?:;\(.*\))?")
_OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "alltoall", "sendrecv", "reduce", "gather",
               "scatter", "hypercube")  # fmt: skip


class Table(msgspec.Struct, frozen=True):
    """One table of rates.

    Attributes:
        source, line: where it begins.
        tool: ``"nccl-tests"``, ``"nvbandwidth"`` or ``"nvloom"``.
        test: ``all_reduce``, ``device_to_device_memcpy_write_ce`` and so on; "" where nothing tells.
        num_ranks: of a collective; GPUs that took part.
        num_hosts: of a collective; 0 where it is not told.
        gpus: product names.
        rows: labels of a matrix's rows.
        columns: labels of its columns.
        cells: GB/s; None for none. Of a collective one row of bus bandwidths, and ``columns`` are sizes in bytes.
        lines: of each row of cells.
        num_wrong: results that were not right.
        num_devices: that the output lists; 0 where it lists none.
    """

    source: str
    line: int
    tool: str
    test: str
    gpus: tuple[str, ...] = ()
    num_ranks: int = 0
    num_hosts: int = 0
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    cells: tuple[tuple[float | None, ...], ...] = ()
    lines: tuple[int, ...] = ()
    num_wrong: int = 0
    num_devices: int = 0


def parse_tables(data: bytes, source: str) -> tuple[Table, ...]:
    """All tables of one output.

    Raises:
        ConfigError: too long, of no known tool, damaged JSON, or without a table.
    """
    text = decode(data, source)
    if text.lstrip()[:1] == "{":
        found = list(_nvbandwidth_json(text, source))
    elif "nvloom" in text or "ExecutionTime" in text or _PROCESS.search(text):
        found = list(_matrices(text, source, "nvloom"))
    elif "bandwidth (GB/s)" in text or "nvbandwidth" in text:
        found = list(_matrices(text, source, "nvbandwidth"))
    elif "busbw" in text:
        found = list(_nccl_tests(text, source))
    else:
        raise ConfigError(f"{source} is no output of nccl-tests, nvbandwidth or nvloom", hint="give stdout as it is")
    tables = tuple(t for t in found if any(c is not None for row in t.cells for c in row))
    if not tables:
        raise ConfigError(f"{source} has no table of rates", hint="the run may have failed, or was cut")
    return tables


def _nccl_tests(text: str, source: str) -> Iterator[Table]:
    names: list[str] = []
    hosts: dict[str, None] = {}
    ranks = 0
    test = next((t for t in _OPERATIONS if t in source.replace("-", "_")), "")
    rows: list[tuple[int, float, int, str, int]] = []

    def flush() -> Iterator[Table]:
        if rows:
            operation = test or _operation(rows, ranks)
            sized = [r for r in rows if r[0]]
            yield Table(
                source, rows[0][4], "nccl-tests", operation, tuple(dict.fromkeys(names)), ranks,
                len(hosts) if len(names) >= ranks else 0, ("busbw",), tuple(str(r[0]) for r in sized),
                (tuple(r[1] for r in sized),), (rows[0][4],), sum(r[2] for r in rows), ranks,
            )  # fmt: skip

    for number, line in enumerate(text.splitlines(), 1):
        started, rank, row = _STARTING.match(line), _RANK.match(line), _nccl_row(line, number)
        if (started or rank) and rows:
            yield from flush()
            rows, names, hosts, ranks = [], [], {}, 0
        if started:
            test = next((t for t in _OPERATIONS if started[1].startswith(t)), started[1])
        elif rank:
            names.append(rank[3])
            hosts[rank[2]] = None
            ranks = min(max(ranks, int(rank[1]) + 1), 1 << 20)
        elif row:
            rows.append(row)
    yield from flush()


def _nccl_row(line: str, number: int) -> tuple[int, float, int, str, int] | None:
    """Size, best bus bandwidth, wrong results, the ratio of bus to algorithm bandwidth with operator and root, line."""
    found = _NCCL_ROW.match(line)
    if found is None:
        return None
    words = found[4].split()
    best, wrong, ratio = None, 0, 0.0
    for end in (len(words), len(words) - 4):
        if end < 4:
            continue
        _, algorithm, bus, errors = words[end - 4 : end]
        rates = _real(algorithm), _real(bus)
        if rates[0] is None or rates[1] is None:
            continue
        best = rates[1] if best is None else max(best, rates[1])
        ratio = rates[1] / rates[0] if rates[0] else ratio
        wrong += int(errors) if errors.isdecimal() else 0
    if best is None:
        return None
    operator = next((w for w in words[:2] if w in ("sum", "prod", "min", "max", "avg")), "")
    return int(found[1]), best, wrong, f"{ratio:.4f} {operator}", number


def _operation(rows: Sequence[tuple[int, float, int, str, int]], ranks: int) -> str:
    """Old versions do not print what they ran: the factor between bus and algorithm bandwidth tells."""
    ratio, _, operator = max(rows)[3].partition(" ")
    factor = float(ratio)
    if ranks > 1 and abs(factor - 2 * (ranks - 1) / ranks) < 0.02:
        return "all_reduce"
    if ranks > 1 and abs(factor - (ranks - 1) / ranks) < 0.02:
        return "reduce_scatter" if operator else "all_gather"
    return ("reduce" if operator else "broadcast") if abs(factor - 1) < 0.02 else ""


def _matrices(text: str, source: str, tool: str) -> Iterator[Table]:
    """Tables of labelled rows below a line that names the test."""
    names: dict[str, str] = {}
    test, head, at = "", None, 0
    rows: list[tuple[str, tuple[float | None, ...], int]] = []

    def flush() -> Iterator[Table]:
        if rows and head is not None:
            yield _matrix(source, at, tool, test, list(names.values()), head, rows, len(names))

    for number, line in enumerate(text.splitlines(), 1):
        running, device, process = _RUNNING.match(line), _DEVICE.match(line), _PROCESS.match(line)
        words = [w for w in line.split() if w != "|"]
        values = _cells(words[1:])
        if running:
            yield from flush()
            test, head, rows = running[1], None, []
        elif device or process:
            found = device or process
            key = device[1] if device else process[1] if process else ""
            names[key] = found[2 if device else 4] if found else ""
        elif line[:1] in (" ", "\t") and words and head is None:
            head, at = words[:MAX_DEVICES], number
        elif head is not None and values is not None and len(words) > 1:
            rows.append((words[0], values, number))
        elif rows and words and not line.startswith("Waived"):
            yield from flush()
            head, rows = None, []
    yield from flush()


def _matrix(
    source: str, line: int, tool: str, test: str, names: Iterable[str], head: Sequence[str],
    rows: Sequence[tuple[str, tuple[float | None, ...], int]], num_devices: int,
) -> Table:  # fmt: skip
    width = max(len(values) for _, values, _ in rows)
    columns = tuple(head) if len(head) == width else tuple(str(i) for i in range(width))
    return Table(
        source, line, tool, test, tuple(dict.fromkeys(names)), num_devices, 0, tuple(r[0] for r in rows), columns,
        tuple(v + (None,) * (width - len(v)) for _, v, _ in rows), tuple(n for _, _, n in rows), 0, num_devices,
    )  # fmt: skip


def _cells(words: Sequence[str]) -> tuple[float | None, ...] | None:
    matches = [_CELL.fullmatch(w) for w in words[:MAX_DEVICES]]
    if not matches or None in matches:
        return None
    return tuple(None if m is None or m[1] == "N/A" or float(m[1]) == 0 else float(m[1]) for m in matches)


def _nvbandwidth_json(text: str, source: str) -> Iterator[Table]:
    try:
        value = msgspec.json.decode(text.encode())
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{source}: not JSON, or truncated: {e}") from e
    root: Any = value.get("nvbandwidth") if isinstance(value, dict) else None
    if not isinstance(root, dict) or not isinstance(root.get("testcases"), list):
        raise ConfigError(f"{source}: JSON without nvbandwidth's testcases")
    listed = root.get("GPU Device list")
    devices = [str(d).partition(": ")[2].split(" (")[0] for d in listed] if isinstance(listed, list) else []
    for case in root["testcases"]:
        matrix = case.get("bandwidth_matrix") if isinstance(case, dict) else None
        if not isinstance(matrix, list) or not matrix:
            continue
        rows = []
        for i, row in enumerate(matrix):
            values = _cells([str(c) for c in row]) if isinstance(row, list) else None
            if values is None:
                raise ConfigError(f"{source}: row {i} of {case.get('name')!r} is no row of rates")
            rows.append((str(i), values, 0))
        head = [str(i) for i in range(max(len(v) for _, v, _ in rows))]
        yield _matrix(source, 0, "nvbandwidth", str(case.get("name", "")), devices, head, rows, len(devices))


def _real(word: str) -> float | None:
    try:
        value = float(word)
    except ValueError:
        return None
    return value if 0 <= value < 1e6 else None
