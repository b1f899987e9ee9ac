"""The real child processes: calls that hang, crash, or tell nonsense end at the deadline, and the rest is judged."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import fake_nvml as fake
import machines as m
import pytest
from live_rig import alarms, judge, options, sysfs_of

from wsync.cli.main import main
from wsync.cli.topo import inputs
from wsync.errors import ConfigError
from wsync.topo.live import LiveOptions, read_live, supervise

# A child that never returns must not be waited for: where a deadline does not hold, the test does not end either.
pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(120)]


@pytest.fixture
def live(tmp_path):
    def read(box, faults=None, timeout_s=60.0):
        root = tmp_path / "root"
        if not root.exists():
            sysfs_of(box, root)
        return options(fake.of_box(box), root, faults, timeout_s)

    return read


def test_a_machine_that_is_well_is_read_through_two_processes(live):
    machine = read_live(live(m.h100()), host="node0")
    assert judge(machine).verdict == "OK"
    assert (machine.host, len(machine.gpus), len(machine.nics)) == ("node0", 8, 10)
    assert machine.sources == ("NVML", "sysfs")


def test_a_call_that_hangs_is_a_finding_that_names_gpu_and_call_and_the_others_are_judged(live):
    box = m.isolate(m.h100(), 1)
    faults = fake.Faults(hang=("nvmlDeviceGetNvLinkState", 5, 7))
    machine = read_live(live(box, faults, timeout_s=12.0))
    report = judge(machine)
    assert report.verdict == "CRIT"
    (hang,) = [f for f in report.all_findings() if f.id == "probe.hang"]
    assert hang.subject.bus_ids == (m.gpu_bus(box, 5),)
    assert "nvmlDeviceGetNvLinkState of GPU5, link 7" in hang.evidence
    assert alarms(report)["nvlink.gpu-isolated"] == ("GPU1",)
    # GPU6 and 7 come after the one that hung, and were asked in a second round.
    assert all(len(machine.gpus[i].nvlinks or ()) == 18 for i in (0, 2, 3, 4, 6, 7))
    assert not report.machines[0].complete


def test_a_driver_that_does_not_even_start_is_a_finding_and_nics_are_still_read(live):
    faults = fake.Faults(hang=("nvmlInitWithFlags", -1, -1))
    machine = read_live(live(m.h100(), faults, timeout_s=4.0))
    report = judge(machine)
    (hang,) = [f for f in report.all_findings() if f.id == "probe.hang"]
    assert "nvmlInit" in hang.evidence
    assert report.verdict == "CRIT"
    assert len(machine.nics) == 10


def test_a_file_of_sys_that_does_not_open_is_a_finding_that_names_the_nic(live):
    made = live(m.h100(), timeout_s=6.0)
    rate = next(Path(made.root).glob("sys/devices/*/**/infiniband/mlx5_3/ports/1/rate"))
    rate.unlink()
    # Opening a pipe for reading waits for a writer.
    os.mkfifo(rate)
    report = judge(read_live(made))
    (hang,) = [f for f in report.all_findings() if f.id == "probe.hang"]
    assert hang.subject.devices == ("mlx5_3",)
    assert "/sys/class/infiniband/mlx5_3/ports/1/rate" in hang.evidence


def test_a_driver_that_is_slow_and_answers_is_late_and_not_broken(live):
    report = judge(read_live(live(m.h100(), fake.Faults(slow_ms=100), timeout_s=4.0)))
    assert report.verdict == "UNKNOWN"
    assert "probe.late" in {f.id for f in report.all_findings()}
    assert not report.machines[0].complete


def test_a_child_that_cannot_be_killed_is_left_behind(live, monkeypatch):
    killed = []

    def wait(self, timeout=None):
        raise subprocess.TimeoutExpired("probe", timeout)

    made = live(m.h100(), fake.Faults(hang=("nvmlDeviceGetName", 0, -1)), timeout_s=3.0)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess.Popen, "wait", wait)
        patch.setattr(supervise, "_how_it_died", lambda child, log: killed.append(child) or "")
        machine = read_live(made)
    (hang,) = [f for f in judge(machine).all_findings() if f.id == "probe.hang" and f.subject.devices == ("GPU0",)]
    assert "stuck in the kernel" in hang.evidence


def test_a_driver_without_gpus_is_not_all_well(live):
    board = fake.Board([], [], {})
    made = live(m.h100())
    report = judge(read_live(options(board, made.root)))
    assert report.verdict == "UNKNOWN"
    assert "gpu.none" in alarms(report)


def test_a_crash_is_named_and_the_other_gpus_are_judged(live):
    box = m.isolate(m.h100(), 7)
    report = judge(read_live(live(box, fake.Faults(crash=("nvmlDeviceGetNvLinkRemotePciInfo_v2", 2, -1)))))
    (crash,) = [f for f in report.all_findings() if f.id == "probe.crash"]
    assert crash.severity == "UNKNOWN"
    assert crash.subject.devices == ("GPU2",)
    assert "SIGSEGV" in crash.evidence
    assert alarms(report)["nvlink.gpu-isolated"] == ("GPU7",)


@pytest.mark.parametrize("garbage", ['{"type":"answer"}\n', "\x00\x01\n", "[" * 200_000, '{"type":"rm -rf"}\n' * 3])
def test_nonsense_from_a_child_is_unknown(live, garbage):
    report = judge(read_live(live(m.h100(), fake.Faults(garbage=garbage))))
    assert report.verdict == "UNKNOWN"
    assert {f.id for f in report.all_findings() if f.severity == "UNKNOWN"} & {"probe.garbled", "probe.crash"}


def test_without_the_binding_or_a_driver_the_error_says_what_to_do(live):
    with pytest.raises(ConfigError, match="nvidia-ml-py is not installed") as e:
        read_live(live(m.h100(), fake.Faults(no_binding=True)))
    assert "pip install" in e.value.hint
    with pytest.raises(ConfigError, match="NVML cannot be started") as e:
        read_live(live(m.h100(), fake.Faults(refuse={"nvmlInitWithFlags": 9})))
    assert "modprobe nvidia" in e.value.hint


def test_a_timeout_is_a_number_of_seconds_that_makes_sense():
    for timeout_s in (0.0, -1.0, float("nan"), 1e9):
        with pytest.raises(ConfigError, match="timeout"):
            read_live(LiveOptions(timeout_s))


# The command


@pytest.fixture
def command(monkeypatch, live):
    def run(box, *args, faults=None):
        made = live(box, faults)
        monkeypatch.setattr(inputs, "LIVE", made)
        return main(["topo", *args, "--root", made.root])

    return run


def test_check_without_files_reads_this_machine(command, capsys):
    assert command(m.h100(), "check", "--json", "--host", "n3") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["machines"][0]["host"], report["machines"][0]["sources"]) == ("n3", ["NVML", "sysfs"])
    assert command(m.isolate(m.h100(), 4), "check") == 2
    assert "nvlink.gpu-isolated" in capsys.readouterr().out


def test_live_and_files_are_merged(command, tmp_path, capsys):
    box = m.h100()
    dump = tmp_path / "dump.xml"
    dump.write_text(m.system_xml(m.isolate(box, 6)))
    assert command(box, "check", "--live", str(dump), "--json") == 2
    (machine,) = json.loads(capsys.readouterr().out)["machines"]
    (finding,) = [f for f in machine["findings"] if f["severity"] == "CRIT"]
    assert finding["subject"]["devices"] == ["GPU6"]
    assert "dump.xml" in machine["sources"]


def test_what_was_saved_live_gets_the_same_verdict(command, tmp_path, capsys):
    saved = str(tmp_path / "saved.json")
    box = m.isolate(m.b200(), 2)
    faults = fake.Faults(crash=("nvmlDeviceGetNvLinkRemotePciInfo_v2", 5, -1))
    assert command(box, "save", "--host", "n1", "--output", saved, faults=faults) == 0
    assert command(box, "check", "--host", "n1", "--json", faults=faults) == 2
    direct = json.loads(capsys.readouterr().out)
    assert main(["topo", "check", saved, "--json"]) == 2
    assert json.loads(capsys.readouterr().out) == direct


def test_advice_and_golden_files_are_of_this_machine_where_no_file_is_given(command, tmp_path, capsys):
    golden, saved = str(tmp_path / "golden.json"), str(tmp_path / "saved.json")
    assert command(m.h100(), "golden", "save", "--output", golden) == 0
    assert command(m.h100(), "save", "--host", "n1", "--output", saved) == 0
    assert main(["topo", "golden", "check", golden, saved]) == 0
    assert main(["topo", "golden", "diff", golden, saved]) == 0
    capsys.readouterr()
    assert command(m.h100(), "advise", "--host", "n1", "--json") == 0
    live = json.loads(capsys.readouterr().out)
    assert main(["topo", "advise", saved, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == live
    assert {a["name"] for a in live[0]["advice"]} == {"NCCL_IB_HCA"}


def test_no_golden_file_is_made_of_a_machine_that_was_not_read_to_the_end(command, tmp_path, capsys):
    golden = tmp_path / "golden.json"
    faults = fake.Faults(crash=("nvmlDeviceGetNvLinkRemotePciInfo_v2", 5, -1))
    assert command(m.h100(), "golden", "save", "--output", str(golden), faults=faults) == 3
    assert not golden.exists()
    assert "error: " in capsys.readouterr().err


def test_without_a_driver_the_exit_status_is_unknown_and_files_are_judged(command, tmp_path, capsys):
    faults = fake.Faults(no_binding=True)
    assert command(m.h100(), "check", faults=faults) == 3
    assert "hint: pip install" in capsys.readouterr().err
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text(m.topo_m(m.h100()))
    bad.write_text(m.topo_m(m.isolate(m.h100(), 1)))
    assert command(m.h100(), "check", "--live", str(good), faults=faults) == 3
    assert command(m.h100(), "check", "--live", str(bad), faults=faults) == 2
