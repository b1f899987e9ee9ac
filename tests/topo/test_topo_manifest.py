"""Every recorded fixture reaches the conclusion that its manifest row names; every GENUINE anomaly has its subject."""

from __future__ import annotations

import re

import pytest
from recorded import FIXTURES, manifest, needs_fixtures, recorded

from wsync.topo.findings import SEVERITY_RANK, Finding
from wsync.topo.parse import read_files
from wsync.topo.report import Report, check_topology

pytestmark = needs_fixtures

OK, WARN, CRIT, UNKNOWN = ("OK",), ("WARN",), ("CRIT",), ("UNKNOWN",)

ALL = tuple(f"GPU{i}" for i in range(8))
LATER = tuple(f"GPU{i}" for i in range(4, 16))
VIRTUAL = ("PCI/0000:65:00.0", "PCI/0000:69:00.0")
FAR = ("GPU4", "GPU5", "GPU6", "GPU7")
UPLINKS = tuple(f"0000:{b}:00.0" for b in ("08", "26", "3d", "54", "82", "a1", "b9", "d1"))

EXPECTED: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, ...] | None]]] = {
    # Verdicts that the row allows, and findings with their subjects (None: whoever). INFO where the verdict is OK.
    "topo_m/aws_p3.16xlarge_v100.txt": (OK, {"nvlink.mesh-two-hops": None}),
    "topo_m/aws_p4d.24xlarge_a100_40g.txt": (OK, {}),
    "topo_m/aws_p4de.24xlarge_a100_80g.txt": (OK, {}),
    "topo_m/aws_p5.48xlarge_h100.txt": (OK, {}),
    "topo_m/aws_g5.48xlarge_a10g.txt": (WARN, {"nvlink.none": None, "numa.unspecific": None}),
    "topo_m/aws_g5g.2xlarge_t4g_single.txt": (OK, {}),
    "topo_m/dgx1_v100_4nic.txt": (OK, {}),
    "topo_m/dgx2_v100_16gpu_10nic_truncated.txt": (UNKNOWN, {"input.incomplete": LATER}),
    "topo_m/dgx_a100_nps4_12nic_truncated.txt": (OK, {"nic.compute-set": ("mlx5_4", "mlx5_5", "mlx5_10", "mlx5_11")}),
    "topo_m/a100_sxm_8x_10nic_litgpt.txt": (OK, {"nic.compute-set": ("mlx5_6", "mlx5_7")}),
    "topo_m/a100_custom_4x_nv4_4nic.txt": (OK, {}),
    "topo_m/a100_sxm_4x_nv4_2nic_two_gpus_far.txt": (WARN, {"nic.no-local": ("GPU0", "GPU3")}),
    "topo_m/a100_pcie_4x_bridge_pairs.txt": (OK, {"nvlink.islands": None}),
    "topo_m/a100_pcie_2x_no_bridge.txt": (WARN, {"nvlink.none": ("GPU0", "GPU1")}),
    "topo_m/a100_pcie_6x_cross_socket_bridge.txt": (
        WARN, {"nvlink.bridge-across-sockets": ("GPU0", "GPU3"), "nic.no-local": ("GPU3", "GPU4", "GPU5")},
    ),
    "topo_m/a100_sxm_8x_nics_on_socket0_only.txt": (WARN, {"nic.no-local": FAR}),
    "topo_m/a800_8x_nv8_9nic_truncated.txt": (OK, {"input.incomplete": ("GPU7",)}),
    "topo_m/h100_4x_nv6_4nic_8numa.txt": (OK, {}),
    "topo_m/h100_8x_6nic_cgroup_affinity.txt": (
        WARN,
        {"nic.no-local": ("GPU1", "GPU2", "GPU5", "GPU7"), "numa.affinity-empty": ("GPU0", "GPU1", "GPU2", "GPU3"),
         "numa.distance-mismatch": None},
    ),
    "topo_m/h100_8x_12nic_numa_off_hostA_0007.txt": (WARN, {"numa.hidden": ()}),
    "topo_m/h100_8x_12nic_numa_off_hostB_0008_glued.txt": (WARN, {"numa.hidden": ()}),
    "topo_m/h100_8x_12nic_headerless_rows.txt": (OK, {"input.incomplete": ()}),
    "topo_m/h100_8x_vm_single_nic_sys_shifted_header.txt": (WARN, {"vm.tree-hidden": ALL}),
    "topo_m/h100_supermicro_10nic_truncated.txt": (OK, {"nic.compute-set": ("NIC3", "NIC4")}),
    "topo_m/h100_8x_76nics_56shown_truncated.txt": (WARN, {"nic.hidden-by-tool": ()}),
    "topo_m/h20_8x_5nic_truncated.txt": (WARN, {"nic.no-local": ("GPU0", "GPU2")}),
    "topo_m/b200_8x_16nic_glued_cells.txt": (
        OK, {"nic.compute-set": tuple(f"mlx5_{i}" for i in (0, 1, 2, 3, 5, 6, 11, 12))},
    ),
    "topo_m/b200_8x_gpu2_nvlink_lost_truncated.txt": (CRIT, {"nvlink.gpu-isolated": ("GPU2",)}),
    "topo_m/b200_8x_8nic_two_per_pair_truncated.txt": (OK, {}),
    "topo_m/b200_8x_9nic_4numa_truncated.txt": (OK, {"input.incomplete": ("GPU5", "GPU6", "GPU7")}),
    "topo_m/gb200_4x_no_nic.txt": (OK, {}),
    "topo_m/gb200_4x_6nic_numa_lists_truncated.txt": (OK, {}),
    "topo_m/l40s_4x_2nic.txt": (WARN, {"nic.no-local": ("GPU0", "GPU1")}),
    "topo_m/bridge_2x_nv3_of_nv4.txt": (CRIT, {"nvlink.pair-missing": ("GPU0", "GPU1")}),
    "topo_m/rtx3090_4x_bridge_pairs.txt": (OK, {"nvlink.islands": None}),
    "topo_m/pcie_8x_pix_phb_sys.txt": (("OK", "WARN"), {}),
    "topo_m/pcie_8x_one_nic_far_socket.txt": (WARN, {"nic.no-local": ("GPU0", "GPU1", "GPU2", "GPU3")}),
    "topo_m/rtx4090_8x_node_sys.txt": (WARN, {"nvlink.none": None}),
    "topo_m/pcie_8x_2nic_node_sys.txt": (WARN, {"nic.no-local": FAR}),
    "topo_m/pcie_4x_phb_litgpt.txt": (("OK", "WARN"), {}),
    "topo_m/dual_gpu_nv2.txt": (OK, {}),
    "topo_m/dual_gpu_phb.txt": (("OK", "WARN"), {}),
    "p2p/a100_8x_ok.p2p_r.txt": (OK, {}),
    "p2p/l4_2x_cns.p2p_r.txt": (WARN, {"p2p.none": ("GPU0", "GPU1")}),
    "p2p/h100_8x_all_ns_excerpt.p2p_n.txt": (CRIT, {"p2p.none": ALL}),
    "nvlink/v100_ndv2_gpu7_lost_6_inactive.nvlink_s.txt": (CRIT, {"gpu.lost": ("GPU7",)}),
    "nvlink/a100_gpu6_all_inactive.nvlink_s.txt": (CRIT, {"nvlink.gpu-isolated": ("GPU6",)}),
    "nvlink/a100_gpu7_good.nvlink_s.txt": (OK, {}),
    "nvlink/a100_8x_good.nvlink_s.txt": (OK, {}),
    "nvlink/a100_pcie_2x_no_bridge.nvlink_s.txt": (WARN, {"nvlink.no-bridge": ("GPU0", "GPU1")}),
    "nvlink/v100_gpu3_two_inactive_excerpt.nvlink_s.txt": (CRIT, {"nvlink.links-missing": ("GPU3",)}),
    "nvlink/gb200_excerpt.nvlink_s.txt": (OK, {"input.incomplete": ("GPU1",)}),
    "nvlink/rtx2080ti_bridge_pair.nvlink_s.txt": (OK, {}),
    "nvlink/h100_gpu0_remote.nvlink_R.txt": (OK, {}),
    "nvlink/gb300_clean.nvlink_e.txt": (OK, {}),
    "nvlink/xid149_all_inactive.dmesg.txt": (
        CRIT, {"xid.nvlink": tuple(f"0000:{b}:00.0" for b in ("dc", "ed", "ba", "97"))},
    ),
    "nccl_xml/azure_ndv2-topo.xml": (OK, {}),
    "nccl_xml/azure_ndv4-topo.xml": (OK, {}),
    "nccl_xml/azure_ndv5-topo.xml": (OK, {}),
    "nccl_xml/azure_ncv4-topo.xml": (CRIT, {"lint.nvlink-self": ("GPU0", "GPU1", "GPU2", "GPU3")}),
    "nccl_xml/azure_nc48v4-topo.xml": (("OK", "WARN"), {"lint.speed-empty": ("GPU0", "GPU1")}),
    "nccl_xml/azure_ncv4-graph.xml": (OK, {"nccl.ring-off-nvlink": None}),
    "nccl_xml/aws_p4d-24xl-topo.xml": (OK, {}),
    "nccl_xml/aws_p4de-24xl-topo.xml": (OK, {}),
    "nccl_xml/aws_g5.48xl-topo.xml": (UNKNOWN, {"lint.class-missing": None, "input.nothing-to-judge": ()}),
    "nccl_xml/oci_h100_5GTs_upstream.xml": (WARN, {"pcie.uplink-slow": UPLINKS, "nic.rate-odd": None}),
    "nccl_xml/oci_h100_32GTs.xml": (OK, {}),
    "nccl_xml/oci_bm.gpu.b4.8_a100.xml": (WARN, {"lint.affinity": ("NUMA node 7",)}),
    "nccl_xml/oci_bm.gpu4.8_a100.xml": (OK, {}),
    "nccl_xml/ibm_gx3d_h100_vm_2.5GTs_x1_bridges.xml": (WARN, {"vm.virtual-bridge": None}),
    "nccl_xml/gb300_2tray_8gpu_healthy.xml": (OK, {}),
    "nccl_xml/gb300_2tray_rank5_nvlink_missing.xml": (CRIT, {"nvlink.gpu-isolated": ("GPU1",)}),
    "nccl_xml/gb300_1tray_gpu1_nvlink_count0.xml": (CRIT, {"nvlink.gpu-isolated": ("GPU1",)}),
    "nccl_xml/gb300_1tray_graph.xml": (OK, {}),
    "nccl_xml/h200_vm_no_numa_fragment_truncated.xml": (UNKNOWN, {"input.unreadable": ()}),
    "nccl_log/gcp_h100_a3_paths_excerpt.log": (WARN, {"nic.slow": ("NET/0",)}),
    "nccl_log/h200_vm_graph_pci0.2_excerpt.log": (WARN, {"vm.virtual-bridge": VIRTUAL}),
    "nccl_log/a100_roce_gen3_graph_excerpt.log": (WARN, {"pcie.below-platform": ("GPU0", "GPU1")}),
    "nccl_log/gb300_channel_signatures.txt": (CRIT, {"nccl.channels-collapsed": ()}),
    # Rates without a topology: they are recognised, name their GPUs, and give no verdict on links.
    "bench/a100_sxm4_40g_8x.all_reduce_perf.log": (UNKNOWN, {"input.nothing-to-judge": ()}),
    "bench/a100_sxm4_40g_8x.broadcast_perf.log": (UNKNOWN, {"input.nothing-to-judge": ()}),
    "bench/a100_sxm4_40g_8x.all_gather_perf.log": (UNKNOWN, {"input.nothing-to-judge": ()}),
    "bench/gh200_1x.nvbandwidth.log": (UNKNOWN, {"input.nothing-to-judge": ()}),
    "bench/a100_8x.nvbandwidth_d2d_write_ce.txt": (UNKNOWN, {"input.nothing-to-judge": ()}),
    "bench/gb200_72_144_1440_all_reduce_excerpt.md": (UNKNOWN, {"input.nothing-to-judge": ()}),
    "misc/azure_ndv4.ibstatus.txt": (OK, {"nic.not-compute": ("mlx5_an0",)}),
    "misc/meta_gcm_dgx_a100_golden.json": (OK, {}),
    "misc/h100_sxm.nvidia_smi_q.txt": (OK, {}),
    "misc/h100_numa_off.kernel_cmdline.txt": (WARN, {"numa.off": ("0007", "0008")}),
    "misc/a100_azure_vm.lspci_nn.txt": (OK, {}),
    "misc/pcie_downgraded_idle_4090.lspci.txt": (OK, {"pcie.speed-idle": None}),
    "misc/oci_nccl_ib_hca_by_shape.tsv": (WARN, {"lint.hca-twice": ("BM.GPU.A100-v2.8", "mlx5_1")}),
}  # fmt: skip

JOINED_ROW = "misc/aws_*.gpu_count.csv, misc/aws_*.numa_sysfs.txt"
"""One row of the manifest for ten files that are read together with their matrices, see below."""


def check(name: str, platform: str | None = None) -> Report:
    return check_topology(read_files([recorded(name)]), platform)


def find(report: Report, finding_id: str) -> Finding:
    found = [f for f in report.all_findings() if f.id == finding_id]
    assert len(found) == 1, (finding_id, [f.id for f in report.all_findings()])
    return found[0]


def test_the_table_has_every_row_of_the_manifest():
    assert set(EXPECTED) | {JOINED_ROW} == set(manifest())
    files = {f"{p.parent.name}/{p.name}" for p in FIXTURES.glob("*/*")}
    assert files - set(EXPECTED) == {
        f for f in files if re.fullmatch(r"misc/aws_.*\.(gpu_count\.csv|numa_sysfs\.txt)", f)
    }


@pytest.mark.parametrize("name", EXPECTED)
def test_a_fixture_reaches_its_conclusion(name):
    verdicts, findings = EXPECTED[name]
    report = check(name)
    assert report.verdict in verdicts, [(f.severity, f.id, f.evidence) for f in report.all_findings()]
    for finding_id, devices in findings.items():
        finding = find(report, finding_id)
        assert devices is None or finding.subject.devices == devices
        assert finding.evidence
        assert finding.link
        assert finding.remedy or finding.severity == "INFO"
    if verdicts == OK:
        assert all(SEVERITY_RANK[f.severity] == 0 for f in report.all_findings())
    else:
        worst = max(SEVERITY_RANK[f.severity] for f in report.all_findings())
        blamed = {f.id for f in report.all_findings() if SEVERITY_RANK[f.severity] == worst}
        # A fault has the finding that the row asks for at its verdict's severity, not only some other alarm.
        assert blamed & set(findings) or not findings


COUNTS_OF_OTHERS = {
    "nccl_xml/h200_vm_no_numa_fragment_truncated.xml": "nothing is taken from XML that is cut",
    "nccl_xml/aws_g5.48xl-topo.xml": "the row says ?",
    "nvlink/xid149_all_inactive.dmesg.txt": "four bus ids in a kernel log are no list of GPUs",
    "nccl_log/gb300_channel_signatures.txt": "channel lines name no GPU",
    "bench/gb200_72_144_1440_all_reduce_excerpt.md": "one line of 72",
    "bench/a100_8x.nvbandwidth_d2d_write_ce.txt": "its head is not in the excerpt",
    "misc/azure_ndv4.ibstatus.txt": "the excerpt has two of nine ports",
    "misc/meta_gcm_dgx_a100_golden.json": "8+4",
    "misc/pcie_downgraded_idle_4090.lspci.txt": "the excerpt does not name its device",
}


@pytest.mark.parametrize("name", [n for n in EXPECTED if n not in COUNTS_OF_OTHERS])
def test_gpus_and_nics_are_those_that_the_manifest_counts(name):
    row = manifest()[name]
    machines = read_files([recorded(name)]).machines
    if row["n_gpu"].isdigit():
        assert sum(len(m.gpus) for m in machines) == int(row["n_gpu"])
    if row["n_nic"].isdigit():
        # Ports of one device are one NIC.
        assert sum(len({n.bus_id or n.label for n in m.nics}) for m in machines) == int(row["n_nic"])


LOCAL = {
    "dgx1_v100_4nic.txt": {0: "mlx5_0", 1: "mlx5_0", 2: "mlx5_1", 4: "mlx5_2", 5: "mlx5_2", 6: "mlx5_3", 7: "mlx5_3"},
    "dgx_a100_nps4_12nic_truncated.txt": {
        0: "mlx5_0 mlx5_1",
        3: "mlx5_2 mlx5_3",
        5: "mlx5_6 mlx5_7",
        7: "mlx5_8 mlx5_9",
    },
    "a100_sxm_8x_10nic_litgpt.txt": {0: "mlx5_2 mlx5_3", 2: "mlx5_0 mlx5_1", 4: "mlx5_8 mlx5_9", 6: "mlx5_4 mlx5_5"},
    "a800_8x_nv8_9nic_truncated.txt": {0: "NIC2", 1: "NIC4", 2: "NIC6", 3: "NIC8", 4: "NIC1", 5: "NIC3", 6: "NIC5"},
    "h100_8x_6nic_cgroup_affinity.txt": {0: "mlx5_0 mlx5_1", 1: "", 3: "mlx5_2", 4: "mlx5_3 mlx5_4", 6: "mlx5_5"},
    "h100_8x_12nic_headerless_rows.txt": {0: "NIC0 NIC1", 2: "NIC2 NIC3", 4: "NIC4 NIC5", 7: "NIC6 NIC7"},
    "b200_8x_16nic_glued_cells.txt": {i: f"mlx5_{n}" for i, n in enumerate((4, 7, 8, 9, 10, 13, 14, 15))},
    "b200_8x_gpu2_nvlink_lost_truncated.txt": {i: f"NIC{i}" for i in range(6)},
    "h100_supermicro_10nic_truncated.txt": {i: f"NIC{n}" for i, n in enumerate((0, 1, 2, 5, 6, 7, 8, 9))},
    "h20_8x_5nic_truncated.txt": {0: "", 1: "NIC1", 2: "", 3: "NIC2"},
    "gb200_4x_6nic_numa_lists_truncated.txt": {0: "", 1: "", 2: ""},
    "h100_4x_nv6_4nic_8numa.txt": {0: "NIC0", 1: "NIC1", 2: "NIC2", 3: "NIC3"},
}


@pytest.mark.parametrize("name", LOCAL)
def test_local_nics_are_those_that_the_manifest_lists(name):
    from wsync.topo.view import View

    view = View(read_files([recorded(f"topo_m/{name}")]).machines[0])
    for gpu, nics in LOCAL[name].items():
        assert [n.label for n in view.nics if view.is_local(view.gpus[gpu], n)] == nics.split()


def test_two_hosts_of_one_kind_read_equal_although_one_text_is_damaged():
    a, b = (
        read_files([recorded(f"topo_m/h100_8x_12nic_numa_off_host{h}.txt")]).machines[0]
        for h in ("A_0007", "B_0008_glued")
    )
    assert (a.gpus, a.nics, a.paths) == (b.gpus, b.nics, b.paths)


def test_the_compute_nics_are_what_operators_set_by_hand():
    text = recorded("misc/h100_numa_off.kernel_cmdline.txt").read_text()
    by_hand = re.search(r'NCCL_IB_HCA="([^"]*)"', text)
    found = check("topo_m/h100_8x_12nic_numa_off_hostA_0007.txt").machines[0].compute_nics
    assert by_hand is not None
    assert ",".join(f"={n}" for n in found) == by_hand[1]

    rows = [line.split("\t") for line in recorded("misc/oci_nccl_ib_hca_by_shape.tsv").read_text().splitlines()]
    of_shape = next(r[1] for r in rows if r[0] == "BM.GPU.H100.8")
    assert "=" + ",".join(check("nccl_xml/oci_h100_5GTs_upstream.xml").machines[0].compute_nics) == of_shape


def test_the_gpu_without_nvlink_is_named_by_host_bus_id_and_rank():
    subject = find(check("nccl_xml/gb300_2tray_rank5_nvlink_missing.xml"), "nvlink.gpu-isolated").subject
    assert (subject.host, subject.devices, subject.bus_ids, subject.ranks) == (
        "0xHOSTHASH_A", ("GPU1",), ("0009:06:00.0",), (5,),
    )  # fmt: skip


def test_six_inactive_links_are_one_lost_gpu_and_not_six_bad_cables():
    report = check("nvlink/v100_ndv2_gpu7_lost_6_inactive.nvlink_s.txt")
    root = find(report, "gpu.lost")
    assert [f.id for f in report.all_findings()] == ["gpu.lost"]
    assert {d for f in root.symptoms for d in f.subject.devices} == {"GPU3", "GPU4", "GPU5", "GPU6"}


def test_export_boards_are_right_with_8_links_and_wrong_as_an_a100():
    assert check("topo_m/a800_8x_nv8_9nic_truncated.txt", "a800").verdict == "OK"
    assert check("topo_m/a800_8x_nv8_9nic_truncated.txt", "a100").verdict == "CRIT"


def test_boards_without_nvlink_are_right_when_their_platform_is_said():
    report = check("topo_m/aws_g5.48xlarge_a10g.txt", "a10g")
    assert report.verdict == "OK"
    assert find(check("topo_m/l40s_4x_2nic.txt", "l40s"), "nvlink.none-by-design").severity == "INFO"
    assert find(check("topo_m/rtx4090_8x_node_sys.txt", "rtx4090"), "p2p.none").severity == "WARN"


@pytest.mark.parametrize(
    ("name", "verdict", "platform"),
    [
        ("aws_g5.48xlarge_a10g", "OK", "a10"),
        ("aws_g5g.2xlarge_t4g_single", "OK", "t4"),
        ("aws_p3.16xlarge_v100", "OK", "v100-sxm"),
        ("aws_p4d.24xlarge_a100_40g", "OK", "a100-sxm"),
        ("aws_p4de.24xlarge_a100_80g", "OK", "a100-sxm"),
        ("aws_p5.48xlarge_h100", "OK", "h100-sxm"),
    ],
)
def test_lists_of_gpus_and_numa_nodes_are_joined_with_the_matrix(name, verdict, platform):
    files = [
        recorded(f"topo_m/{name}.txt"),
        recorded(f"misc/{name}.gpu_count.csv"),
        recorded(f"misc/{name}.numa_sysfs.txt"),
    ]
    topology = read_files(files)
    (machine,) = topology.machines
    assert all(g.name and g.bus_id and g.cpus for g in machine.gpus)
    assert machine.numa_nodes[0].distances[0] == 10
    report = check_topology(topology)
    assert (report.verdict, report.machines[0].platform) == (verdict, platform)


def test_pcie_cards_without_a_bridge_are_recognised_when_the_listing_joins_the_matrix():
    files = [recorded("topo_m/a100_pcie_2x_no_bridge.txt"), recorded("nvlink/a100_pcie_2x_no_bridge.nvlink_s.txt")]
    report = check_topology(read_files(files))
    assert report.verdict == "WARN"
    assert {f.id for f in report.all_findings()} == {"nvlink.no-bridge"}


def test_two_nics_that_two_gpus_share_are_dealt_one_to_each():
    report = check("topo_m/b200_8x_8nic_two_per_pair_truncated.txt")
    assert report.machines[0].nic_of_gpu == {f"GPU{i}": f"NIC{i}" for i in range(8)}


def test_bridge_partners_stand_next_to_each_other_in_the_ring():
    assert "0-2-3-1" in find(check("topo_m/rtx3090_4x_bridge_pairs.txt"), "nvlink.islands").remedy


def test_switches_that_a_virtual_machine_shows_are_counted():
    (machine,) = read_files([recorded("misc/a100_azure_vm.lspci_nn.txt")]).machines
    assert sum(d.kind == "nvswitch" for d in machine.pci) == 6
    assert sum(n.link_layer == "InfiniBand" for n in machine.nics) == 8
