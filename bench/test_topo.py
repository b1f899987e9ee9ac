"""How long a topology check takes. Run with ``pytest bench/test_topo.py``.

Targets: a saved machine of 8 GPUs in 10 ms inside the process, 1 000 machines in 10 s.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "tests" / "topo"))

import machines as m

from wsync.topo.parse import read_texts
from wsync.topo.parse.saved import encode_topology
from wsync.topo.report import check_topology

WRITERS = {"topo_m": m.topo_m, "nvlink_s": m.nvlink_s, "xml": m.system_xml, "query": m.query_all}


def whole(box):
    return read_texts([(name, write(box)) for name, write in WRITERS.items()])


@pytest.mark.parametrize("kind", ["topo_m", "xml", "saved", "all"])
def test_check_of_8_gpus(benchmark, kind):
    box = m.h100()
    if kind == "all":
        texts = [(name, write(box)) for name, write in WRITERS.items()]
    elif kind == "saved":
        texts = [("saved", encode_topology(whole(box)).decode())]
    else:
        texts = [(kind, WRITERS[kind](box))]
    report = benchmark(lambda: check_topology(read_texts(texts)))
    assert report.verdict == "OK"
    # The least of many rounds: what else runs on the machine only adds.
    assert benchmark.stats["min"] < 10e-3


def test_check_of_1000_machines():
    texts = []
    for i in range(1000):
        box = m.isolate(m.h100(), i % 8) if i % 100 == 0 else m.h100()
        texts.append((f"node{i}", [("topo", m.topo_m(box)), ("links", m.nvlink_s(box))]))
    start = time.perf_counter()
    verdicts = [check_topology(read_texts(files, host)).verdict for host, files in texts]
    seconds = time.perf_counter() - start
    assert verdicts.count("CRIT") == 10
    assert seconds < 10
    sys.stdout.write(f"1000 machines in {seconds:.2f} s\n")
