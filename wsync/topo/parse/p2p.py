"""``nvidia-smi topo -p2p r|w|n|a|p``: whether pairs of GPUs may address each other."""

from __future__ import annotations

import re

from wsync.topo.model import Gap, Gpu, Machine, P2p
from wsync.topo.parse.text import MAX_LINE_CHARS, numbers

_ROW = re.compile(r"[ \t>|]*GPU(\d{1,4})[ \t|]+((?:(?:X|OK|CNS|GNS|TNS|NS|DR|U)[ \t|]*)+)\s*$")
_CELLS = re.compile(r"CNS|GNS|TNS|NS|OK|DR|U|X")
_HEADER = re.compile(r"[ \t>|]*(?:GPU\d{1,4}[ \t|]*)+\s*$")


def looks_like_p2p(text: str) -> bool:
    """Whether a row of ``text`` holds a status."""
    rows = (_ROW.match(line) for line in text.splitlines() if len(line) <= MAX_LINE_CHARS)
    return any(row is not None and set(_CELLS.findall(row[2])) - {"X"} for row in rows)


def parse_p2p(text: str, source: str) -> Machine:
    """Read one table. Which capability it shows is not printed: a name such as ``host.p2p_n.txt`` says it.

    Of several tables (of hosts, or of capabilities) every cell counts, so that none hides what another refuses.
    """
    columns: list[int] = []
    rows: dict[int, list[list[str]]] = {}
    for line in text.splitlines():
        if len(line) > MAX_LINE_CHARS:
            continue
        found = _ROW.match(line)
        if found is not None:
            rows.setdefault(int(found[1]), []).append(_CELLS.findall(found[2]))
        elif not columns and _HEADER.match(line):
            columns = [int(n) for n in re.findall(r"GPU(\d{1,4})", line)]
    if not columns:
        columns = list(range(max((len(cells) for some in rows.values() for cells in some), default=0)))
    hint = re.search(r"p2p[ _.-]*([rwnap])(?![a-z])", source.lower())
    capability = hint[1] if hint else ""
    gaps = []
    absent = [c for c in columns if c not in rows]
    if absent:
        gaps.append(f"the rows of GPUs {numbers(absent)} ({len(absent)} of {len(columns)})")
    gaps += [
        f"cells of row GPU{i} ({len(cells)} of {len(columns)} are there)"
        for i, some in rows.items()
        for cells in some
        if len(cells) < len(columns)
    ]
    return Machine(
        gpus=tuple(Gpu(i, shown=i in rows) for i in columns),
        p2p=tuple(
            dict.fromkeys(
                P2p(a, b, status, capability)
                for a, some in rows.items()
                for cells in some
                for b, status in zip(columns, cells, strict=False)
                if status != "X"
            )
        ),
        gaps=tuple(Gap(what, source) for what in gaps),
        sources=(source,),
    )
