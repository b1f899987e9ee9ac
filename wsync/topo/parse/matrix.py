"""``nvidia-smi topo -m`` and ``-mp``, also damaged by terminals, chats and mail.

Cells are read by their closed vocabulary, not by columns: colour codes, a header without its tab, cells glued together,
rows wrapped or cut, and a missing header are all read over. What is missing becomes a `Gap`.

Source: ``nvidia-smi topo -m`` of drivers 384 to 580 as recorded in public issues; the legend that it prints.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import NamedTuple

from msgspec.structs import replace

from wsync.topo.model import Gap, Gpu, Machine, Nic, Oddity, Path
from wsync.topo.parse.text import MAX_DEVICES, MAX_LINE_CHARS, expand, numbers

_CELL = re.compile(r"[ \t|]*(NV\d{1,2}|PIX|PXB|PHB|NODE|SYS|SOC|X)(?=[^A-Za-z]|NV|PIX|PXB|PHB|NODE|SYS|SOC|X|$)")
_LABEL = re.compile(r"(?:GPU|NIC)\d{1,4}")
_GLUED = re.compile(r"(?:(?:GPU|NIC)\d{1,4}){2,}")
_NAME = re.compile(r"(?!GPU(?!\d{1,4}$))[A-Za-z][\w.\-]*")
_TAIL = re.compile(r"CPU Affinity|NUMA Affinity|GPU NUMA ID", re.I)
_LEGEND = re.compile(r"[ \t>|]*(NIC\d{1,4})\s*:\s*(\S+)\s*$")
_HIDDEN = re.compile(r"(\d+) NICs found in the topology, only displaying (\d+)")


class _Row(NamedTuple):
    label: str
    cells: list[str]
    tail: str
    header_tail: list[tuple[str, int]]
    damaged: bool


class _Header(NamedTuple):
    columns: list[str]
    tail: list[tuple[str, int]]


def looks_like_matrix(text: str) -> bool:
    """Whether a line of ``text`` is a row of a GPU."""
    return any(_row_start(line) is not None for line in text.splitlines())


def parse_matrix(text: str, source: str) -> tuple[Machine, ...]:
    """Read a matrix, or several that differ, each as a machine of its own: of several hosts, or of several times.

    Rows that occur twice below one header are believed the last time; where they differ, an `Oddity` says so.
    """
    lines = [line for line in text.splitlines() if len(line) <= MAX_LINE_CHARS]
    whole = _parse_table(lines, source)
    tables = _split(lines) if whole.oddities else []
    if len(tables) <= 1:
        return (whole,)
    # Nothing else tells them apart, and a fault of one must not hide behind the others.
    return tuple(replace(_parse_table(t, source), host=f"{source} table {i}") for i, t in enumerate(tables, 1))


def _split(lines: list[str]) -> list[list[str]]:
    """Lines of each table. A header begins another one where it repeats a row; pagers print it once more between."""
    starts = [i for i, line in enumerate(lines) if _find_header([line]) is not None]
    labels = [found[0] if (found := _row_start(line)) is not None else "" for line in lines]
    cuts = [0]
    for start, end in pairwise([*starts, len(lines)]):
        above = set(filter(None, labels[cuts[-1] : start]))
        if not above.isdisjoint(labels[start:end]):
            cuts.append(start)
    return [lines[a:b] for a, b in pairwise([*cuts, len(lines)])]


def _parse_table(lines: list[str], source: str) -> Machine:
    text = "\n".join(lines)
    header = _find_header(lines)
    repeated = _find_rows(lines, header)
    rows = list({row.label: row for row in repeated}.values())
    legend: dict[str, str] = {m[1]: m[2] for m in map(_LEGEND.match, lines) if m}
    hidden = _HIDDEN.search(text)
    gaps: list[str] = []
    if header is None:
        header = _Header(_infer_columns(rows), [])
        gaps.append("the header line (columns were inferred from the rows)")
    columns = header.columns
    gaps += _missing(columns, rows)
    num_hidden = max(0, int(hidden[1]) - int(hidden[2])) if hidden else 0
    if num_hidden and hidden:
        gaps.append(f"{num_hidden} of {hidden[1]} NICs, which the tool does not print")
    known = {row.label: row for row in rows if not row.damaged and row.label in columns}
    return Machine(
        gpus=tuple(_gpu(c, known.get(c), columns) for c in columns if c.startswith("GPU")),
        nics=tuple(
            Nic(legend.get(c, c), alias=c if legend.get(c, c) != c else None)
            for c in columns
            if not c.startswith("GPU")
        ),
        paths=tuple(p for row in known.values() for p in _paths(row, columns, legend)),
        num_nics_hidden=num_hidden,
        oddities=_contradictions(repeated, source),
        gaps=tuple(Gap(what, source) for what in gaps),
        sources=(source,),
    )


def _row_start(line: str) -> tuple[str, int] | None:
    """Label and position after it of a row: a name that is followed by at least one cell."""
    found = re.match(r"[ \t]*([A-Za-z][\w.\-]*?)(?=[ \t|])", line)
    if found is None or "=" in line:
        return None
    first = _CELL.match(line, found.end())
    if first is None or (_CELL.match(line) and not _LABEL.fullmatch(found[1])):
        return None
    return found[1], found.end()


def _find_header(lines: list[str]) -> _Header | None:
    for line in lines:
        if "GPU" not in line or _row_start(line) is not None:
            continue
        tail = list(_TAIL.finditer(line))
        names = line[: tail[0].start()] if tail else line
        columns: list[str] = []
        for word in names.split():
            columns += _LABEL.findall(word) if _GLUED.fullmatch(word) else [word]
        good = bool(columns) and re.fullmatch(r"GPU\d{1,4}", columns[0]) and all(_NAME.fullmatch(c) for c in columns)
        if good and len(columns) <= MAX_DEVICES:
            return _Header(list(dict.fromkeys(columns)), [(m[0].title(), m.start()) for m in tail])
    return None


def _find_rows(lines: list[str], header: _Header | None) -> list[_Row]:
    columns = header.columns if header else None
    found: list[_Row] = []
    pending: tuple[str, str] | None = None
    for line in [*lines, ""]:
        start = _row_start(line)
        wraps = pending is not None and start is None and "=" not in line and _CELL.match(line) is not None
        if wraps and pending is not None:
            pending = (pending[0], pending[1] + "\t" + line.strip())
            continue
        if pending is not None:
            found.append(_read_row(*pending, columns, header.tail if header else []))
        known = start is not None and (columns is None or start[0] in columns or _LABEL.fullmatch(start[0]) is not None)
        pending = (start[0], line[start[1] :]) if start is not None and known else None
    return found


def _contradictions(repeated: list[_Row], source: str) -> tuple[Oddity, ...]:
    """Rows that occur twice with different cells: tables of two hosts, or of two times, in one text."""
    cells: dict[str, set[tuple[str, ...]]] = {}
    for row in repeated:
        cells.setdefault(row.label, set()).add(tuple(row.cells))
    differ = [label for label, several in cells.items() if len(several) > 1]
    text = f"{source} shows {', '.join(differ[:8])} twice with different cells"
    return (Oddity("sources-disagree", "rows", text, source),) if differ else ()


def _read_row(label: str, rest: str, columns: list[str] | None, tail: list[tuple[str, int]]) -> _Row:
    cells: list[str] = []
    position = 0
    while columns is None or len(cells) < len(columns):
        found = _CELL.match(rest, position)
        if found is None:
            break
        cells.append("SYS" if found[1] == "SOC" else found[1])
        position = found.end()
    if cells and cells[-1].startswith("NV") and not rest[position:] and (tail or len(cells) < len(columns or ())):
        # The text ends at this number, which may have lost a digit.
        cells.pop()
    damaged = False
    if columns is not None and label in columns:
        own = columns.index(label)
        # A lost cell moves the diagonal: which one it was cannot be known, so the row says nothing.
        damaged = ("X" in cells and cells.index("X") != own) or (len(cells) > own and cells[own] != "X")
    return _Row(label, cells, rest[position:], tail, damaged)


def _infer_columns(rows: list[_Row]) -> list[str]:
    """Columns of a table without a header: GPUs first, as many as have rows or NVLinks; the rest are NICs."""
    if not rows:
        return []
    width = max(len(r.cells) for r in rows)
    gpus = 0
    for row in rows:
        found = re.fullmatch(r"GPU(\d{1,4})", row.label)
        if found:
            gpus = max(gpus, int(found[1]) + 1)
            gpus = max(gpus, *(i + 1 for i, c in enumerate(row.cells) if c.startswith("NV")), 0)
    gpus = min(gpus, width)
    named = [r.label for r in rows if not r.label.startswith("GPU")]
    nics = named if len(named) == width - gpus else [f"NIC{i}" for i in range(width - gpus)]
    return [f"GPU{i}" for i in range(gpus)] + nics


def _missing(columns: list[str], rows: list[_Row]) -> list[str]:
    by_label = {row.label: row for row in rows}
    gaps = []
    for kind, are in (("GPU", True), ("NIC", False)):
        of_kind = [c for c in columns if c.startswith("GPU") is are]
        absent = [c for c in of_kind if c not in by_label]
        # Old drivers and many excerpts print no NIC rows at all; their cells are known from the GPUs' rows.
        if absent and (are or len(absent) < len(of_kind)):
            where = numbers(int(c[3:]) for c in absent) if are else ", ".join(absent[:8])
            gaps.append(f"the rows of {kind}s {where} ({len(absent)} of {len(of_kind)})")
    for row in rows:
        if row.damaged:
            gaps.append(f"a cell of row {row.label} (its diagonal is not where it should be)")
        elif len(row.cells) < len(columns) and row.label in columns:
            gaps.append(f"cells of row {row.label} ({len(row.cells)} of {len(columns)} are there)")
        elif row.header_tail and row.label.startswith("GPU") and not row.tail.strip():
            gaps.append(f"the affinities of row {row.label}")
        elif row.label not in columns:
            gaps.append(f"the column of {row.label}, which has a row")
    return gaps


def _gpu(label: str, row: _Row | None, columns: list[str]) -> Gpu:
    index = int(label[3:])
    if row is None or len(row.cells) < len(columns) or (row.header_tail and not row.tail.strip()):
        return Gpu(index, shown=False)
    cpus, numa, gpu_numa = _read_tail(row)
    return Gpu(
        index,
        cpus=cpus,
        numa=expand(numa) if numa else None,
        gpu_numa=int(gpu_numa) if gpu_numa and gpu_numa.isdigit() else None,
    )


def _read_tail(row: _Row) -> tuple[str | None, str | None, str | None]:
    """CPU affinity, NUMA affinity and GPU NUMA id. With tabs an empty cell is kept; NUMA Affinity takes two tabs."""
    if "\t" in row.tail:
        fields = [f.strip() for f in row.tail.split("\t")][1:]
        if len(fields) > 3:
            fields = [*fields[:2], fields[-1]]
    else:
        fields = re.split(r" +", row.tail.strip()) if row.tail.strip() else []
    padded: list[str | None] = [*fields, None, None, None]
    cpus, numa, gpu_numa = padded[:3]
    if len(fields) == 2 and cpus == "" and numa == "":
        return None, None, None
    return cpus, numa, gpu_numa


def _paths(row: _Row, columns: list[str], legend: dict[str, str]) -> list[Path]:
    a = legend.get(row.label, row.label)
    paths = []
    for column, cell in zip(columns, row.cells, strict=False):
        if cell == "X":
            continue
        b = legend.get(column, column)
        if cell.startswith("NV"):
            paths.append(Path(a, b, "NV", int(cell[2:]), "topo -m"))
        else:
            paths.append(Path(a, b, cell, 0, "topo -m"))  # type: ignore[arg-type]  # the closed vocabulary
    return paths
