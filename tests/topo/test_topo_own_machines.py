"""Our own machines: healthy ones raise no alarm in any format, seeded faults are found with the right subject."""

from __future__ import annotations

import dataclasses
import itertools

import machines as m
import pytest

from wsync.topo.findings import SEVERITY_RANK
from wsync.topo.parse import read_texts
from wsync.topo.platforms import PROFILES, find_profile, profile_named
from wsync.topo.report import Report, check_topology

WRITERS = {
    "topo_m": m.topo_m,
    "nvlink_s": m.nvlink_s,
    "nvlink_R": m.nvlink_r,
    "p2p_r": m.p2p,
    "query": m.query_all,
    "xml": m.system_xml,
}


def judge(*texts: str, platform: str | None = None, names: tuple[str, ...] = ()) -> Report:
    named = names or tuple(f"file{i}" for i in range(len(texts)))
    return check_topology(read_texts(zip(named, texts, strict=True)), platform)


def alarms(report: Report) -> dict[str, tuple[str, ...]]:
    """Findings above INFO: id to devices."""
    return {f.id: f.subject.devices for f in report.all_findings() if SEVERITY_RANK[f.severity]}


@pytest.mark.parametrize(("name", "kind"), list(itertools.product(m.HEALTHY, WRITERS)))
def test_a_healthy_machine_raises_no_alarm_in_any_format(name, kind):
    box = m.HEALTHY[name]()
    if kind == "nvlink_R" and not box.switches:
        pytest.skip("no switches to lead to")
    # From a matrix alone nobody can tell a GPU without NVLink from one that lost it; the platform says it.
    platform = "l40s" if (name, kind) == ("l40s", "topo_m") else None
    report = judge(WRITERS[kind](box), platform=platform)
    assert alarms(report) == {}
    assert report.verdict == "OK"


@pytest.mark.parametrize("name", m.HEALTHY)
def test_all_formats_of_a_healthy_machine_agree(name):
    box = m.HEALTHY[name]()
    texts = [write(box) for kind, write in WRITERS.items() if kind != "nvlink_R" or box.switches]
    for order in (texts, texts[::-1]):
        report = judge(*order)
        assert alarms(report) == {}
        assert len(report.machines) == 1
        assert report.machines[0].num_gpus == len(box.gpus)
        assert report.machines[0].num_nics == len(box.nics)


SHAPES = {
    "dgx1": ("mesh", 6), "dgx2": ("switch", 6), "a100": ("switch", 12), "a100_mesh": ("mesh", 12),
    "a800": ("switch", 8), "h100": ("switch", 18), "h100_mesh": ("mesh", 18), "b200": ("switch", 18),
    "gb200": ("switch", 18), "a100_bridges": ("bridge", None),
    "rtx3090_pairs": ("bridge", None), "l40s": ("none", None),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_the_wiring_is_recognised_without_the_models_name(name):
    (report,) = judge(m.topo_m(m.HEALTHY[name]())).machines
    assert (report.joined, report.links, report.platform) == (*SHAPES[name], "unknown")


PLATFORMS = {
    "dgx1": "v100-sxm", "dgx2": "v100-sxm", "a100": "a100-sxm", "a100_mesh": "a100-sxm", "a800": "a800-sxm",
    "h100": "h100-sxm", "h100_mesh": "h100-sxm", "b200": "b200-sxm", "gb200": "gb200", "l40s": "l40s",
    "a100_bridges": "a100-pcie", "rtx3090_pairs": "rtx3090",
}  # fmt: skip


@pytest.mark.parametrize("name", PLATFORMS)
def test_the_platform_is_found_from_the_name_and_from_the_pci_id(name):
    box = m.HEALTHY[name]()
    for text in (m.nvlink_s(box), m.query_all(box), m.system_xml(box)):
        (machine,) = read_texts([("file", text)]).machines
        assert find_profile(machine).name == PLATFORMS[name]


def test_every_profile_can_be_named_and_every_product_finds_one():
    for profile in PROFILES:
        assert profile_named(profile.name.upper()) is profile


SWITCHED = ("dgx2", "a100", "a800", "h100", "b200", "gb200")


@pytest.mark.parametrize(("name", "kind"), list(itertools.product(SWITCHED, ("topo_m", "nvlink_s", "xml"))))
def test_a_gpu_without_nvlink_is_found_and_named(name, kind):
    box = m.HEALTHY[name]()
    for gpu in (0, 2, len(box.gpus) - 1):
        report = judge(WRITERS[kind](m.isolate(box, gpu)))
        assert alarms(report) == {"nvlink.gpu-isolated": (f"GPU{gpu}",)}
        assert report.verdict == "CRIT"


def test_what_several_inputs_say_of_one_dead_gpu_is_one_finding():
    box = m.isolate(m.b200(), 2)
    bad = {(2, j): "NS" for j in range(8) if j != 2}
    report = judge(
        m.topo_m(box), m.nvlink_s(box), m.p2p(box, bad), m.system_xml(box), names=("m", "s", "x.p2p_n", "xml")
    )
    (root,) = [f for f in report.all_findings() if f.severity == "CRIT"]
    assert (root.id, root.subject.devices) == ("nvlink.gpu-isolated", ("GPU2",))
    assert root.subject.bus_ids == (m.gpu_bus(box, 2),)
    assert [f.id for f in root.symptoms] == ["p2p.pair-refused"]


def test_a_gpu_that_nccl_does_not_see_although_nvidia_smi_does_is_a_disagreement_of_the_sources():
    box = m.gb200()
    report = judge(m.topo_m(box), m.system_xml(m.isolate(box, 1)))
    (root,) = [f for f in report.all_findings() if f.severity == "CRIT"]
    assert (root.id, root.subject.devices) == ("nvlink.gpu-isolated", ("GPU1",))
    assert {f.id for f in root.symptoms} == {"sources.disagree"}


@pytest.mark.parametrize(
    ("name", "blamed"),
    [("dgx1", {("GPU0",), ("GPU3",)}), ("a100_mesh", {("GPU0", "GPU3")}), ("h100_mesh", {("GPU0", "GPU3")})],
)
def test_a_link_that_a_mesh_lacks_is_found_at_its_ends_and_where_all_pairs_are_alike_as_the_pair(name, blamed):
    box = m.HEALTHY[name]()
    report = judge(m.topo_m(m.weaken(box, 0, 3)))
    assert {f.subject.devices for f in report.all_findings() if f.severity == "CRIT"} == blamed


@pytest.mark.parametrize(("name", "kind"), list(itertools.product(SWITCHED, ("topo_m", "nvlink_s", "xml"))))
def test_a_gpu_with_a_link_less_is_found(name, kind):
    report = judge(WRITERS[kind](m.weaken_gpu(m.HEALTHY[name](), 1)))
    assert alarms(report) == {"nvlink.links-missing": ("GPU1",)}


@pytest.mark.parametrize("name", SWITCHED)
def test_a_pair_that_is_weaker_than_both_of_its_gpus_is_found(name):
    report = judge(m.topo_m(m.weaken(m.HEALTHY[name](), 0, 1, 2)))
    assert alarms(report) == {"nvlink.pair-missing": ("GPU0", "GPU1")}


@pytest.mark.parametrize("name", [n for n in m.HEALTHY if n != "l40s"])
def test_a_cell_that_differs_from_its_mirror_is_found(name):
    box = m.HEALTHY[name]()
    a, b = next((i, j) for i, row in enumerate(box.nv) for j, n in enumerate(row) if n > 1)
    found = alarms(judge(m.topo_m(m.skew(box, a, b))))
    assert "matrix.asymmetric" in found
    assert set(found["matrix.asymmetric"]) == {f"GPU{a}", f"GPU{b}"}


@pytest.mark.parametrize("lost", range(8))
def test_the_gpu_that_a_cube_mesh_has_lost_is_named_whichever_it_was(lost):
    box = m.remove(m.dgx1(), lost)
    report = judge(m.nvlink_s(box))
    assert alarms(report) == {"gpu.lost": (f"GPU{lost}",)}
    report = judge(m.topo_m(box))
    assert alarms(report) == {"gpu.lost": (f"GPU{lost}",)}


def test_a_board_with_nvswitch_that_lacks_a_gpu_is_found_by_its_count():
    report = judge(m.nvlink_s(m.remove(m.h100(), 3)))
    assert alarms(report) == {"gpu.count": ()}


@pytest.mark.parametrize("name", ["a100_bridges", "rtx3090_pairs"])
def test_a_loose_bridge_is_found(name):
    box = m.HEALTHY[name]()
    a, b = next((i, j) for i, row in enumerate(box.nv) for j, n in enumerate(row) if n)
    assert alarms(judge(m.topo_m(m.weaken(box, a, b)))) == {"nvlink.pair-missing": (f"GPU{a}", f"GPU{b}")}


def test_cards_without_a_bridge_are_a_choice_and_boards_without_links_a_fault():
    bare = dataclasses.replace(
        m.a100_bridges(), nv=m.uniform(4, 0), lost_links={i: frozenset(range(12)) for i in range(4)}
    )
    assert judge(m.topo_m(bare), m.nvlink_s(bare)).verdict == "WARN"
    board = dataclasses.replace(m.a100(), nv=m.uniform(8, 0), lost_links={i: frozenset(range(12)) for i in range(8)})
    assert judge(m.nvlink_s(board)).verdict == "CRIT"
    assert "nvlink.all-lost" in alarms(judge(m.topo_m(board), platform="a100"))


def test_links_that_run_slow_or_count_errors_are_found():
    text = m.nvlink_s(m.h100())
    slow = text.replace("GPU 5: ", "@", 1).split("@")
    report = judge(slow[0] + "GPU 5: " + slow[1].replace("26.562 GB/s", "12.5 GB/s", 3))
    assert alarms(report) == {"nvlink.link-slow": ("GPU5",)}
    errors = "GPU 0: NVIDIA A100-SXM4-80GB\n\t Link 0: Replay Errors: {}\n\t Link 0: CRC Errors: 0\n"
    assert judge(errors.format(0)).verdict == "OK"
    assert judge(errors.format(2)).verdict == "OK"
    assert alarms(judge(errors.format(9))) == {"nvlink.errors": ("GPU0",)}


def test_a_gpu_that_reaches_other_switches_than_its_peers_is_found():
    lines = m.nvlink_r(m.h100()).splitlines(keepends=True)
    start = next(i for i, line in enumerate(lines) if line.startswith("GPU 4"))
    odd = [line.replace(":A0:", ":A1:") if start < i < start + 4 else line for i, line in enumerate(lines)]
    assert alarms(judge("".join(odd))) == {"nvlink.remote-uneven": ("GPU4",)}


def test_pairs_that_may_not_address_each_other_are_found_although_all_links_are_up():
    box = m.h100()
    links, table = m.nvlink_s(box), m.p2p(box, default="NS")
    report = judge(links, table, names=("links", "host.p2p_n"))
    assert report.verdict == "CRIT"
    assert alarms(report) == {"p2p.none": tuple(box.gpu_names)}
    report = judge(links, m.p2p(box, {(1, 6): "TNS"}), names=("links", "host.p2p_r"))
    assert alarms(report) == {"p2p.pair-refused": ("GPU1", "GPU6")}
    assert alarms(judge(m.p2p(m.l40s(), default="CNS"))) == {"p2p.none": tuple(m.l40s().gpu_names)}


def test_nics_on_one_socket_leave_the_gpus_of_the_other_without():
    report = judge(m.topo_m(m.move_nics(m.a100(), 0)))
    assert alarms(report) == {"nic.no-local": ("GPU4", "GPU5", "GPU6", "GPU7")}
    (finding,) = [f for f in report.all_findings() if f.id == "nic.no-local"]
    assert "PXN" in finding.remedy


def test_grace_is_exempt_from_distances_and_a_virtual_machine_is_not_a_fault_of_one_gpu():
    assert judge(m.topo_m(m.gb200())).verdict == "OK"
    report = judge(m.topo_m(m.h100_vm()))
    assert list(alarms(report)) == ["vm.tree-hidden"]
    assert len(alarms(report)["vm.tree-hidden"]) == 8


def test_numa_that_the_kernel_hides_is_found_on_boards_and_not_on_small_machines():
    flat = dataclasses.replace(m.h100(), gpus=tuple(m.Place(0, i, i) for i in range(8)),
                               nics=tuple(m.Place(0, i, i) for i in range(8)), cpus=("0-191",))  # fmt: skip
    assert list(alarms(judge(m.topo_m(flat)))) == ["numa.hidden"]
    assert judge(m.topo_m(m.rtx3090_pairs())).verdict == "OK"


def test_pcie_that_lacks_lanes_is_a_fault_and_an_idle_gpu_is_none():
    box = m.a100()
    blocks = [m.query(box, i, width=8 if i == 3 else 16) for i in range(8)]
    assert alarms(judge("NVSMI LOG\n" + "".join(blocks))) == {"pcie.width-reduced": ("GPU3",)}
    assert judge(m.query_all(box, gen=1, state="P8")).verdict == "OK"
    assert set(alarms(judge(m.query_all(box, gen=3, state="P0")))) == {"pcie.speed-reduced"}


def test_slow_uplinks_are_found_and_only_they():
    report = judge(m.system_xml(m.h100(), uplink="5.0 GT/s PCIe"))
    assert set(alarms(report)) == {"pcie.uplink-slow"}
    assert len(alarms(report)["pcie.uplink-slow"]) == 9


def test_a_slow_nic_beside_a_gpu_is_found_and_one_elsewhere_is_not_counted():
    box = dataclasses.replace(m.h100(), nic_gbit=(400,) * 5 + (100,) + (400,) * 2 + (25, 25))
    assert alarms(judge(m.system_xml(box))) == {"nic.slow": ("mlx5_5",)}


PORT = """Infiniband device '{}' port 1 status:
\tstate:\t\t {}
\tphys state:\t {}
\trate:\t\t 400 Gb/sec (4X NDR)
\tlink_layer:\t InfiniBand
"""


def test_a_port_that_is_down_is_worse_when_it_is_a_gpus_own():
    up, down = ("4: ACTIVE", "5: LinkUp"), ("1: DOWN", "2: Polling")
    ports = "\n".join(PORT.format(f"mlx5_{i}", *(down if i in (2, 9) else up)) for i in range(10))
    found = {
        f.subject.devices: f.severity for f in judge(m.topo_m(m.h100()), ports).all_findings() if f.id == "nic.down"
    }
    assert found == {("mlx5_2",): "CRIT", ("mlx5_9",): "INFO"}


def test_mig_fabric_and_lost_gpus_are_found():
    box = m.h100()
    assert set(alarms(judge(m.query_all(box, mig="Enabled")))) == {"gpu.mig"}
    assert judge(m.query_all(box, fabric=("Completed", "Success"))).verdict == "OK"
    assert set(alarms(judge(m.query_all(box, fabric=("In Progress", "N/A"))))) == {"fabric.state"}
    text = (
        m.query_all(m.remove(box, 7))
        + f"Unable to determine the device handle for GPU0000{m.gpu_bus(box, 7)}: Unknown Error\n"
    )
    report = judge(text)
    assert set(alarms(report)) == {"gpu.lost"}
    assert report.all_findings()[0].subject.bus_ids == (m.gpu_bus(box, 7),)


def test_two_trays_of_one_domain_are_two_machines_and_the_bad_one_is_named():
    good, bad = m.system_xml(m.gb200(), host="0xaa"), m.system_xml(m.isolate(m.gb200(), 3), host="0xbb", first_rank=4)
    both = good.replace("</system>\n", "") + bad.replace('<system version="1">\n', "")
    report = judge(both)
    assert [machine.host for machine in report.machines] == ["0xaa", "0xbb"]
    (finding,) = [f for f in report.all_findings() if f.severity == "CRIT"]
    assert (finding.subject.host, finding.subject.devices, finding.subject.ranks) == ("0xbb", ("GPU3",), (7,))


def test_a_host_that_is_worse_than_the_majority_is_the_outlier():
    from wsync.topo.model import Topology

    machines = []
    for i in range(5):
        box = m.isolate(m.h100(), 4) if i == 3 else m.h100()
        machines += read_texts([("topo", m.topo_m(box))], host=f"node{i}").machines
    report = check_topology(Topology(tuple(machines)))
    (finding,) = report.findings
    assert (finding.id, finding.subject.host) == ("host.outlier", "node3")
    assert [f.id for f in finding.symptoms] == ["nvlink.gpu-isolated"]


def test_xids_of_nvlink_are_faults_and_others_are_told():
    line = "kernel: NVRM: Xid (PCI:0000:1a:00): {}, pid=1, name=python3\n"
    assert alarms(judge(line.format(74))) == {"xid.nvlink": ("0000:1a:00.0",)}
    assert alarms(judge(line.format(79))) == {"xid.lost": ("0000:1a:00.0",)}
    assert judge(line.format(13)).verdict == "OK"


CHANNELS = "host:1:2 [0] NCCL INFO {} coll channels, {} collnet channels, {} nvls channels, 8 p2p channels\n"


def test_channels_that_collapsed_give_a_lost_gpu_away():
    assert judge(CHANNELS.format(24, 24, 16)).verdict == "OK"
    assert set(alarms(judge(CHANNELS.format(2, 2, 0)))) == {"nccl.channels-collapsed"}
    # Boards without NVSwitch have 8 to 12 channels and no NVLS, and are well.
    assert judge(CHANNELS.format(12, 12, 0)).verdict == "OK"


LINT = [
    ('link_speed="16.0 GT/s"', "lint.speed-unknown"),
    ('link_speed="fast"', "lint.speed-unknown"),
]


@pytest.mark.parametrize(("speed", "finding"), LINT)
def test_speeds_that_nccl_does_not_know_are_found(speed, finding):
    text = m.system_xml(m.a100()).replace('link_speed="16.0 GT/s PCIe"', speed, 1)
    assert finding in alarms(judge(text))


def test_a_topology_file_with_slips_of_the_pen_is_found_out():
    text = m.system_xml(m.a100_bridges())
    own = text.replace(f'target="{m.gpu_bus(m.a100_bridges(), 1)}"', f'target="{m.gpu_bus(m.a100_bridges(), 0)}"', 1)
    assert alarms(judge(own))["lint.nvlink-self"] == ("GPU0",)
    assert "lint.affinity" in alarms(judge(text.replace("00000000,ffffffff", "ffff0000,fffffff", 1)))
    assert "lint.affinity" in alarms(judge(text.replace("ffffffff,00000000", "ffffffff,00000001", 1)))
    twice = text.replace(m.gpu_bus(m.a100_bridges(), 1), m.gpu_bus(m.a100_bridges(), 0))
    assert "lint.bus-id-twice" in alarms(judge(twice))
    assert "numa.unknown" in alarms(judge(text.replace('numaid="1"', 'numaid="-1"')))


def test_hca_lists_name_each_device_once_and_devices_that_exist():
    assert judge('export NCCL_IB_HCA="=mlx5_0,mlx5_1"\n').verdict == "OK"
    assert alarms(judge("NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_0\n")) == {"lint.hca-twice": ("mlx5_0",)}
    report = judge(m.topo_m(m.h100()), "NCCL_IB_HCA=mlx5_0,mlx5_77\n")
    assert alarms(report) == {"lint.hca-absent": ("mlx5_77",)}
    # A name without "=" is a prefix for NCCL.
    assert judge(m.topo_m(m.h100()), "NCCL_IB_HCA=mlx5\n").verdict == "OK"


def part(box, keep):
    """A virtual machine with some GPUs of a board: links to the others are inactive."""
    lost = {i: frozenset(range(sum(box.nv[g][j] for j in range(8) if j not in keep))) for i, g in enumerate(keep)}
    nv = tuple(tuple(box.nv[a][b] for b in keep) for a in keep)
    return dataclasses.replace(box, gpus=tuple(box.gpus[g] for g in keep), nv=nv, lost_links=lost, nics=())


@pytest.mark.parametrize("keep", [(0,), (0, 1), (0, 1, 2, 3), (4, 5, 6, 7)])
def test_a_tenants_part_of_a_cube_mesh_is_no_fault(keep):
    box = part(m.dgx1(), keep)
    for text in (m.topo_m(box), m.nvlink_s(box), m.topo_m(box) + "\n"):
        assert judge(text).verdict == "OK"
    assert judge(m.topo_m(box), m.nvlink_s(box)).verdict == "OK"


def test_a_machine_with_one_gpu_has_nothing_to_link_to():
    one = dataclasses.replace(m.h100(), gpus=m.h100().gpus[:1], nv=((0,),), lost_links={0: frozenset(range(18))})
    assert judge(m.nvlink_s(one)).verdict == "OK"
    # The listing of GPU 6 alone is of a board that has others.
    assert judge(m.nvlink_s(one).replace("GPU 0", "GPU 6")).verdict == "CRIT"


def test_boards_of_four_that_bridges_join_to_a_mesh_are_recognised():
    for model in ("NVIDIA H200 NVL", "NVIDIA GB200"):
        box = dataclasses.replace(m.h100_mesh(), model=model, rate_gbps=53.125)
        assert judge(m.topo_m(box), m.nvlink_s(box)).verdict == "OK"
        assert judge(m.topo_m(m.isolate(box, 2)), m.nvlink_s(m.isolate(box, 2))).verdict == "CRIT"


def test_a_port_beside_another_that_is_up_is_no_crisis():
    ports = PORT.format("mlx5_2", "1: DOWN", "2: Polling") + PORT.format("mlx5_3", "4: ACTIVE", "5: LinkUp")
    report = judge(m.topo_m(m.a100()), ports)
    assert [(f.id, f.severity) for f in report.all_findings() if f.id == "nic.down"] == [("nic.down", "WARN")]
