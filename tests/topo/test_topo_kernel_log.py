"""Kernel logs: what a healthy one says, errors of GPUs and of switches, and what has recovered."""

from __future__ import annotations

import machines as own
import pytest

from wsync.topo.parse import parse_text, read_texts
from wsync.topo.report import check_topology

LINE = "[ 1.0] NVRM: Xid (PCI:0000:18:00): "
LOADED = "[    5.0] NVRM: loading NVIDIA UNIX x86_64 Kernel Module  550.54\n"


def findings(*texts: str) -> dict[str, object]:
    topology = read_texts([(f"{i}.txt", t) for i, t in enumerate(texts)])
    return {f.id: f for f in check_topology(topology).all_findings()}


def test_the_log_of_a_healthy_kernel_does_not_hide_the_verdict_on_a_good_matrix():
    report = check_topology(read_texts([("m", own.topo_m(own.h100())), ("dmesg", LOADED)]))
    assert report.verdict == "OK"


@pytest.mark.parametrize(
    "text",
    [
        "[    0.000000] Command line: root=UUID=1 ro numa=off quiet\n",
        "[    0.1] Kernel command line: BOOT_IMAGE=/vmlinuz root=UUID=1 ro numa=off\n",
        "root=UUID=1 ro numa=off quiet\n",
    ],
)
def test_the_command_line_is_found_in_a_log_and_alone(text):
    assert "numa=off" in parse_text(text, "a")[0].kernel[0].text


def test_a_fatal_error_of_a_switch_is_a_fault_and_another_is_told():
    fatal = "[ 1.0] nvidia-nvswitch0: SXid (PCI:0000:05:00.0): 20034, Fatal, Link 32 LTSSM Fault Up\n"
    other = "[ 2.0] nvidia-nvswitch3: SXid (PCI:0000:c1:00.0): 12028, Non-fatal, Link 32 egress\n"
    found = findings(fatal)["nvswitch.sxid"]
    assert (found.severity, found.subject.bus_ids) == ("CRIT", ("0000:05:00.0",))
    assert findings(other)["nvswitch.sxid"].severity == "INFO"


def test_the_last_recovery_action_counts():
    needed = LINE + "154, GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)\n"
    done = LINE + "154, GPU recovery action changed from 0x1 (GPU Reset Required) to 0x0 (None)\n"
    assert "GPU Reset Required" in findings(needed)["xid.lost"].remedy
    assert "xid.lost" not in findings(needed + done)
    assert "xid.lost" in findings(needed + done + needed)


@pytest.mark.parametrize("code", [48, 64, 95])
def test_uncorrected_errors_of_memory_warn(code):
    assert findings(f"{LINE}{code}, pid=1\n")["xid.memory"].severity == "WARN"


def test_a_gpu_that_fell_off_the_bus_is_not_sent_to_look_for_errors_of_nvlink():
    remedy = findings(LINE + "79, GPU has fallen off the bus\n")["xid.lost"].remedy
    assert "power-cycle" in remedy
    assert "Xid 74" not in remedy
