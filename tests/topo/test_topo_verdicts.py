"""Verdicts that were once wrong: faults that went unseen, and healthy machines that raised an alarm."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import machines as boxes
import pytest

from wsync.topo.findings import Finding
from wsync.topo.model import Gpu, Machine, Nic, Path
from wsync.topo.parse import read_texts
from wsync.topo.report import Report, check_machine, check_topology

EVERY = range(8)


def near(gpu: int, nic: int) -> str:
    """Each GPU has the NIC of its number on its switch, and two sockets have four of both."""
    return "PIX" if gpu == nic else "NODE" if gpu // 4 == nic // 4 else "SYS"


def matrix(
    gpus: Sequence[int],
    cell: Callable[[int, int], str],
    nics: Sequence[str] = (),
    nic_cell: Callable[[int, int], str] = near,
    between: Callable[[int, int], str] = lambda a, b: "NODE",
    sockets: int = 2,
) -> str:
    """What ``nvidia-smi topo -m`` prints of GPUs and NICs."""
    columns = [*(f"GPU{i}" for i in gpus), *nics]
    lines = ["\t" + "\t".join(columns) + "\tCPU Affinity\tNUMA Affinity"]
    for i in gpus:
        cells = [*(" X " if i == j else cell(i, j) for j in gpus), *(nic_cell(i, j) for j in range(len(nics)))]
        socket = i * sockets // 8
        lines.append("\t".join([f"GPU{i}", *cells, f"{48 * socket}-{48 * socket + 47}", str(socket)]))
    for a, name in enumerate(nics):
        own = [" X " if a == b else between(a, b) for b in range(len(nics))]
        lines.append("\t".join([name, *(nic_cell(i, a) for i in gpus), *own]))
    return "\n".join([*lines, ""])


def nv(links: int) -> Callable[[int, int], str]:
    return lambda i, j: f"NV{links}"


def alive(*gpus: int, links: int = 18) -> Callable[[int, int], str]:
    """The GPUs that still have NVLink; all others have lost it."""
    return lambda i, j: f"NV{links}" if {i, j} <= set(gpus) else "SYS"


def smi(
    model: str, gpus: Sequence[int] = EVERY, links: int = 18, down: Sequence[int] = (), rate: float = 26.562
) -> str:
    """What ``nvidia-smi nvlink -s`` prints."""
    lines = []
    for gpu in gpus:
        lines.append(f"GPU {gpu}: {model} (UUID: GPU-00000000-0000-0000-0000-00000000000{gpu})")
        lines += [f"\t Link {i}: {'<inactive>' if i in down else f'{rate} GB/s'}" for i in range(links)]
    return "\n".join([*lines, ""])


def listing(model: str, count: int = 2) -> str:
    rows = [f"{model}, {i}, 00000000:{i + 1:02x}:00.0" for i in range(count)]
    return "\n".join(["name, index, pci.bus_id", *rows, ""])


def judge(*texts: str) -> Report:
    return check_topology(read_texts((f"file{i}", text) for i, text in enumerate(texts)), None)


def found(report: Report, finding_id: str) -> Finding:
    (finding,) = [f for f in report.all_findings() if f.id == finding_id]
    return finding


def ids(report: Report) -> list[str]:
    return [f.id for f in report.all_findings()]


# A GPU that is not in the list


@pytest.mark.parametrize("gpus", [range(7), [0, 1, 2, 4, 5, 6, 7], range(15), [0, 1, 3]])
def test_a_switched_board_that_lacks_a_gpu_is_noticed_without_its_model(gpus):
    report = judge(matrix(gpus, nv(18)))
    assert report.verdict == "WARN"
    assert found(report, "gpu.count").severity == "WARN"


def test_the_index_that_is_left_out_is_named():
    assert "GPU3" in found(judge(matrix([0, 1, 2, 4, 5, 6, 7], nv(18))), "gpu.count").evidence


@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_whole_boards_and_small_parts_raise_no_alarm(count):
    assert "gpu.count" not in ids(judge(matrix(range(count), nv(18))))


# Boards of which most GPUs have lost NVLink


@pytest.mark.parametrize("left", [(0, 1), (0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3, 4), tuple(range(7))])
@pytest.mark.parametrize("named", [False, True])
def test_whoever_has_lost_nvlink_is_named_however_many_they_are(left, named):
    texts = [matrix(EVERY, alive(*left))]
    if named:
        texts.append(listing("NVIDIA H100 80GB HBM3", 8))
    report = judge(*texts)
    (machine,) = report.machines
    assert (report.verdict, machine.joined, machine.links) == ("CRIT", "switch", 18)
    lost = {d for f in machine.findings if f.id == "nvlink.gpu-isolated" for d in f.subject.devices}
    assert lost == {f"GPU{i}" for i in EVERY if i not in left}
    assert "platform.mismatch" not in ids(report)


def test_pairs_of_h200_nvl_are_bridges_although_they_have_18_links():
    report = judge(matrix(EVERY, lambda i, j: "NV18" if i // 2 == j // 2 else "SYS"))
    assert (report.verdict, report.machines[0].joined) == ("OK", "bridge")


def test_islands_of_four_with_six_links_to_each_peer_are_meshes():
    report = judge(matrix(EVERY, lambda i, j: "NV6" if i // 4 == j // 4 else "SYS"), listing("NVIDIA H200 NVL", 8))
    assert (report.machines[0].joined, report.machines[0].links) == ("mesh", 18)


# Inputs that say nothing, or what cannot be


@pytest.mark.parametrize(
    "text",
    [
        "mlx5_0\t X \tPIX\nmlx5_1\tPIX\t X \n",
        "mlx5_0\t X \tPIX\n",
        "GPU0\t X \t" + "NV18 " * 300_000,
        "\tGPU-1\tGPU0\nGPU-1\t X \tNV18\nGPU0\tNV18\t X \n",
        "\tGPU-1\tGPU0\tGPU1\nGPU-1\t X \tNV18\tNV18\nGPU0\tNV18\t X \tNV18\nGPU1\tNV18\tNV18\t X \n",
        "GPU0\t X \tNV18\tNV18\tNV18\tNV18\tNV18\tNV18\tNV18\t0-47\t0\n",
    ],
    ids=["no GPU", "one NIC", "one endless line", "an index below 0", "three GPUs, one below 0", "one row of eight"],
)
def test_nothing_is_said_of_an_input_that_describes_no_machine(text):
    assert judge(text).verdict == "UNKNOWN"


@pytest.mark.parametrize("links", [37, 99])
def test_more_links_than_any_gpu_has_are_an_error_of_the_input(links):
    report = judge(matrix(EVERY, nv(links)))
    assert report.verdict == "UNKNOWN"
    assert f"NV{links}" in found(report, "input.unreadable").evidence
    assert judge(matrix(EVERY, nv(36))).verdict == "OK"


# Links of a model


@pytest.mark.parametrize(
    ("model", "links"),
    [
        ("NVIDIA H800 PCIe", 8), ("NVIDIA H800", 8), ("NVIDIA H100 PCIe", 12), ("NVIDIA H100 NVL", 12),
        ("NVIDIA H100 80GB HBM3", 18), ("NVIDIA A30", 4), ("NVIDIA RTX A6000", 4), ("NVIDIA RTX A4000", 0),
        ("NVIDIA GeForce RTX 3090 Ti", 4), ("NVIDIA GeForce RTX 3080", 0), ("NVIDIA GeForce RTX 3060", 0),
        ("NVIDIA GeForce RTX 2080 Ti", 2), ("NVIDIA GeForce RTX 2080", 1), ("NVIDIA GeForce RTX 2080 SUPER", 1),
        ("Quadro RTX 8000", 2), ("Quadro RTX 5000", 1), ("Quadro RTX 4000", 0), ("NVIDIA A100-SXM4-40GB", 12),
        ("NVIDIA A100 80GB PCIe", 12), ("NVIDIA A100-PCIE-40GB", 12), ("NVIDIA RTX 4000 Ada Generation", 0),
    ],
)  # fmt: skip
def test_a_pair_with_the_links_of_its_model_is_well_and_with_fewer_is_not(model, links):
    shown = f"NV{links}" if links else "PHB"
    report = judge(matrix(range(2), lambda i, j: shown), listing(model))
    assert report.machines[0].links == links
    assert "CRIT" not in {f.severity for f in report.all_findings()}
    assert not {"nvlink.pair-missing", "platform.mismatch", "nvlink.none"} & set(ids(report))
    if links > 1:
        less = judge(matrix(range(2), nv(links - 1)), listing(model))
        assert less.verdict == "CRIT"


def test_cards_without_nvlink_that_may_be_peers_raise_no_alarm():
    report = judge(matrix(range(2), lambda i, j: "PHB"), listing("NVIDIA RTX A4000"))
    assert (report.verdict, found(report, "nvlink.none-by-design").severity) == ("OK", "INFO")


# Ports of another network, and ports that nobody plugged in


NICS = [f"mlx5_{i}" for i in EVERY]


def ibstatus(*ports: tuple[str, int, str, str]) -> str:
    """Name, Gbit/s, state and link layer of each port."""
    return "\n".join(
        f"Infiniband device '{name}' port 1 status:\n\tdefault gid:\t fe80::1\n\tbase lid:\t 0x1\n\tsm lid:\t\t 0x1\n"
        f"\tstate:\t\t {state}\n\tphys state:\t 5: LinkUp\n\trate:\t\t {rate} Gb/sec (4X NDR)\n"
        f"\tlink_layer:\t {layer}\n"
        for name, rate, state, layer in ports
    )


def up(name: str, rate: int = 400, layer: str = "InfiniBand") -> tuple[str, int, str, str]:
    return name, rate, "4: ACTIVE", layer


def down(name: str) -> tuple[str, int, str, str]:
    return name, 400, "1: DOWN", "InfiniBand"


def beside_gpu5(gpu: int, nic: int) -> str:
    return near(gpu, nic if nic < 8 else 5)


@pytest.mark.parametrize("rate", [25, 200, 400])
def test_a_storage_port_beside_a_gpu_is_not_of_the_compute_network(rate):
    table = matrix(EVERY, nv(18), [*NICS, "mlx5_bond_0"], beside_gpu5)
    report = judge(table, ibstatus(*map(up, NICS), up("mlx5_bond_0", rate, "Ethernet")))
    (machine,) = report.machines
    assert report.verdict == "OK", ids(report)
    assert found(report, "nic.not-compute").subject.devices == ("mlx5_bond_0",)
    assert machine.compute_nics == tuple(NICS)
    assert "mlx5_bond_0" not in machine.nic_of_gpu.values()


def test_a_port_of_the_compute_network_that_runs_ethernet_is_an_alarm():
    ports = [up(n, layer="Ethernet" if n == "mlx5_3" else "InfiniBand") for n in NICS]
    report = judge(matrix(EVERY, nv(18), NICS), ibstatus(*ports))
    assert report.verdict == "WARN"
    assert found(report, "nic.layer-differs").subject.devices == ("mlx5_3",)


def test_a_network_of_ethernet_alone_is_well():
    report = judge(matrix(EVERY, nv(18), NICS), ibstatus(*(up(n, layer="Ethernet") for n in NICS)))
    assert (report.verdict, len(report.machines[0].compute_nics)) == ("OK", 8)


DUAL = [f"mlx5_{i}" for i in range(16)]


def beside_card(gpu: int, port: int) -> str:
    return near(gpu, port // 2)


def on_a_card(a: int, b: int) -> str:
    return "PIX" if a // 2 == b // 2 else "NODE"


def test_second_ports_that_nobody_plugged_in_raise_no_alarm():
    table = matrix(EVERY, nv(18), DUAL, beside_card, on_a_card)
    report = judge(table, ibstatus(*((down if i % 2 else up)(n) for i, n in enumerate(DUAL))))
    assert report.verdict == "OK"
    assert [f.severity for f in report.all_findings() if f.id == "nic.down"] == ["INFO"] * 8


def test_one_port_of_many_that_is_down_is_an_alarm():
    table = matrix(EVERY, nv(18), DUAL, beside_card, on_a_card)
    assert judge(table, ibstatus(*((down if i == 3 else up)(n) for i, n in enumerate(DUAL)))).verdict == "WARN"


def test_a_card_with_both_ports_down_is_a_fault():
    table = matrix(EVERY, nv(18), DUAL, beside_card, on_a_card)
    ports = [(down if i % 2 or i == 4 else up)(n) for i, n in enumerate(DUAL)]
    assert judge(table, ibstatus(*ports)).verdict == "CRIT"


def test_ports_of_one_card_are_known_by_their_bus_id():
    def machine(second: str) -> Machine:
        nics = (
            Nic("mlx5_0", bus_id="0000:18:00.0", state="ACTIVE"),
            Nic("mlx5_1", bus_id=second, state="DOWN"),
        )
        paths = tuple(Path("GPU0", n.label, "PIX") for n in nics)
        return Machine(gpus=(Gpu(0),), nics=nics, paths=paths)

    for second, severity in (("0000:18:00.1", "INFO"), ("0000:19:00.0", "WARN")):
        findings = check_machine(machine(second)).findings
        assert [f.severity for f in findings if f.id == "nic.down"] == [severity]


# One NUMA node


@pytest.mark.parametrize(("line", "severity"), [("ro quiet", "INFO"), ("ro numa=off quiet", "WARN"), (None, "WARN")])
def test_one_node_is_an_alarm_unless_the_command_line_shows_that_numa_is_on(line, severity):
    table = matrix(EVERY, nv(18), sockets=1)
    texts = [table] if line is None else [table, f"BOOT_IMAGE=/vmlinuz root=UUID=1 {line}\n"]
    report = judge(*texts)
    assert (found(report, "numa.hidden").severity, report.verdict == "OK") == (severity, severity == "INFO")
    assert "one socket" in found(report, "numa.hidden").expected


# One cause of many findings


def test_links_that_all_gpus_lack_are_those_of_a_switch():
    report = judge(smi("NVIDIA H100 80GB HBM3", down=(0, 1, 2, 3)))
    (root,) = report.all_findings()
    assert (root.id, root.severity, len(root.symptoms)) == ("nvswitch.links-lost", "CRIT", 8)
    assert "14 of 18" in root.evidence
    both = judge(matrix(EVERY, nv(14)), smi("NVIDIA H100 80GB HBM3", down=(0, 1, 2, 3)))
    assert [f.id for f in both.all_findings() if f.severity == "CRIT"] == ["nvswitch.links-lost"]


def test_links_that_one_gpu_lacks_are_its_own():
    text = smi("NVIDIA H100 80GB HBM3", range(7)) + smi("NVIDIA H100 80GB HBM3", [7], down=(2,))
    assert ids(judge(text)) == ["nvlink.links-missing"]


def test_a_link_that_two_gpus_of_a_mesh_lack_is_that_of_their_pair():
    report = judge(matrix(range(4), lambda i, j: "NV3" if {i, j} == {0, 1} else "NV4"))
    (root,) = [f for f in report.all_findings() if f.severity == "CRIT"]
    assert (root.id, root.subject.devices) == ("nvlink.pair-missing", ("GPU0", "GPU1"))
    assert [f.id for f in root.symptoms] == ["nvlink.links-missing"] * 2


def test_tables_of_several_hosts_in_one_text_are_judged_one_by_one():
    sick, well = matrix(EVERY, alive(0, 1, 3, 4, 5, 6, 7)), matrix(EVERY, nv(18))
    for tables in ([sick, well], [well, sick], [well, sick, well], [matrix(range(4), nv(18)), sick]):
        report = judge("\n".join(tables))
        assert [x.verdict for x in report.machines] == ["CRIT" if t is sick else "OK" for t in tables]
        (root,) = [f for f in report.all_findings() if f.severity == "CRIT"]
        assert (root.id, root.subject.devices) == ("nvlink.gpu-isolated", ("GPU2",))
        assert root.subject.host == f"file0 table {tables.index(sick) + 1}"
        assert "matrix.asymmetric" not in {f.id for f in report.all_findings()}
    report = judge(f"{well}\n{well}")
    assert (report.verdict, len(report.machines)) == ("OK", 1)


def test_rows_that_occur_twice_without_a_header_are_named():
    rows = matrix(EVERY, nv(18)).split("\n")[1:]
    report = judge("\n".join([*rows, rows[2].replace("NV18", "SYS")]))
    assert "GPU2" in found(report, "sources.disagree").evidence


def test_a_header_that_a_pager_repeats_begins_no_other_table_and_a_row_that_occurs_twice_is_named():
    well = matrix(EVERY, nv(18))
    head, *rows = well.split("\n")
    report = judge("\n".join([head, *rows[:4], head, *rows[4:]]))
    assert (report.verdict, len(report.machines)) == ("OK", 1)
    report = judge("\n".join([head, *rows[:8], rows[2].replace("NV18", "SYS")]))
    assert "GPU2" in found(report, "sources.disagree").evidence
    assert report.verdict != "OK"


# ---- GPUDirect RDMA, as NCCL found it

DISABLED = "\n".join(
    f"node7:25668:27396 [{i}] NCCL INFO NET/IB : GPU Direct RDMA Disabled for HCA {i} 'mlx5_{i}'" for i in range(2)
)


def test_nccl_saying_that_gpudirect_is_disabled_is_an_alarm_with_the_nics_and_that_it_is_enabled_is_none():
    """Lines as in NVIDIA/nccl issue 1537."""
    report = check_topology(read_texts([("topo", boxes.topo_m(boxes.h100())), ("nccl.log", DISABLED)]))
    (finding,) = [f for f in report.all_findings() if f.id == "nic.gpudirect-off"]
    assert (finding.severity, finding.subject.devices) == ("WARN", ("mlx5_0", "mlx5_1"))
    for text in (DISABLED.replace("Disabled", "Enabled"), DISABLED.replace("NET/IB", "NET/Socket")):
        report = check_topology(read_texts([("topo", boxes.topo_m(boxes.h100())), ("nccl.log", text)]))
        assert "nic.gpudirect-off" not in {f.id for f in report.all_findings()}


def test_a_dump_whose_nics_have_no_gpudirect_is_an_alarm_and_one_of_sockets_is_none():
    text = boxes.system_xml(boxes.h100())
    off = text.replace('port="1" guid="0x3" gdr="1"', 'port="1" guid="0x3" gdr="0"')
    assert off != text
    report = check_topology(read_texts([("dump.xml", off)]))
    found = {f.id: f.subject.devices for f in report.all_findings() if f.severity == "WARN"}
    assert found == {"nic.gpudirect-off": ("mlx5_3",)}
    sockets = text.replace("mlx5_", "eth").replace('gdr="1"/>', 'gdr="0"/>')
    report = check_topology(read_texts([("dump.xml", sockets)]))
    assert "nic.gpudirect-off" not in {f.id for f in report.all_findings()}


# ---- inputs that contradict each other


@pytest.mark.parametrize("sick_first", [True, False])
@pytest.mark.parametrize("how", ["one text", "two files", "other UUIDs"])
def test_a_listing_of_a_machine_without_fault_hides_no_link_that_another_shows_down(how, sick_first):
    box = boxes.h100()
    sick, well = boxes.nvlink_s(boxes.weaken_gpu(box, 3, 2)), boxes.nvlink_s(box)
    if how == "other UUIDs":
        well = well.replace("(UUID: GPU-0", "(UUID: GPU-1")
    order = (sick, well) if sick_first else (well, sick)
    report = judge(*order) if how == "two files" else judge("".join(order))
    root = found(report, "nvlink.links-missing")
    assert (root.severity, root.subject.devices) == ("CRIT", ("GPU3",))
    assert "16 of 18" in root.evidence
    if how == "other UUIDs":
        assert root.subject.host == f"file0 listing {1 if sick_first else 2}"
        assert len(report.machines) == 2
    else:
        assert "GPU3" in str(
            [f.evidence for f in (*report.all_findings(), *root.symptoms) if f.id == "sources.disagree"]
        )


def test_a_gpu_without_links_in_one_listing_has_none_whatever_another_says():
    none = "GPU 0: NVIDIA H100 80GB HBM3\nNVML: Unable to retrieve NVLink information as all links are inActive\n"
    sick, well = none + smi("NVIDIA H100 80GB HBM3", range(1, 8)), smi("NVIDIA H100 80GB HBM3", EVERY)
    for texts in ((sick, well), (well, sick), (sick + well,), (well + sick,)):
        report = judge(*texts)
        assert {f.subject.devices for f in report.all_findings() if f.severity == "CRIT"} == {("GPU0",)}
        assert "sources.disagree" in str(report)


def test_states_and_counters_of_one_listing_contradict_nothing():
    box = boxes.h100()
    whole = boxes.nvlink_s(box) + boxes.nvlink_r(box)
    assert ids(judge(whole)) == ids(judge(boxes.nvlink_s(box), boxes.nvlink_r(box))) == []


def test_of_several_peer_tables_none_hides_what_another_refuses():
    bad, good = boxes.p2p(boxes.h100(), {(1, 2): "NS", (2, 1): "NS"}), boxes.p2p(boxes.h100())
    for text in (bad + good, good + bad):
        refused = found(judge(text), "p2p.pair-refused")
        assert refused.subject.devices == ("GPU1", "GPU2")
        assert "1 of 28 pairs" in refused.evidence
