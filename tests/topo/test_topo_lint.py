"""``wsync topo lint``: topology files and NCCL's environment, written by hand here and recorded elsewhere."""

from __future__ import annotations

import io
import json
import os
import sys

import machines as m
import pytest
from recorded import needs_fixtures, recorded

from wsync.cli.main import main
from wsync.topo.findings import SEVERITY_RANK
from wsync.topo.lint import LintReport, lint
from wsync.topo.lint_env import Assignment, parse_environment
from wsync.topo.lint_hca import select_devices
from wsync.topo.lint_names import KNOWN
from wsync.topo.parse import read_texts


@pytest.fixture
def xml(tmp_path):
    def put(text: str, name: str = "topo.xml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return put


def ids(report: LintReport, at_least: str = "WARN") -> set[str]:
    return {f.id for f in report.findings if SEVERITY_RANK[f.severity] >= SEVERITY_RANK[at_least]}


def env(**variables: str) -> list[Assignment]:
    return [Assignment(f"NCCL_{k}", v) for k, v in variables.items()]


def host(box: m.Box | None = None):
    box = box or m.h100()
    return read_texts([("topo", m.topo_m(box)), ("query", m.query_all(box)), ("xml", m.system_xml(box))]).machines[0]


@pytest.mark.parametrize("box", m.HEALTHY.values(), ids=m.HEALTHY)
def test_what_nccl_dumps_of_a_healthy_machine_has_nothing_to_lint(box, xml):
    report = lint([xml(m.system_xml(box()))])
    assert ids(report) - {"nic.no-local"} == set(), report.findings
    assert ids(report, "CRIT") == set()


BUS = m.gpu_bus(m.h100(), 0)
WRONG = {
    "lint.version": ('<system version="1">', '<system version="2">'),
    "lint.tag-unknown": ('<nic><net name="mlx5_0"', '<nick/><nic><net name="mlx5_0"'),
    "lint.speed-unknown": ('link_speed="32.0 GT/s PCIe"', 'link_speed="32 GT/s PCIe"'),
    "lint.bus-id-twice": (m.nic_bus(m.h100(), 1), m.nic_bus(m.h100(), 0)),
    "lint.affinity": ("ffffffff", "fffffff"),
    "lint.nvlink-malformed": ('count="4"', 'count="four"'),
    "lint.bus-id-malformed": (f'busid="{BUS}"', 'busid="zz:00"'),
    "numa.unknown": ('numaid="1"', 'numaid="-1"'),
}


@pytest.mark.parametrize(("finding", "change"), WRONG.items(), ids=WRONG)
def test_one_slip_of_the_pen_is_one_finding(finding, change, xml):
    text = m.system_xml(m.h100())
    assert change[0] in text
    assert finding in ids(lint([xml(text.replace(*change, 1))]))


@pytest.mark.parametrize("speed", ["64 GT/s", "16.0 GT/s", "5.0 GT/s", "Gen4", "32.0GT/s PCIe"])
def test_speeds_that_look_right_and_that_nccl_takes_for_gen3(speed, xml):
    text = m.system_xml(m.h100()).replace("32.0 GT/s PCIe", speed, 1)
    (finding,) = [f for f in lint([xml(text)]).findings if f.id == "lint.speed-unknown"]
    assert speed in finding.evidence


def test_an_affinity_without_cpus_is_found(xml):
    text = m.system_xml(m.h100()).replace("00000000,00000000,00000000,ffffffff", ",".join(["00000000"] * 4))
    assert any(f.id == "lint.affinity" and "has no CPU" in f.evidence for f in lint([xml(text)]).findings)


def test_masks_that_share_cpus_are_found(xml):
    text = m.system_xml(m.h100()).replace("00000000,00000000,ffffffff,00000000", "00000000,00000000,ffffffff,00000001")
    assert any("share CPUs" in f.evidence for f in lint([xml(text)]).findings)


def test_nvlinks_to_oneself_to_nobody_and_uneven_ones(xml):
    text = m.system_xml(m.a100_mesh())
    mine, other = m.gpu_bus(m.a100_mesh(), 0), m.gpu_bus(m.a100_mesh(), 1)
    target = f'<nvlink target="{other}" count="4"'
    assert ids(lint([xml(text.replace(target, f'<nvlink target="{mine}" count="4"', 1))])) >= {"lint.nvlink-self"}
    report = lint([xml(text.replace(target, '<nvlink target="0000:7a:00.0" count="4"', 1))])
    assert "lint.nvlink-target" in ids(report)
    assert "lint.nvlink-uneven" in ids(lint([xml(text.replace(target, f'<nvlink target="{other}" count="3"', 1))]))


def test_a_dump_of_two_hosts_is_no_topology_file(xml):
    text = m.system_xml(m.gb200(), host="0xA").replace("</system>", "")
    both = text + m.system_xml(m.gb200(), host="0xB", first_rank=4).split("\n", 1)[1]
    (finding,) = [f for f in lint([xml(both)]).findings if f.id == "lint.several-hosts"]
    assert finding.subject.devices == ("0xA", "0xB")


def test_slow_uplinks_of_a_file_warn_although_its_author_is_believed_elsewhere(xml):
    assert ids(lint([xml(m.system_xml(m.h100(), uplink="5.0 GT/s PCIe"))])) == {"pcie.uplink-slow"}


def test_a_file_is_compared_with_the_host(xml):
    box = m.h100()
    text = m.system_xml(box)
    assert ids(lint([xml(text)], machine=host())) == set()
    moved = text.replace(f'busid="{BUS}"', 'busid="0000:77:00.0"')
    report = lint([xml(moved)], machine=host())
    assert {"lint.bus-id-absent", "lint.device-missing"} <= ids(report)
    (absent,) = [f for f in report.findings if f.id == "lint.bus-id-absent"]
    assert absent.subject.devices == ("0000:77:00.0",)
    renamed = lint([xml(text.replace('"mlx5_3"', '"mlx5_bond_3"'))], machine=host())
    assert [f.subject.devices for f in renamed.findings if f.id == "lint.net-absent"] == [("mlx5_bond_3",)]


def test_bus_ids_are_looked_for_in_sysfs(xml, tmp_path):
    box = m.h100()
    devices = tmp_path / "sys" / "bus" / "pci" / "devices"
    for i in range(8):
        (devices / m.gpu_bus(box, i)).mkdir(parents=True)
    for i in range(len(box.nics)):
        (devices / m.nic_bus(box, i)).mkdir()
    path = str(xml(m.system_xml(box)))
    assert main(["topo", "lint", path, "--sysfs", str(tmp_path / "sys")]) == 0
    (devices / m.gpu_bus(box, 5)).rmdir()
    report = lint([path], sysfs=tmp_path / "sys")
    assert [f.subject.devices for f in report.findings if f.id == "lint.bus-id-absent"] == [(m.gpu_bus(box, 5),)]
    assert main(["topo", "lint", path, "--sysfs", str(tmp_path)]) == 3


def test_nets_that_the_list_does_not_select_are_named(xml):
    path = xml(m.system_xml(m.h100()))
    some = lint([path], env(IB_HCA="=" + ",".join(f"mlx5_{i}" for i in range(8))))
    (finding,) = [f for f in some.findings if f.id == "lint.net-not-selected"]
    assert (finding.severity, finding.subject.devices) == ("INFO", ("mlx5_8", "mlx5_9"))
    assert ids(lint([path], env(IB_HCA="=mlx4_0"))) >= {"lint.net-not-selected"}


def test_lists_select_what_nccl_selects():
    names = ["mlx5_0", "mlx5_1", "mlx5_10", "mlx5_bond_0"]
    assert select_devices("=mlx5_1", names) == ("mlx5_1",)
    assert select_devices("mlx5_1", names) == ("mlx5_1", "mlx5_10")
    assert select_devices("^=mlx5_1:1", names) == ("mlx5_0", "mlx5_10", "mlx5_bond_0")
    assert select_devices("^mlx5_1", names) == ("mlx5_0", "mlx5_bond_0")
    assert select_devices("=mlx5_0::0:1,mlx5_10:1", names) == ("mlx5_0", "mlx5_10")
    assert select_devices("", names) == tuple(names)
    # Only the first = counts; the second belongs to a name that no device has.
    assert select_devices("=mlx5_0,=mlx5_1", names) == ("mlx5_0",)


VARIABLES = [
    ("IB_HCA", "=mlx5_0,mlx5_1,mlx5_1", "lint.hca-twice", "WARN"),
    ("IB_HCA", "=mlx5_0,mlx5_12", "lint.hca-absent", "WARN"),
    ("IB_HCA", "=mlx5_0,=mlx5_1", "lint.hca-prefix", "CRIT"),
    ("IB_HCA", "=ib0", "lint.hca-none", "CRIT"),
    ("P2P_DISABLE", "1", "lint.env-left-set", "WARN"),
    ("P2P_DISABLE", "true", "lint.env-value", "WARN"),
    ("P2P_LEVEL", "LOC", "lint.env-left-set", "WARN"),
    ("P2P_LEVEL", "NODE", "lint.env-value", "WARN"),
    ("NET_GDR_LEVEL", "0", "lint.env-left-set", "WARN"),
    ("NET_GDR_LEVEL", "phb", "lint.env-value", "WARN"),
    ("NET_GDR_LEVEL", "3", "lint.env-value", "INFO"),
    ("NVLS_ENABLE", "0", "lint.env-left-set", "WARN"),
    ("NVLS_ENABLE", "on", "lint.env-value", "WARN"),
    ("IB_DISABLE", "1", "lint.env-left-set", "WARN"),
    ("NET", "Socket", "lint.env-left-set", "WARN"),
    ("ALGO", "Ring", "lint.env-pinned", "INFO"),
    ("IB_HAC", "mlx5_0", "lint.env-misspelt", "WARN"),
    ("P2P_DISABEL", "1", "lint.env-misspelt", "WARN"),
    ("TOPO_FILES", "/x", "lint.env-misspelt", "WARN"),
    ("ENTIRELY_ELSE", "1", "lint.env-unknown", "INFO"),
    ("ASYNC_ERROR_HANDLING", "1", "lint.env-unknown", "INFO"),
]


@pytest.mark.parametrize(("name", "value", "finding", "severity"), VARIABLES)
def test_an_environment_that_looks_right_and_is_not(name, value, finding, severity):
    found = [f for f in lint((), env(**{name: value}), host()).findings if f.id == finding]
    assert [f.severity for f in found] == [severity]
    assert value in found[0].evidence or name in found[0].evidence


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("IB_HCA", "=mlx5_0,mlx5_1:1"),
        ("P2P_DISABLE", "0"),
        ("P2P_LEVEL", "NVL"),
        ("NVLS_ENABLE", "2"),
        ("DEBUG", "INFO"),
        ("IB_TIMEOUT", "0x16"),
        ("SOCKET_IFNAME", "eth0"),
        ("FASTRAK_NUM_FLOWS", "2"),
        ("HOME", "/usr"),
        ("MIN_NCHANNELS", "4"),
    ],
)
def test_a_good_environment_has_no_findings(name, value):
    assert lint((), env(**{name: value}), host()).findings == ()


def test_every_known_name_is_spelt_alike_by_the_linter_itself():
    report = lint((), [Assignment(name, "") for name in KNOWN if name != "NCCL_TOPO_FILE"])
    assert {f.id for f in report.findings} <= {"lint.env-pinned"}


def test_p2p_that_is_off_costs_less_where_there_is_no_nvlink():
    (finding,) = lint((), env(P2P_DISABLE="1"), host(m.l40s())).findings
    assert finding.severity == "INFO"


def test_a_list_without_exact_names_selects_more_than_it_says():
    box = m.a100()
    wide = read_texts([("a", m.topo_m(box).replace("mlx5_7", "mlx5_10"))]).machines[0]
    (finding,) = [f for f in lint((), env(IB_HCA="mlx5_1"), wide).findings if f.id == "lint.hca-ambiguous"]
    assert "mlx5_1 also selects mlx5_10" in finding.evidence


def test_all_ways_to_write_an_environment_are_read():
    text = (
        "export NCCL_IB_HCA='=mlx5_0,mlx5_1'\nNCCL_DEBUG=INFO NCCL_P2P_LEVEL=NVL torchrun x\n"
        'mpirun -x NCCL_NET="IB" -x MY_NCCL_X=1 y\n# NCCL_ALGO=Ring\n'
    )
    found = parse_environment(text.encode(), "job.sh")
    assert [(a.name[5:], a.value, a.line) for a in found] == [
        ("IB_HCA", "=mlx5_0,mlx5_1", 1), ("DEBUG", "INFO", 2), ("P2P_LEVEL", "NVL", 2), ("NET", "IB", 3),
    ]  # fmt: skip
    raw = parse_environment(b"PATH=/bin\0NCCL_NET=IB\0NCCL_ALGO=Tree,Ring\0", "environ")
    assert [(a.name, a.value) for a in raw] == [("NCCL_NET", "IB"), ("NCCL_ALGO", "Tree,Ring")]


def test_a_variable_that_is_set_twice_and_a_range_that_is_empty_are_found():
    twice = [Assignment("NCCL_NET", "IB", 1), Assignment("NCCL_NET", "Socket", 9)]
    (finding,) = [f for f in lint((), twice).findings if f.id == "lint.env-twice"]
    assert "'IB' in line 1, 'Socket' in line 9" in finding.evidence
    assert ids(lint((), env(MIN_NCHANNELS="32", MAX_NCHANNELS="8"))) == {"lint.env-value"}


def test_the_command_lints_its_own_environment_and_the_file_that_it_names(xml, monkeypatch, capsys):
    for name in [k for k in os.environ if k.startswith("NCCL_")]:
        monkeypatch.delenv(name)
    assert main(["topo", "lint"]) == 0
    path = xml(m.system_xml(m.a100()).replace('link_speed="16.0 GT/s PCIe"', 'link_speed="16.0 GT/s"', 1))
    monkeypatch.setenv("NCCL_TOPO_FILE", str(path))
    assert main(["topo", "lint"]) == 1
    monkeypatch.setenv("NCCL_TOPO_FILE", str(path) + ".not")
    capsys.readouterr()
    assert main(["topo", "lint", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["format_version"], report["findings"][0]["id"]) == (1, "lint.topo-file-absent")


def test_the_command_reads_stdin_files_and_a_machine(xml, monkeypatch, capsys, tmp_path):
    class Stdin:
        buffer = io.BytesIO(b"NCCL_IB_HCA==mlx5_0,mlx5_0\n")

    monkeypatch.setattr(sys, "stdin", Stdin)
    assert main(["topo", "lint", "--env", "-"]) == 1
    assert "mlx5_0 is listed twice" in capsys.readouterr().out
    job = xml("export NCCL_IB_HCA==mlx5_99\n", "job.sh")
    box = xml(m.topo_m(m.h100()), "topo.txt")
    assert main(["topo", "lint", "--env", str(job), "--machine", str(box)]) == 2
    assert "selects none of mlx5_0" in capsys.readouterr().out
    assert main(["topo", "lint", str(tmp_path / "absent.xml")]) == 3
    assert main(["topo", "lint", "--env", str(tmp_path / "absent")]) == 3
    assert main(["topo", "lint", str(box)]) == 3
    assert "--env" in capsys.readouterr().out


def test_cut_xml_is_unknown_and_says_what_is_open(xml, capsys):
    assert main(["topo", "lint", str(xml(m.system_xml(m.h100())[:900]))]) == 3
    assert "is not closed" in capsys.readouterr().out


RECORDED = {
    "nccl_xml/azure_ncv4-topo.xml": ("CRIT", "lint.nvlink-self", ("GPU0", "GPU1", "GPU2", "GPU3")),
    "nccl_xml/oci_bm.gpu.b4.8_a100.xml": ("WARN", "lint.affinity", ("NUMA node 7",)),
    "nccl_xml/oci_h100_5GTs_upstream.xml": ("WARN", "pcie.uplink-slow", None),
    "nccl_xml/ibm_gx3d_h100_vm_2.5GTs_x1_bridges.xml": ("WARN", "vm.virtual-bridge", None),
    "nccl_xml/gb300_2tray_rank5_nvlink_missing.xml": ("CRIT", "nvlink.gpu-isolated", ("GPU1",)),
    "nccl_xml/gb300_1tray_gpu1_nvlink_count0.xml": ("CRIT", "nvlink.gpu-isolated", ("GPU1",)),
    "nccl_xml/h200_vm_no_numa_fragment_truncated.xml": ("UNKNOWN", "input.unreadable", ()),
    "nccl_xml/azure_nc48v4-topo.xml": ("OK", "lint.speed-empty", ("GPU0", "GPU1")),
    "nccl_xml/aws_g5.48xl-topo.xml": ("OK", "lint.class-missing", None),
    "nccl_xml/aws_p4d-24xl-topo.xml": ("OK", None, None),
    "nccl_xml/aws_p4de-24xl-topo.xml": ("OK", None, None),
    "nccl_xml/azure_ndv2-topo.xml": ("OK", None, None),
    "nccl_xml/azure_ndv4-topo.xml": ("OK", None, None),
    "nccl_xml/azure_ndv5-topo.xml": ("OK", None, None),
    "nccl_xml/oci_bm.gpu4.8_a100.xml": ("OK", None, None),
    "nccl_xml/oci_h100_32GTs.xml": ("OK", None, None),
    "nccl_xml/gb300_2tray_8gpu_healthy.xml": ("WARN", "lint.several-hosts", None),
}


@needs_fixtures
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_topology_files_reach_their_conclusion(name):
    verdict, finding, devices = RECORDED[name]
    report = lint([recorded(name)])
    assert report.verdict == verdict
    if finding:
        (found,) = [f for f in report.findings if f.id == finding]
        assert devices is None or found.subject.devices == devices


@needs_fixtures
def test_a_vendors_table_lists_one_device_twice(capsys):
    assert main(["topo", "lint", "--env", str(recorded("misc/oci_nccl_ib_hca_by_shape.tsv"))]) == 1
    out = capsys.readouterr().out
    assert "BM.GPU.A100-v2.8: mlx5_1 is listed twice; BM.GPU.B4.8 has mlx5_12 in its place" in out
    assert out.count("lint.hca-twice") == 1


@needs_fixtures
def test_a_recorded_launch_line_marks_every_entry_and_so_selects_one_device(capsys):
    matrix = recorded("topo_m/h100_8x_12nic_numa_off_hostA_0007.txt")
    line = recorded("misc/h100_numa_off.kernel_cmdline.txt")
    assert main(["topo", "lint", "--env", str(line), "--machine", str(matrix)]) == 2
    assert "NCCL would use mlx5_0\n" in capsys.readouterr().out
