"""What ``/sys`` tells: ports, PCIe links, distances, NUMA nodes, ACS, IOMMU, and what a container hides."""

from __future__ import annotations

import dataclasses
import struct

import fake_nvml as fake
import fake_sysfs
import machines as m
import pytest
from live_rig import alarms, judge, read_board

from wsync.topo.live.sysfs import find_access_control


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
