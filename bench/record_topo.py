"""Writes the committed record of topology checks: ``python bench/record_topo.py bench/records/topo.json``."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import msgspec
from test_topo import BAR_FLEET_S, BAR_S, CASES, FLEET, check_fleet, fleet_texts, texts_of

from wsync.bench.machine import describe_machine, package_versions
from wsync.bench.topo_result import TopoResult, TopoRow
from wsync.topo.parse import read_texts
from wsync.topo.report import check_topology

FORMAT_VERSION = 1
ROUNDS = {"machine": 101, "fleet": 3}
NAMES = {
    "topo_m": "`nvidia-smi topo -m`",
    "xml": "NCCL's XML",
    "saved": "`wsync topo save`",
    "all": "`topo -m`, `nvlink -s`, `-q` and NCCL's XML",
}


def timed(call: Callable[[], bool], rounds: int) -> tuple[float, bool]:
    """Median of the processor seconds, and whether the call was right each time."""
    seconds, right = [], True
    for _ in range(rounds):
        begin = time.process_time()
        right &= call()
        seconds.append(time.process_time() - begin)
    return statistics.median(seconds), right


def rows() -> list[TopoRow]:
    """All checks, one after the other."""
    found = []
    for case in CASES:
        texts = texts_of(case)
        spent, right = timed(lambda texts=texts: check_topology(read_texts(texts)).verdict == "OK", ROUNDS["machine"])
        found.append(TopoRow(NAMES[case], 1, spent, BAR_S, right))
    fleet = fleet_texts()
    spent, right = timed(lambda: check_fleet(fleet), ROUNDS["fleet"])
    return [*found, TopoRow("`topo -m` and `nvlink -s`, ten machines faulty", FLEET, spent, BAR_FLEET_S, right)]


def main() -> None:
    """Measure, and write the record to the path that the command line gives."""
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    machine, found = describe_machine(), rows()
    good = all(row.correct and row.check_s <= row.bar_s for row in found)
    result = TopoResult(
        FORMAT_VERSION,
        "python bench/record_topo.py",
        started,
        machine,
        package_versions(),
        "ok" if good else "missed",
        tuple(found),
    )
    Path(sys.argv[1]).write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")


if __name__ == "__main__":
    main()
