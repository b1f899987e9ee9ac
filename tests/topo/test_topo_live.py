"""The live reading says what the files of the same machine say: a fake NVML under the real wrapper, a fake ``/sys``."""

from __future__ import annotations

import dataclasses

import fake_nvml as fake
import fake_sysfs
import machines as m
import pynvml
import pytest
from live_rig import alarms, judge, read_board, read_box, sysfs_of
from recorded import FIXTURES, manifest, needs_fixtures, recorded

from wsync.topo.merge import merge_machines
from wsync.topo.model import Topology
from wsync.topo.parse import read_files, read_texts
from wsync.topo.report import check_topology

LINKED = ("dgx1", "dgx2", "a100", "a100_mesh", "a800", "h100", "h100_mesh", "b200", "gb200")
SWITCHED = ("dgx2", "a100", "a800", "h100", "b200", "gb200")


def of_files(*texts: str):
    """The same machine, as its files tell it."""
    return check_topology(read_texts((f"file{i}", t) for i, t in enumerate(texts)))


@pytest.mark.parametrize("name", m.HEALTHY)
def test_a_healthy_machine_raises_no_alarm_and_its_files_agree(name, tmp_path):
    box = m.HEALTHY[name]()
    live = read_box(box, tmp_path)
    report = judge(live)
    assert report.verdict == "OK"
    files = of_files(m.topo_m(box), m.query_all(box))
    assert {f.id for f in report.all_findings()} - {"p2p.none"} == {f.id for f in files.all_findings()}
    (mine,), (theirs,) = report.machines, files.machines
    assert (mine.platform, mine.joined, mine.links) == (theirs.platform, theirs.joined, theirs.links)
    assert (mine.islands, mine.compute_nics, mine.nic_of_gpu) == (
        theirs.islands,
        theirs.compute_nics,
        theirs.nic_of_gpu,
    )
    assert mine.complete


@pytest.mark.parametrize("name", m.HEALTHY)
def test_the_matrix_is_cell_by_cell_that_of_the_tool(name, tmp_path):
    box = m.HEALTHY[name]()
    (table,) = read_texts([("topo", m.topo_m(box))]).machines
    live = read_box(box, tmp_path)
    cells = {(p.a, p.b): (p.kind, p.links) for p in live.paths}
    assert cells == {(p.a, p.b): (p.kind, p.links) for p in table.paths}
    assert [(g.cpus, g.numa, g.gpu_numa) for g in live.gpus] == [(g.cpus, g.numa, g.gpu_numa) for g in table.gpus]


FAULTS = {
    "gpu without NVLink": lambda box: m.isolate(box, 1),
    "gpu with a link less": lambda box: m.weaken_gpu(box, 2),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", SWITCHED)
def test_a_fault_is_the_same_finding_as_from_files(name, fault, tmp_path):
    box = FAULTS[fault](m.HEALTHY[name]())
    report = judge(read_box(box, tmp_path))
    files = of_files(m.topo_m(box), m.nvlink_s(box), m.query_all(box))
    assert report.verdict == "CRIT"
    found = {f.id: f.subject.devices for f in report.all_findings() if f.severity == "CRIT"}
    assert found == {f.id: f.subject.devices for f in files.all_findings() if f.severity == "CRIT"}
    assert len(found) == 1


@pytest.mark.parametrize("lost", [0, 3, 5, 7])
def test_a_gpu_that_a_cube_mesh_has_lost_is_named_from_its_peers_links(lost, tmp_path):
    report = judge(read_box(m.remove(m.dgx1(), lost), tmp_path))
    assert alarms(report) == {"gpu.lost": (f"GPU{lost}",)}


@pytest.mark.parametrize("fault", [m.move_nics, None])
def test_what_is_wrong_with_nics_is_the_same_finding_as_from_files(fault, tmp_path):
    box = m.move_nics(m.a100(), 0) if fault else m.h100_vm()
    found = alarms(judge(read_box(box, tmp_path)))
    assert found == alarms(of_files(m.topo_m(box)))
    assert found


# Recordings


def _readable():
    for name in manifest():
        if "*" in name or not name.startswith(("topo_m/", "nccl_xml/")):
            continue
        for i, machine in enumerate(read_files([recorded(name)]).machines):
            # Excerpts are of no machine that could be read; hand-written files name no GPU.
            if machine.gpus and machine.paths and not machine.gaps and not machine.declared:
                yield pytest.param(machine, id=f"{name}-{i}")


WHAT_FILES_ALONE_SAY = {"lint.nvlink-self"}
WHAT_FILES_EXEMPT = {
    # NCCL says of an interface that it is a socket's (gdr 0); sysfs has no such word.
    "nic.no-local"
}


@needs_fixtures
@pytest.mark.parametrize("machine", list(_readable()) if FIXTURES else [])
def test_the_live_reading_of_a_recorded_machine_reaches_the_conclusion_of_its_file(machine, tmp_path):
    board = fake.of_machine(machine)
    buses = [g.bus for g in board.gpus]
    tree = fake_sysfs.devices_of_tree(machine) if machine.pci else fake_sysfs.devices_of_machine(machine, buses)
    expected = alarms(judge(machine))
    # A table cannot tell numa=off from a single socket; the command line that this reading has can, and says so itself.
    cmdline = "numa=off" if "numa.hidden" in expected else "quiet"
    live = read_board(board, fake_sysfs.write_sysfs(tmp_path, *tree, cmdline))
    got = {(p.a, p.b): (p.kind, p.links) for p in live.paths}
    want = {(p.a, p.b): (p.kind, p.links) for p in machine.paths}
    assert {pair: got.get(pair) for pair in want} == want
    exempt = WHAT_FILES_EXEMPT if any(n.gdr is False for n in machine.nics) else set()
    if cmdline == "numa=off":
        exempt = exempt | {"numa.off"}
    found = {i: d for i, d in alarms(judge(live)).items() if i not in exempt}
    assert found == {i: d for i, d in expected.items() if i not in WHAT_FILES_ALONE_SAY}


@needs_fixtures
def test_at_least_forty_recorded_machines_are_read():
    assert len(list(_readable())) >= 40


# What only NVML tells


def test_links_that_are_up_while_no_pair_may_use_them_are_found(tmp_path):
    box = m.h100()
    refused = [[0 if i == j else 5 for j in range(8)] for i in range(8)]
    board = fake.of_box(box)
    board.p2p["n"] = refused
    assert alarms(judge(read_board(board, sysfs_of(box, tmp_path)))) == {"p2p.none": tuple(box.gpu_names)}
    board.p2p["n"] = [[5 if 3 in (i, j) and i != j else 0 for j in range(8)] for i in range(8)]
    assert alarms(judge(read_board(board, tmp_path))) == {"p2p.pair-refused": ("GPU3",)}


def test_links_that_nccl_would_skip_are_found(tmp_path):
    box = m.h100()
    board = fake.of_box(box)
    board.gpus[5].links[7].p2p = False
    report = judge(read_board(board, sysfs_of(box, tmp_path)))
    assert alarms(report) == {"nvlink.nccl-skips": ("GPU5",)}
    assert "links 7: is active and its capability for P2P is 0" in report.all_findings()[0].evidence


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"mig": 1}, "gpu.mig"),
        ({"recovery": 1}, "gpu.reset-required"),
        ({"remap_failed": 1}, "gpu.remap-failed"),
        ({"width": 8}, "pcie.width-reduced"),
        ({"generation": 3}, "pcie.speed-reduced"),
        ({"bandwidth_mode": 3}, "nvlink.bandwidth-mode"),
        ({"fabric": (2, 0)}, "fabric.state"),
        ({"health": 0x1A9}, "fabric.health"),
        ({"health": 0x5AA}, "fabric.health"),
    ],
)
def test_states_of_a_gpu_are_found(change, finding, tmp_path):
    box = m.h100()
    board = fake.of_box(box)
    for name, value in change.items():
        setattr(board.gpus[4], name, value)
    assert alarms(judge(read_board(board, sysfs_of(box, tmp_path)))) == {finding: ("GPU4",)}


def test_slow_links_and_errors_are_found(tmp_path):
    box = m.h100()
    board = fake.of_box(box)
    board.gpus[2].links[3].rate_mbps = 12500
    board.gpus[6].links[0].errors = (9, 0, 0)
    found = alarms(judge(read_board(board, sysfs_of(box, tmp_path))))
    assert found == {"nvlink.link-slow": ("GPU2",), "nvlink.errors": ("GPU6",)}


def test_an_idle_gpu_at_a_low_generation_is_no_fault(tmp_path):
    box = m.a100()
    board = fake.of_box(box)
    for gpu in board.gpus:
        gpu.generation, gpu.state = 1, 8
    assert judge(read_board(board, sysfs_of(box, tmp_path))).verdict == "OK"


# Old drivers


@pytest.mark.parametrize(
    "missing",
    [
        "nvmlDeviceGetNvLinkRemoteDeviceType",
        "nvmlDeviceGetGpuFabricInfoV",
        "nvmlDeviceGetNvlinkBwMode",
        "nvmlDeviceGetNvLinkState",
        "nvmlDeviceGetMemoryAffinity",
        "nvmlDeviceGetNumaNodeId",
    ],
)
def test_a_call_that_an_old_driver_lacks_is_named_and_the_rest_judged(missing, tmp_path):
    box = m.isolate(m.h100(), 6)
    report = judge(read_box(box, tmp_path, fake.Faults(missing=(missing,))))
    assert alarms(report) == {"nvlink.gpu-isolated": ("GPU6",)}
    (named,) = [f for f in report.all_findings() if f.id == "probe.call-missing"]
    assert missing in named.evidence


def test_a_driver_that_cannot_tell_any_link_leaves_them_unjudged(tmp_path):
    faults = fake.Faults(missing=("nvmlDeviceGetNvLinkState", "nvmlDeviceGetFieldValues"))
    report = judge(read_box(m.h100(), tmp_path, faults))
    assert report.verdict == "UNKNOWN"
    assert "nvmlDeviceGetNvLinkState" in next(f for f in report.all_findings() if f.severity == "UNKNOWN").evidence


def test_the_wrapper_names_the_missing_symbol_as_the_real_library_would():
    fake.install(fake.FakeLib(fake.of_box(m.h100()), fake.Faults(missing=("nvmlDeviceGetNvLinkState",))))
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    with pytest.raises(pynvml.NVMLError_FunctionNotFound):
        pynvml.nvmlDeviceGetNvLinkState(handle, 0)
    fake.install(None)


# A GPU that is gone


@pytest.mark.parametrize("after", [0, 1, 5, 60, 200])
def test_a_gpu_that_falls_off_the_bus_is_lost_and_its_peers_are_judged(after, tmp_path):
    box = m.isolate(m.h100(), 2)
    report = judge(read_box(box, tmp_path, fake.Faults(lost=(5, after))))
    found = alarms(report)
    assert found["gpu.lost"] == ("GPU5",)
    assert found["nvlink.gpu-isolated"] == ("GPU2",)
    assert set(found) == {"gpu.lost", "nvlink.gpu-isolated"}


# Together with files


def test_a_gpu_that_nccl_did_not_see_although_the_driver_does_is_isolated(tmp_path):
    box = m.gb200()
    live = read_box(box, tmp_path)
    (dump,) = read_texts([("dump.xml", m.system_xml(m.isolate(box, 1)))]).machines
    (merged,) = merge_machines([live, dump])
    report = check_topology(Topology((merged,)))
    (root,) = [f for f in report.all_findings() if f.severity == "CRIT"]
    assert (root.id, root.subject.devices) == ("nvlink.gpu-isolated", ("GPU1",))
    assert "NCCL found none of them" in root.evidence
    assert {f.id for f in root.symptoms} == {"sources.disagree"}


def test_links_that_text_and_nvml_count_differently_are_a_disagreement(tmp_path):
    box = m.h100()
    live = read_box(box, tmp_path)
    (text,) = read_texts([("topo.txt", m.topo_m(m.weaken(box, 0, 1, 2)))]).machines
    found = alarms(judge(merge_machines([live, text])[0]))
    assert {i: set(devices) for i, devices in found.items()} == {"sources.disagree": {"GPU0", "GPU1"}}


@pytest.mark.parametrize("name", LINKED)
def test_a_healthy_machine_and_all_its_files_agree(name, tmp_path):
    box = m.HEALTHY[name]()
    live = read_box(box, tmp_path)
    texts = [m.topo_m(box), m.nvlink_s(box), m.p2p(box), m.query_all(box), m.system_xml(box)]
    parts = read_texts((f"f{i}", t) for i, t in enumerate(texts)).machines
    (merged,) = merge_machines([live, *parts])
    assert alarms(judge(merged)) == {}
    assert (len(merged.gpus), len(merged.nics)) == (len(box.gpus), len(box.nics))


def test_a_board_of_a_tenant_is_no_fault(tmp_path):
    one = dataclasses.replace(m.h100(), gpus=m.h100().gpus[:1], nv=((0,),), lost_links={0: frozenset(range(18))})
    assert judge(read_box(one, tmp_path)).verdict == "OK"
