"""Whatever NVML answers or refuses, the reading ends with a machine that can be judged."""

from __future__ import annotations

import fake_nvml as fake
import machines as m
import pynvml
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from live_rig import judge, read_board, sysfs_of

from wsync.topo.live.assemble import assemble
from wsync.topo.live.records import Answer, Doing, Refusal
from wsync.topo.live.supervise import Outcome

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
