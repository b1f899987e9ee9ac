"""What ``/sys`` tells: ports, PCIe links, distances, NUMA nodes, ACS, IOMMU, and what a container hides."""

from __future__ import annotations

import dataclasses
import struct

import fake_nvml as fake
import fake_sysfs
import machines as m
import pytest
from live_rig import alarms, judge, read_board

from wsync.topo.advise import advise
from wsync.topo.lint_env import Assignment, lint_environment
from wsync.topo.live.sysfs import find_access_control
from wsync.topo.merge import merge_machines
from wsync.topo.parse import read_texts
from wsync.topo.to_cluster import to_group


def read(box, root, change=lambda devices: None, cmdline="quiet", nodes=None, board=None):
    devices = fake_sysfs.devices_of_box(box)
    change(devices)
    fake_sysfs.write_sysfs(root, devices, nodes or fake_sysfs.nodes_of_box(box), cmdline)
    return read_board(board or fake.of_box(box), root)


def nic(devices, name):
    return next(d for d in devices if name in d.infiniband)


def test_a_nic_below_its_generation_or_width_is_found_against_the_smaller_of_both_ends(tmp_path):
    def change(devices):
        slow, narrow, slot = (nic(devices, f"mlx5_{i}") for i in (1, 2, 3))
        slow.speed = "16.0 GT/s PCIe"
        narrow.width = 8
        # A slot of 8 lanes: the card runs all that it can get.
        slot.width = 8
        port = dataclasses.replace(slot, chain=slot.chain[:-1], infiniband={}, pci_class="0x060400", max_width=8)
        devices.append(port)

    found = judge(read(m.h100(), tmp_path, change))
    assert alarms(found) == {"pcie.speed-reduced": ("mlx5_1",), "pcie.width-reduced": ("mlx5_2",)}


def test_the_state_of_ports_is_read(tmp_path):
    def change(devices):
        nic(devices, "mlx5_4").infiniband["mlx5_4"] = [fake_sysfs.Port("1: DOWN", "2: Polling", "10 Gb/sec (1X SDR)")]
        nic(devices, "mlx5_6").infiniband["mlx5_6"] = [fake_sysfs.Port("4: ACTIVE", "3: Disabled")]
        nic(devices, "mlx5_7").infiniband["mlx5_7"] = [fake_sysfs.Port(rate="50 Gb/sec (1X HDR)")]

    report = judge(read(m.h100(), tmp_path, change))
    down = {f.subject.devices for f in report.all_findings() if f.id == "nic.down"}
    assert down == {("mlx5_4",), ("mlx5_6",)}
    assert "mlx5_7" in alarms(report)["nic.slow"]


def test_a_second_port_has_its_own_name_and_the_same_place(tmp_path):
    def change(devices):
        device = nic(devices, "mlx5_0")
        device.infiniband["mlx5_0"] = [fake_sysfs.Port(), fake_sysfs.Port()]

    machine = read(m.h100(), tmp_path, change)
    kinds = {p.b: p.kind for p in machine.paths if p.a == "GPU0"}
    assert kinds["mlx5_0"] == kinds["mlx5_0:2"] == "PIX"


def test_virtual_functions_and_software_devices_are_told_apart(tmp_path):
    box = m.h100()
    devices = fake_sysfs.devices_of_box(box)
    fake_sysfs.write_sysfs(tmp_path, devices, fake_sysfs.nodes_of_box(box))
    physical = nic(devices, "mlx5_0")
    folder = tmp_path.joinpath("sys/devices", physical.root, *physical.chain)
    (folder / "physfn").symlink_to("../" + physical.chain[-1])
    soft = tmp_path / "sys/devices/virtual/infiniband/rxe0/ports/1"
    soft.mkdir(parents=True)
    (tmp_path / "sys/class/infiniband/rxe0").symlink_to("../../devices/virtual/infiniband/rxe0")
    machine = read_board(fake.of_box(box), tmp_path)
    assert {n.label: n.virtual for n in machine.nics}["mlx5_0"] is True
    assert "rxe0" not in {n.label for n in machine.nics}


# ---- hosts without RDMA


def ethernet(box, *interfaces):
    """A box whose NICs are plain Ethernet, with these interfaces one after the other."""

    def change(devices):
        devices[:] = [d for d in devices if not d.infiniband] + [
            dataclasses.replace(
                nic(devices, f"mlx5_{i}"), pci_class="0x020000", vendor="0x8086", infiniband={}, interfaces=interface
            )
            for i, interface in enumerate(interfaces)
        ]

    return change


def test_of_a_host_without_rdma_the_ethernet_cards_are_the_nics_and_no_distance_is_a_fault(tmp_path):
    fast = [{f"eth{i}": fake_sysfs.Interface()} for i in range(2)]
    slow = {"eno1": fake_sysfs.Interface(speed="1000"), "eno2": fake_sysfs.Interface(operstate="down", speed="-1")}
    machine = read(m.h100(), tmp_path, ethernet(m.h100(), *fast, slow))
    nics = {n.label: (n.rate_gbit, n.state, n.link_layer, n.rdma) for n in machine.nics}
    assert nics == {
        "eno1": (1.0, "ACTIVE", "Ethernet", False), "eno2": (None, "DOWN", "Ethernet", False),
        "eth0": (100.0, "ACTIVE", "Ethernet", False), "eth1": (100.0, "ACTIVE", "Ethernet", False),
    }  # fmt: skip
    assert {p.b: p.kind for p in machine.paths if p.a == "GPU0"}["eth0"] == "PIX"
    report = judge(machine)
    assert alarms(report) == {}
    (found,) = [f for f in report.all_findings() if f.id.startswith("nic.")]
    assert found.id == "nic.no-rdma"
    assert "eno1 1 Gbit/s, eno2 is down, eth0 100 Gbit/s, eth1 100 Gbit/s" in found.evidence
    assert report.machines[0].compute_nics == ("eth0", "eth1")


def test_no_list_of_hcas_is_made_of_ethernet_cards_and_a_plan_says_that_they_are_no_rdma(tmp_path):
    change = ethernet(m.h100(), {"eth0": fake_sysfs.Interface()}, {"eno1": fake_sysfs.Interface(speed="1000")})
    machine = read(m.h100(), tmp_path, change)
    assert advise(machine).advice == ()
    assert lint_environment([Assignment("NCCL_IB_HCA", "=mlx5_0")], machine) == ()
    converted = to_group(machine, "trainer")
    assert converted.nics == ("eth0",)
    # Sockets go through host memory: every GPU gets there.
    (port,) = converted.group.nics
    assert {p.gpu: p.path for p in port.gpus} == {i: "PHB" if i < 4 else "SYS" for i in range(8)}
    assert any("no NIC has RDMA" in note for note in converted.notes)


def test_interfaces_of_usb_of_virtual_functions_and_of_other_kinds_are_no_nics(tmp_path):
    box = m.h100()

    def change(devices):
        ethernet(
            box,
            {"eth0": fake_sysfs.Interface(below="virtio0", speed="-1", operstate="unknown")},
            {"usb0": fake_sysfs.Interface(below="usb1/1-1/1-1:1.0")},
            {"ib0": fake_sysfs.Interface(type_=32)},
            {"vf0": fake_sysfs.Interface()},
        )(devices)
        next(d for d in devices if "usb0" in d.interfaces).pci_class = "0x0c0330"

    devices = fake_sysfs.devices_of_box(box)
    change(devices)
    root = fake_sysfs.write_sysfs(tmp_path, devices, fake_sysfs.nodes_of_box(box))
    (root / "sys/class/net/lo").mkdir()
    (root / "sys/class/net/bonding_masters").write_text("bond0\n")
    physical = next(d for d in devices if "vf0" in d.interfaces)
    (root.joinpath("sys/devices", physical.root, *physical.chain) / "physfn").symlink_to("../" + physical.chain[-1])
    machine = read_board(fake.of_box(box), root)
    assert [(n.label, n.rate_gbit, n.state) for n in machine.nics] == [("eth0", None, None)]
    assert alarms(judge(machine)) == {}


def test_beside_rdma_devices_the_front_end_is_not_read(tmp_path):
    def change(devices):
        place = ("0007:00:00.0", "0007:01:00.0")
        devices.append(fake_sysfs.Device(place, "pci0007:00", "0x020000", interfaces={"eno1": fake_sysfs.Interface()}))

    assert "eno1" not in {n.label for n in read(m.h100(), tmp_path, change).nics}


def test_a_card_without_rdma_below_its_width_is_an_alarm_only_where_a_job_would_use_it(tmp_path):
    def change(devices):
        ethernet(m.h100(), {"eth0": fake_sysfs.Interface()}, {"eno1": fake_sysfs.Interface(speed="1000")})(devices)
        for device in devices:
            if device.interfaces:
                device.width = 8

    report = judge(read(m.h100(), tmp_path, change))
    assert alarms(report) == {"pcie.width-reduced": ("eth0",)}
    assert ("INFO", ("eno1",)) in {(f.severity, f.subject.devices) for f in report.all_findings()}


def test_a_front_end_that_another_input_names_is_not_judged_beside_rdma_devices(tmp_path):
    """Where a container hides RDMA devices from /sys, and `topo -m` of the host is given, too."""
    live = read(m.h100(), tmp_path, ethernet(m.h100(), {"eth0": fake_sysfs.Interface(speed="1000")}))
    (table,) = read_texts([("topo", m.topo_m(m.h100()))]).machines
    (machine,) = merge_machines([live, table])
    assert "eth0" in {n.label for n in machine.nics}
    report = judge(machine)
    assert alarms(report) == {}
    assert "eth0" not in report.machines[0].compute_nics
    (advice,) = advise(machine).advice
    assert "eth0" not in advice.value + advice.reason


# ---- GPUDirect RDMA

PROPRIETARY = "NVIDIA UNIX x86_64 Kernel Module  550.127.05"
OPEN = "NVIDIA UNIX Open Kernel Module for x86_64  570.124.06"


@pytest.mark.parametrize(
    ("modules", "version", "kernel", "severity"),
    [
        (("nvidia",), PROPRIETARY, "6.8.0-60-generic", "WARN"),
        (("nvidia",), OPEN, "5.4.0-200-generic", "WARN"),
        (("nvidia", "nvidia_peermem"), PROPRIETARY, "5.4.0", None),
        (("nvidia", "nv_peer_mem"), PROPRIETARY, "5.4.0", None),
        (("nvidia",), OPEN, "6.8.0-60-generic", None),
        (("nvidia",), OPEN, "5.12.0", None),
        (("nvidia",), OPEN, "custom", None),
        ((), PROPRIETARY, "6.8.0", None),
    ],
)
def test_nics_that_cannot_read_gpu_memory_are_an_alarm(modules, version, kernel, severity, tmp_path):
    box = m.h100()
    fake_sysfs.write_sysfs(tmp_path, fake_sysfs.devices_of_box(box), fake_sysfs.nodes_of_box(box))
    fake_sysfs.write_driver(tmp_path, modules, version, kernel)
    report = judge(read_board(fake.of_box(box), tmp_path))
    found = [f.severity for f in report.all_findings() if f.id == "nic.gpudirect-off"]
    assert found == ([severity] if severity else [])
    assert list(alarms(report)) == (["nic.gpudirect-off"] if severity else [])


def test_without_near_nics_of_nvidia_gpudirect_is_no_alarm(tmp_path):
    def severities(box, root, change=lambda devices: None, board=None):
        devices = fake_sysfs.devices_of_box(box)
        change(devices)
        fake_sysfs.write_sysfs(root, devices, fake_sysfs.nodes_of_box(box))
        fake_sysfs.write_driver(root, ("nvidia",), PROPRIETARY)
        report = judge(read_board(board or fake.of_box(box), root))
        return [f.severity for f in report.all_findings() if f.id == "nic.gpudirect-off"]

    def of_amazon(devices):
        for device in devices:
            if device.infiniband:
                device.vendor = "0x1d0f"
                device.infiniband = {name.replace("mlx5", "efa"): p for name, p in device.infiniband.items()}

    consumer = fake.of_box(m.rtx3090_pairs())
    for gpu in consumer.gpus:
        gpu.name = "NVIDIA GeForce RTX 3090"
    with_nics = dataclasses.replace(m.rtx3090_pairs(), nics=m.l40s().nics)
    assert severities(m.h100(), tmp_path / "a") == ["WARN"]
    assert severities(m.h100(), tmp_path / "b", of_amazon) == []
    assert severities(m.l40s(), tmp_path / "c") == ["INFO"]
    assert severities(with_nics, tmp_path / "d", board=consumer) == []
    assert severities(m.rtx3090_pairs(), tmp_path / "e") == []


def with_acs(control: int) -> bytes:
    """A configuration space whose second extended capability is ACS."""
    config = bytearray(4096)
    struct.pack_into("<I", config, 0x100, 0x148 << 20 | 1 << 16 | 0x0001)
    struct.pack_into("<IHH", config, 0x148, 1 << 16 | 0x000D, 0x005F, control)
    return bytes(config)


def test_access_control_is_found_where_the_capability_is():
    assert find_access_control(with_acs(0x1D)) == 0x1D
    assert find_access_control(with_acs(0x1D)[:64]) is None
    loop = bytearray(with_acs(0))
    struct.pack_into("<I", loop, 0x148, 0x100 << 20 | 1 << 16 | 0x0002)
    assert find_access_control(bytes(loop)) is None
    assert find_access_control(b"") is None


@pytest.mark.parametrize(("control", "found"), [(0x1D, True), (0x01, False), (0x00, False)])
def test_redirection_in_a_switch_above_gpus_is_found_and_in_root_ports_not(control, found, tmp_path):
    box = m.a100()
    ports = set()

    def change(devices):
        for gpu in [d for d in devices if d.vendor == "0x10de"][:2]:
            for depth in (len(gpu.chain) - 1, 1):
                chain = gpu.chain[:depth]
                if chain not in ports:
                    ports.add(chain)
                    port = dataclasses.replace(gpu, chain=chain, pci_class="0x060400", vendor="0x1000", driver="")
                    port.config = with_acs(control)
                    devices.append(port)

    report = judge(read(box, tmp_path, change))
    assert list(alarms(report)) == (["pcie.acs"] if found else [])
    if found:
        (finding,) = [f for f in report.all_findings() if f.id == "pcie.acs"]
        assert set(finding.subject.devices) == {chain[-1] for chain in ports if len(chain) > 1}


def test_an_iommu_that_translates_is_told(tmp_path):
    def change(devices):
        for gpu in [d for d in devices if d.vendor == "0x10de"]:
            gpu.iommu = "DMA-FQ"

    report = judge(read(m.a100(), tmp_path, change))
    assert report.verdict == "OK"
    assert "pcie.iommu" in {f.id for f in report.all_findings()}


def test_numa_off_and_nodes_that_are_hidden_are_found(tmp_path):
    assert list(alarms(judge(read(m.a100(), tmp_path / "a", cmdline="numa=off")))) == ["numa.off"]

    def change(devices):
        for device in devices:
            device.numa = -1

    board = board_without_nodes(m.h100())
    found = alarms(judge(read(m.h100(), tmp_path / "b", change, board=board)))
    assert len(found["numa.unknown"]) == 8
    # A machine of one node has none to tell.
    found = alarms(
        judge(read(m.l40s(), tmp_path / "c", change, nodes={0: "0-31"}, board=board_without_nodes(m.l40s())))
    )
    assert "numa.unknown" not in found


def board_without_nodes(box):
    board = fake.of_box(box)
    for gpu in board.gpus:
        gpu.nodes = None
    return board


def test_a_container_that_hides_sys_is_named_and_gpus_are_judged(tmp_path):
    box = m.isolate(m.h100(), 3)
    (tmp_path / "sys").mkdir()
    found = alarms(judge(read_board(fake.of_box(box), tmp_path)))
    assert found == {"probe.sysfs-hidden": (), "nvlink.gpu-isolated": ("GPU3",)}


def test_gpus_that_the_driver_does_not_list_are_named(tmp_path):
    box = m.h100()
    board = fake.of_box(m.remove(box, 7))
    report = judge(read(box, tmp_path, board=board))
    (finding,) = [f for f in report.all_findings() if f.id == "gpu.not-listed"]
    assert (finding.severity, finding.subject.devices) == ("INFO", (m.gpu_bus(box, 7),))

    def change(devices):
        next(d for d in devices if d.chain[-1] == m.gpu_bus(box, 7)).driver = ""

    assert "gpu.not-listed" in alarms(judge(read(box, tmp_path / "b", change, board=board)))


def test_a_board_that_lacks_an_nvswitch_is_found(tmp_path):
    def change(devices):
        for i in range(3):
            at = f"0004:{i + 1:02x}:00.0"
            switch = fake_sysfs.Device((f"0004:00:0{i}.0", at), "pci0004:00", "0x068000", "0x10de", "0x22a3")
            devices.append(switch)

    assert list(alarms(judge(read(m.h100(), tmp_path, change)))) == ["nvswitch.missing"]
