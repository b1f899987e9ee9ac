"""The guide explains every finding, findings link to where it does, and its commands run."""

from __future__ import annotations

import glob
import io
import json
import os
import re
import sys
from pathlib import Path

import machines as m
from live_rig import read_box
from test_topo_bandwidth import nccl_tests, nvbandwidth, square

from wsync.cli.main import main
from wsync.cli.topo import inputs
from wsync.describe import describe_sink, describe_source, load_model
from wsync.plan import encode_plan, make_plan
from wsync.topo.findings import GUIDE, guide_link
from wsync.topo.parse import read_texts
from wsync.topo.parse.saved import encode_topology

ROOT = Path(__file__).parents[2]
AREAS = (
    "input|sources|platform|host|nvlink|nvswitch|matrix|p2p|gpu|fabric|xid|pcie|vm|nic|numa|nccl|lint|probe|bandwidth"
)


def test_every_finding_has_a_heading_and_every_heading_a_finding():
    sources = "".join(p.read_text() for p in (ROOT / "wsync" / "topo").rglob("*.py"))
    ids = set(re.findall(rf'"((?:{AREAS})\.[a-z0-9-]+)"', sources))
    headings = re.findall(r"^#### (\S+)$", (ROOT / GUIDE).read_text(), re.M)
    assert sorted(headings) == sorted(ids)


def test_links_lead_to_the_headings_anchor():
    # GitHub makes an anchor of a heading by lower case, and drops dots.
    assert guide_link("nvlink.gpu-isolated") == "docs/guides/topo.md#nvlinkgpu-isolated"


# ---- commands

STATUSES = {"achieved": (0, 1)}
"""A publish may be slower than predicted; everything else in the guide is well."""


def commands():
    """Every ``wsync topo`` of the guide's shell blocks, without what the shell takes."""
    text = (ROOT / GUIDE).read_text()
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        for line in block.splitlines():
            for found in re.findall(r"wsync topo ([^#;'>]+)", line):
                yield found.replace("$(hostname)", "n9").strip()


def write_inputs(folder):
    """What the commands of the guide read: files that they write themselves are not among them."""
    box = m.h100()
    for name in ("node0", "node1", "node2"):
        (folder / name).mkdir()
        (folder / name / "topo.txt").write_text(m.topo_m(box))
    (folder / "shared").mkdir()
    texts = [("topo", m.topo_m(box)), ("query", m.query_all(box)), ("xml", m.system_xml(box))]
    for name in ("shared/n1", "shared/n7", "trainer", "engine"):
        (folder / f"{name}.json").write_bytes(encode_topology(read_texts(texts, Path(name).name)))
    devices = folder / "sys" / "bus" / "pci" / "devices"
    for bus in [m.gpu_bus(box, i) for i in range(8)] + [m.nic_bus(box, i) for i in range(10)]:
        (devices / bus).mkdir(parents=True)
    model = load_model("Qwen3-0.6B")
    sides = describe_source(model, "fsdp=16", ["a"] * 16), describe_sink(model, "tp=8", ["b"] * 8, "bf16")
    ranks = [["trainer/0", [["pack", 0.0, 0.5]]], ["engine/0", [["receive", 0.0, 1.0]]]]
    report = {"wire_bytes": 10**9, "seconds": {"total": 1.0}, "ranks": ranks}
    files = {
        "topo.txt": m.topo_m(box),
        "links.txt": m.nvlink_s(box),
        "nccl-dump.xml": m.system_xml(box),
        "topo.xml": m.system_xml(box),
        "job.sh": "export NCCL_DEBUG=WARN\n",
        "all_reduce.log": nccl_tests("all_reduce", 235.0),
        "d2d.json": nvbandwidth(square()),
        "report.json": json.dumps(report),
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "plan.bin").write_bytes(encode_plan(make_plan(*sides)))


def test_every_command_of_the_guide_runs(tmp_path, monkeypatch):
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith("NCCL_")]:
        monkeypatch.delenv(name)
    roots = []

    def read_live(options, host):
        # The children that read a machine have tests of their own.
        roots.append(options.root)
        return read_box(m.h100(), tmp_path / "root" / str(len(roots)))

    monkeypatch.setattr(inputs, "read_live", read_live)
    found = {}
    for command in commands():
        argv = command.replace("/etc/nccl/", "").replace("/shared/", "shared/").replace(" /sys", " sys").split()
        argv = [x for a in argv for x in (sorted(glob.glob(a)) if "*" in a else [a])]
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"NCCL_DEBUG=WARN\n")))
        status = main(["topo", *argv])
        assert status in STATUSES.get(argv[0], (0,)), command
        found.setdefault(argv[0], []).append(status)
    assert set(found) == {
        "check", "save", "compare", "golden", "lint", "advise", "plan", "import-bandwidth", "achieved",
    }  # fmt: skip
    assert "/host" in roots
    assert len(roots) >= 6
