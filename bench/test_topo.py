"""How long a topology check takes. Run with ``pytest bench/test_topo.py``.

Targets: a saved machine of 8 GPUs in 10 ms inside the process, 1 000 machines in 10 s.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "tests" / "topo"))

import machines as m

from wsync.topo.parse import read_texts
from wsync.topo.parse.saved import encode_topology
from wsync.topo.report import check_topology

WRITERS = {"topo_m": m.topo_m, "nvlink_s": m.nvlink_s, "xml": m.system_xml, "query": m.query_all}

CASES = ("topo_m", "xml", "saved", "all")
BAR_S = 10e-3
FLEET, BAR_FLEET_S = 1000, 10.0


def whole(box):
    return read_texts([(name, write(box)) for name, write in WRITERS.items()])


def texts_of(case):
    """Files of a healthy machine: one of a kind, one that was saved of all, or all."""
    box = m.h100()
    if case == "all":
        return [(name, write(box)) for name, write in WRITERS.items()]
    if case == "saved":
        return [("saved", encode_topology(whole(box)).decode())]
    return [(case, WRITERS[case](box))]


def fleet_texts():
    """Host and files of 1 000 machines, one in a hundred with a GPU that has lost its links."""
    found = []
    for i in range(FLEET):
        box = m.isolate(m.h100(), i % 8) if i % 100 == 0 else m.h100()
        found.append((f"node{i}", [("topo", m.topo_m(box)), ("links", m.nvlink_s(box))]))
    return found


def check_fleet(texts):
    """Whether the ten faulty machines, and no others, are found so."""
    verdicts = [check_topology(read_texts(files, host)).verdict for host, files in texts]
    return [i for i, verdict in enumerate(verdicts) if verdict == "CRIT"] == list(range(0, FLEET, 100))


@pytest.mark.parametrize("case", CASES)
def test_check_of_8_gpus(benchmark, case):
    texts = texts_of(case)
    report = benchmark(lambda: check_topology(read_texts(texts)))
    assert report.verdict == "OK"
    # The least of many rounds: what else runs on the machine only adds.
    assert benchmark.stats["min"] < BAR_S


def test_check_of_1000_machines(benchmark):
    texts = fleet_texts()
    assert benchmark.pedantic(lambda: check_fleet(texts), rounds=1)
    assert benchmark.stats["min"] < BAR_FLEET_S
