"""Whatever NVML answers or refuses, the reading ends with a machine that can be judged."""

from __future__ import annotations

import fake_nvml as fake
import fake_sysfs
import machines as m
import pynvml
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from live_rig import judge, read_board, sysfs_of, told_by

from wsync.topo.advise import advise
from wsync.topo.golden import check_golden, make_golden
from wsync.topo.live import nvml, sysfs
from wsync.topo.live.assemble import assemble
from wsync.topo.live.records import Answer, Doing, Refusal, Request
from wsync.topo.live.supervise import Outcome
from wsync.topo.model import Topology
from wsync.topo.parse.saved import decode_topology, encode_topology
from wsync.topo.render.prometheus import prometheus_text

ERRORS = (
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_GPU_IS_LOST,
    pynvml.NVML_ERROR_RESET_REQUIRED,
    pynvml.NVML_ERROR_UNKNOWN,
    12345,
)
OF_GPUS = sorted(s for s in fake._SYMBOLS if s.startswith("nvmlDevice"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return sysfs_of(m.a100_mesh(), tmp_path_factory.mktemp("sysfs"))


@pytest.mark.parametrize("symbol", OF_GPUS)
def test_any_call_may_be_refused_for_any_reason(symbol, root):
    for error in ERRORS:
        machine = read_board(fake.of_box(m.a100_mesh()), root, fake.Faults(refuse={symbol: error}))
        report = judge(machine)
        if error == pynvml.NVML_ERROR_GPU_IS_LOST and symbol != "nvmlDeviceGetCount_v2":
            assert {f.id for f in report.all_findings() if f.severity == "CRIT"} == {"gpu.lost"}
        if error == pynvml.NVML_ERROR_RESET_REQUIRED and symbol != "nvmlDeviceGetCount_v2":
            assert "gpu.reset-required" in {f.id for f in report.all_findings()}
        if symbol == "nvmlDeviceGetCount_v2":
            assert report.verdict == "UNKNOWN"


VALUES = st.one_of(
    st.integers(-(2**40), 2**65),
    st.text(max_size=20),
    st.lists(st.one_of(st.none(), st.integers(-2, 2**64)), max_size=6),
    st.dictionaries(
        st.sampled_from(["busId", "state", "status", "clusterUuid", "cliqueId", "healthMask", "bwMode", "pciDeviceId"]),
        st.one_of(st.integers(-5, 2**33), st.text(max_size=20)),
    ),
)
CALLS = st.sampled_from(
    [
        *(s.removesuffix("_v2").removesuffix("_v3") for s in OF_GPUS),
        *("fields", "NvLink fields", "NvLink speed", "/sys/class/infiniband", "/sys/bus/pci/devices", "/proc/cmdline"),
    ]
)
AT = st.lists(st.integers(0, 3), max_size=2).map(tuple)
RECORDS = st.lists(
    st.one_of(
        st.builds(Answer, CALLS, VALUES, st.integers(-1, 4), AT),
        st.builds(Refusal, CALLS, st.sampled_from(["NOT_SUPPORTED", "GPU_IS_LOST", "FUNCTION_NOT_FOUND", "EIO"]),
                  st.integers(-1, 4), AT),
    ),
    max_size=40,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    RECORDS,
    st.sampled_from(["done", "hang", "late", "crash", "garbled"]),
    st.builds(Doing, CALLS, st.integers(-1, 9), AT),
)
@example([Answer("nvmlDeviceGetP2PStatus", 0, 0, (0, 3))], "done", Doing("nvmlDeviceGetCount", 0, ()))
def test_answers_of_any_kind_and_order_are_judged(told, end, doing):
    told = [Answer("nvmlDeviceGetCount", 3), *told]
    outcome = Outcome(end, told, None if end == "done" else doing, "detail")
    report = judge(assemble([outcome], Outcome("done", told), "host"))
    if end == "hang":
        assert report.verdict == "CRIT"


HOSTS = ("a100_mesh", "h100", "gb200", "rtx3090_pairs", "ethernet")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What both probes tell of hosts in order, by name."""
    found = {}
    for name in HOSTS:
        box = m.l40s() if name == "ethernet" else getattr(m, name)()
        devices = fake_sysfs.devices_of_box(box)
        for i, device in enumerate(d for d in devices if d.infiniband and name == "ethernet"):
            device.infiniband, device.pci_class = {}, "0x020000"
            device.interfaces = {f"eth{i}": fake_sysfs.Interface()}
        folder = fake_sysfs.write_sysfs(tmp_path_factory.mktemp(name), devices, fake_sysfs.nodes_of_box(box))
        fake_sysfs.write_driver(folder, ("nvidia",), "NVIDIA UNIX x86_64 Kernel Module  550.127.05")
        fake.install(fake.FakeLib(fake.of_box(box)))
        try:
            of_nvml = told_by(nvml.probe, Request("")).told
        finally:
            fake.install(None)
        found[name] = (of_nvml, told_by(sysfs.probe, Request("", root=str(folder))).told)
    return found


TEXTS = st.one_of(
    st.sampled_from(["", "-1", "0", "16", "255", "Unknown speed", "Unknown", "999999999", "1: DOWN", "0000:99:00.0",
                     "/sys/devices/pci0000:00/0000:00:01.0/0000:99:00.0", "0-3,,9-1", "0x10de", "0x030200", "\x00"]),
    st.text(max_size=12),
)  # fmt: skip
EDITS = st.lists(
    st.tuples(
        st.floats(0, 0.999), st.sampled_from(["drop", "refuse", "twice", "swap", "value"]), st.one_of(VALUES, TEXTS)
    ),
    min_size=1,
    max_size=12,
)


def edited(told, edits):
    """Records of which some are gone, refused, doubled, told of another device, or say something else."""
    told = list(told)
    for place, how, value in edits:
        i = int(place * len(told))
        if how == "drop":
            del told[i]
        elif how == "refuse":
            told[i] = Refusal(told[i].call, "EIO", told[i].gpu, told[i].at)
        elif how == "twice":
            told.append(told[i])
        elif how == "swap":
            other = told[len(told) - 1 - i]
            if isinstance(other, Answer) and isinstance(told[i], Answer):
                told[i] = Answer(told[i].call, other.value, told[i].gpu, told[i].at)
        elif isinstance(told[i], Answer):
            told[i] = Answer(told[i].call, value, told[i].gpu, told[i].at)
    return told


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(HOSTS), of_nvml=EDITS, of_sysfs=EDITS)
def test_a_reading_that_is_wrong_in_places_is_judged_written_and_read_again(name, of_nvml, of_sysfs, whole):
    machine = assemble(
        [Outcome("done", edited(whole[name][0], of_nvml))], Outcome("done", edited(whole[name][1], of_sysfs)), "host"
    )
    report = judge(machine)
    prometheus_text(report, 0.0).encode()
    advise(machine)
    assert decode_topology(encode_topology(Topology((machine,))).decode(), "a") == (machine,)
    if not machine.gaps:
        assert check_golden(make_golden([machine]), [machine]).verdict == "OK"
