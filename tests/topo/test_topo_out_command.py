"""``wsync topo check``: every option from the command line, exit styles, wrong arguments."""

from __future__ import annotations

import json
import os
import platform
import stat
import subprocess
import sys
from xml.etree import ElementTree

import machines as m
import msgspec
import pytest

from wsync.cli.main import main
from wsync.errors import ConfigError
from wsync.topo.report import Report

COMMAND = [sys.executable, "-m", "wsync.cli.main"]
INPUTS = {
    "OK": m.topo_m(m.h100()),
    "WARN": m.topo_m(m.h100_vm()),
    "CRIT": m.topo_m(m.isolate(m.h100(), 2)),
    "UNKNOWN": m.system_xml(m.h100())[:500],
}
STATUSES = {
    ("nagios", None): {"OK": 0, "WARN": 1, "CRIT": 2, "UNKNOWN": 3},
    ("nagios", "warn"): {"OK": 0, "WARN": 1, "CRIT": 2, "UNKNOWN": 3},
    ("nagios", "crit"): {"OK": 0, "WARN": 0, "CRIT": 2, "UNKNOWN": 3},
    ("nagios", "info"): {"OK": 1, "WARN": 1, "CRIT": 2, "UNKNOWN": 3},
    ("npd", None): {"OK": 0, "WARN": 1, "CRIT": 1, "UNKNOWN": 2},
    ("npd", "crit"): {"OK": 0, "WARN": 0, "CRIT": 1, "UNKNOWN": 2},
    ("npd", "info"): {"OK": 1, "WARN": 1, "CRIT": 1, "UNKNOWN": 2},
    ("prolog", None): {"OK": 0, "WARN": 0, "CRIT": 1, "UNKNOWN": 0},
    ("prolog", "warn"): {"OK": 0, "WARN": 1, "CRIT": 1, "UNKNOWN": 0},
    ("strict", None): {"OK": 0, "WARN": 1, "CRIT": 1, "UNKNOWN": 1},
    ("strict", "crit"): {"OK": 0, "WARN": 0, "CRIT": 1, "UNKNOWN": 1},
    ("strict", "info"): {"OK": 1, "WARN": 1, "CRIT": 1, "UNKNOWN": 1},
}
"""The healthy machine has a finding of INFO (two NICs that no job should use)."""


@pytest.fixture
def inputs(tmp_path):
    folder = tmp_path / "inputs"
    folder.mkdir()
    for verdict, text in INPUTS.items():
        (folder / verdict).write_text(text)
    return folder


def check(*argv):
    return main(["topo", "check", *map(str, argv)])


# ---- exit statuses


@pytest.mark.parametrize(("style", "fail_on"), STATUSES)
def test_each_style_and_threshold_has_its_statuses(inputs, style, fail_on):
    options = ["--exit-style", style, *(["--fail-on", fail_on] if fail_on else [])]
    found = {verdict: check(inputs / verdict, *options) for verdict in INPUTS}
    assert found == STATUSES[style, fail_on]


def test_an_unreadable_input_beside_a_small_fault_is_unknown_where_the_fault_does_not_count(inputs):
    files = [inputs / "WARN", "/nowhere/at/all"]
    assert check(*files) == 1
    assert check(*files, "--fail-on", "crit") == 3
    assert check(inputs / "CRIT", "/nowhere/at/all", "--fail-on", "crit") == 2


def test_no_machine_at_all_is_unknown(tmp_path, capsys):
    nothing = tmp_path / "nothing.json"
    nothing.write_text('{"kind": "wsync-topology", "format_version": 1, "machines": []}')
    assert check(nothing) == 3
    assert check(nothing, "--json") == 3
    assert '"verdict": "UNKNOWN"' in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        ["check", "FILE", "--fail-on", "sometimes"],
        ["check", "FILE", "--exit-style", "loud"],
        ["check", "FILE", "--wings"],
        ["check", "FILE", "--prometheus", "metrics.txt"],
        ["check", "FILE", "--svg", "picture.png"],
        ["check", "FILE", "--png", "-"],
        ["chek"],
        [],
    ],
)
@pytest.mark.parametrize(("style", "status"), [("nagios", 3), ("npd", 2), ("prolog", 0), ("strict", 1)])
def test_wrong_arguments_are_unknown_in_every_style(argv, style, status, capsys):
    full = ["topo", *argv]
    if argv[:1] == ["check"] and "--exit-style" not in argv:
        full += [f"--exit-style={style}"]
    else:
        status = 3
    with pytest.raises(SystemExit) as e:
        main(full)
    assert e.value.code == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error:" in captured.err


def test_wrong_arguments_of_other_commands_stay_status_two_and_help_stays_zero(capsys):
    for argv, status in ((["doctor", "topo"], 2), (["bench", "--exit-style", "npd"], 2), (["topo", "--help"], 0)):
        with pytest.raises(SystemExit) as e:
            main(argv)
        assert e.value.code == status
    assert "prolog" in capsys.readouterr().out


def test_a_style_in_two_words_counts_for_wrong_arguments(capsys):
    with pytest.raises(SystemExit) as e:
        main(["--debug", "topo", "check", "--exit-style", "npd", "--wings"])
    assert e.value.code == 2


def test_an_error_of_our_own_is_unknown_and_not_a_fault_of_the_machine(inputs, monkeypatch, capsys):
    def fail(*_):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("wsync.cli.topo.check.check_topology", fail)
    assert check(inputs / "OK", "--nagios") == 3
    captured = capsys.readouterr()
    assert captured.out.startswith("TOPO UNKNOWN - wsync failed: ZeroDivisionError")
    assert "Traceback" in captured.err
    assert check(inputs / "OK", "--exit-style", "prolog") == 0
    with pytest.raises(ZeroDivisionError):
        main(["--debug", "topo", "check", str(inputs / "OK")])


# ---- what is printed


def test_the_nagios_line_is_all_that_goes_to_stdout(inputs, capsys):
    assert check(inputs / "CRIT", "--nagios", "--host", "node7") == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("TOPO CRITICAL - node7 GPU2")
    assert " | crit=1;;0;0 warn=0;0;;0 unknown=0" in line
    assert check("/nowhere", "--nagios", "--platform", "z9000") == 3
    assert capsys.readouterr().out == "TOPO UNKNOWN - no platform is named 'z9000'\n"
    assert check(inputs / "WARN", "--nagios", "--fail-on", "crit") == 0
    assert capsys.readouterr().out.startswith("TOPO OK - ")


def test_quiet_prints_nothing_of_a_healthy_machine_and_the_faults_of_others(inputs, capsys):
    assert check(inputs / "OK", "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert check(inputs / "CRIT", "--quiet") == 2
    out = capsys.readouterr().out
    assert "nvlink.gpu-isolated" in out
    assert "nic.compute-set" not in out


def test_quiet_lists_only_machines_with_faults(tmp_path, capsys):
    for i in range(4):
        (tmp_path / f"n{i}").mkdir()
        (tmp_path / f"n{i}" / "t").write_text(INPUTS["CRIT" if i == 2 else "OK"])
    assert check(*(tmp_path / f"n{i}" for i in range(4)), "--quiet") == 2
    out = capsys.readouterr().out
    assert out.startswith("CRIT 4 machines, 1 not OK: 1 CRIT, 4 INFO\n")
    assert "n2: 8 GPUs" in out
    assert "n0: 8 GPUs" not in out


def test_causes_come_first_and_what_they_explain_stands_below_them(tmp_path, capsys):
    box = m.isolate(m.h100(), 6)
    (tmp_path / "topo").write_text(m.topo_m(box))
    (tmp_path / "p2p_n.txt").write_text(m.p2p(box, {(i, 6): "NS" for i in range(8) if i != 6}))
    assert check(tmp_path / "topo", tmp_path / "p2p_n.txt") == 2
    out = capsys.readouterr().out
    assert "1 CRIT, 1 INFO" in out.splitlines()[0]
    cause, symptom = out.index("nvlink.gpu-isolated"), out.index("└ p2p.pair-refused")
    assert cause < symptom < out.index("nic.compute-set")


def test_the_matrix_marks_faults_without_colour(inputs, capsys):
    assert check(inputs / "CRIT", "--matrix") == 2
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if line.strip().startswith("GPU0 "))
    assert "GPU2!!" in head
    row = next(line.split() for line in lines if line.startswith("GPU1 "))
    assert row[:5] == ["GPU1", "NV18", "X", "NODE!!", "NV18"]
    assert any("!!: CRIT" in line for line in lines)


# ---- files


def test_json_is_the_whole_report(inputs, tmp_path, capsys):
    target = tmp_path / "report.json"
    assert check(inputs / "CRIT", "--json", target) == 2
    assert "nvlink.gpu-isolated" in capsys.readouterr().out
    assert check(inputs / "CRIT", "--json") == 2
    assert json.loads(capsys.readouterr().out) == json.loads(target.read_text())


def test_metrics_replace_the_file_as_a_whole_and_everyone_may_read_it(inputs, tmp_path, capsys):
    folder = tmp_path / "textfile"
    folder.mkdir()
    target = folder / "wsync.prom"
    target.write_text("old")
    before = target.stat().st_ino
    assert check(inputs / "CRIT", "--prometheus", target, "--host", "n1") == 2
    assert 'wsync_topo_verdict{host="n1"} 2\n' in target.read_text()
    assert [p.name for p in folder.iterdir()] == ["wsync.prom"]
    assert target.stat().st_ino != before
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    capsys.readouterr()
    assert check(inputs / "OK", "--prometheus", "-") == 0
    assert capsys.readouterr().out.startswith("# HELP wsync_topo_verdict ")


def test_the_collector_never_meets_an_unfinished_file(inputs, tmp_path, monkeypatch):
    seen = []
    replace = os.replace

    def look(source, target):
        seen.extend(p.name for p in tmp_path.glob("*.prom"))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    assert check(inputs / "CRIT", "--prometheus", tmp_path / "wsync.prom") == 2
    assert seen == []
    assert (tmp_path / "wsync.prom").exists()


def test_a_file_that_cannot_be_written_hides_neither_the_fault_nor_the_other_files(inputs, tmp_path, capsys):
    bad = tmp_path / "missing" / "m.prom"
    good = tmp_path / "j.xml"
    assert check(inputs / "CRIT", "--prometheus", bad, "--junit", good) == 2
    captured = capsys.readouterr()
    assert "m.prom cannot be written" in captured.err.replace("\n", "")
    assert "nvlink.gpu-isolated" in captured.out
    assert good.exists()
    assert check(inputs / "OK", "--prometheus", bad) == 3
    assert check(inputs / "OK", "--prometheus", bad, "--exit-style", "prolog") == 0
    assert check(inputs / "OK", "--json", tmp_path) == 3


def test_a_machine_that_cannot_be_read_leaves_no_file_of_the_last_check(inputs, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise ConfigError("NVML cannot be started", hint="install the driver")

    files = [tmp_path / name for name in ("m.prom", "r.json", "j.xml")]
    options = [x for pair in zip(("--prometheus", "--json", "--junit"), files, strict=True) for x in pair]
    assert check(inputs / "OK", *options) == 0
    monkeypatch.setattr("wsync.cli.topo.inputs.read_live", fail)
    assert check("--host", "n1", *options, "--exit-style", "npd") == 2
    assert "hint: install the driver" in capsys.readouterr().err
    assert 'wsync_topo_verdict{host="n1"} 3\n' in files[0].read_text()
    report = msgspec.json.decode(files[1].read_bytes(), type=Report)
    assert (report.verdict, report.machines[0].host, report.machines[0].complete) == ("UNKNOWN", "n1", False)
    (finding,) = report.all_findings()
    assert (finding.id, finding.evidence) == ("input.unreadable", "NVML cannot be started")
    assert ElementTree.parse(files[2]).getroot()[0].get("errors") == "1"
    for argv in (["--json"], ["--live", inputs / "OK", "--json"]):
        assert check(*argv) == 3
        assert json.loads(capsys.readouterr().out)["machines"][0]["host"] == platform.node()


def test_a_wrong_platform_leaves_no_file_of_the_last_check_and_names_no_host_that_was_not_asked(inputs, tmp_path):
    target = tmp_path / "m.prom"
    assert check(inputs / "OK", "--prometheus", target, "--platform", "nonsense") == 3
    assert 'wsync_topo_verdict{host=""} 3\n' in target.read_text()


def test_an_empty_name_is_not_the_folder_one_is_in(inputs, capsys, monkeypatch):
    monkeypatch.chdir(inputs)
    assert check("") == 3
    assert "an input has an empty name" in capsys.readouterr().err


def test_junit_counts_failures(inputs, tmp_path):
    target = tmp_path / "junit.xml"
    assert check(inputs / "CRIT", "--junit", target, "--host", "n1") == 2
    (suite,) = ElementTree.parse(target).getroot()
    assert (suite.get("name"), suite.get("tests"), suite.get("failures")) == ("n1", "2", "1")


def test_two_outputs_do_not_share_stdout(inputs, capsys):
    assert check(inputs / "OK", "--nagios", "--json") == 3
    captured = capsys.readouterr()
    assert "--json - and --nagios both write to stdout" in captured.err
    assert check(inputs / "OK", "--svg", "-", "--junit", "-") == 3


def test_pictures_are_written_and_go_to_stdout(inputs, tmp_path, capsys):
    svg, png = tmp_path / "t.svg", tmp_path / "t.png"
    assert check(inputs / "CRIT", "--svg", svg, "--png", png) == 2
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    capsys.readouterr()
    assert check(inputs / "CRIT", "--svg", "-") == 2
    assert capsys.readouterr().out == svg.read_text()


def test_a_picture_needs_matplotlib_for_png_alone(inputs, tmp_path):
    code = (
        "import sys\nsys.modules['matplotlib'] = None\nfrom wsync.cli.main import main\n"
        "sys.exit(main(['topo', 'check', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", code, str(inputs / "OK")]
    done = subprocess.run([*command, "--svg", str(tmp_path / "a.svg")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([*command, "--png", str(tmp_path / "a.png")], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "wsync-rl[topo]" in done.stderr
    assert not (tmp_path / "a.png").exists()


def test_the_installed_command_does_all_at_once(inputs, tmp_path):
    argv = ["--json", "r.json", "--prometheus", "m.prom", "--junit", "j.xml", "--svg", "t.svg", "--matrix", "--quiet"]
    command = [*COMMAND, "topo", "check", str(inputs / "CRIT"), *argv]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, "")
    assert {p.name for p in tmp_path.iterdir()} == {"inputs", "r.json", "m.prom", "j.xml", "t.svg"}
    assert "GPU2!!" in done.stdout
    assert "\x1b" not in done.stdout


# ---- names that are no UTF-8, and readers that go away


def odd_name(folder, text):
    """A file whose name is no UTF-8."""
    path = os.path.join(os.fsencode(folder), b"t\xff.txt")
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    return os.fsdecode(path)


def test_a_name_that_is_no_utf8_stops_no_output(tmp_path, capsys):
    name = odd_name(tmp_path, INPUTS["CRIT"])
    files = {option: tmp_path / f"out.{option}" for option in ("json", "junit", "prom", "svg")}
    options = [x for option, file in files.items() for x in (f"--{option.replace('prom', 'prometheus')}", file)]
    assert check(name, "--host", "n\udcff", *options) == 2
    assert json.loads(files["json"].read_text())["machines"][0]["host"] == "n\ufffd"
    assert 'host="n\ufffd"' in files["prom"].read_text()
    capsys.readouterr()
    assert main(["topo", "save", name, "--host", "n\udcff", "--output", str(tmp_path / "saved.json")]) == 0
    assert check(tmp_path / "saved.json") == 2
    golden = str(tmp_path / "golden.json")
    assert main(["topo", "golden", "save", name, "--output", golden]) == 0
    for words in (["compare", name, str(tmp_path / "saved.json")], ["golden", "check", golden, name]):
        capsys.readouterr()
        assert main(["topo", *words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["format_version"] == 1
    assert main(["topo", "lint", name, "--json"]) == 3
    assert main(["topo", "check", name + "x", "--json"]) == 3


def run_into(stdout, *argv, close=False):
    """Exit status and what stderr got of a command whose stdout is not read."""
    command = [*COMMAND, "topo", *map(str, argv)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(command, env=env, stdout=stdout, stderr=subprocess.PIPE, text=True)
    if close:
        child.stdout.close()
    with child:
        said = child.stderr.read()
        return child.wait(timeout=120), said


@pytest.mark.parametrize("options", [[], ["--nagios"], ["--json"]])
def test_a_reader_that_has_seen_enough_changes_no_verdict(inputs, options):
    assert run_into(subprocess.PIPE, "check", inputs / "CRIT", *options, close=True) == (2, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize(
    ("verdict", "options", "status"),
    [("OK", ["--nagios"], 3), ("OK", ["--exit-style", "prolog"], 0), ("CRIT", [], 2), ("CRIT", ["--json"], 2)],
)
def test_a_stdout_that_cannot_be_written_hides_no_fault_and_makes_no_fault(inputs, verdict, options, status):
    with open("/dev/full", "w") as full:
        found, said = run_into(full, "check", inputs / verdict, *options)
    assert (found, "No space left" in said, "Traceback" in said) == (status, True, False)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_that_nothing_was_judged_is_unknown_whatever_becomes_of_its_line(tmp_path):
    argv = ("plan", tmp_path / "none", "--bytes", "1e9"), ("check", "", "--nagios")
    for words in argv:
        with open("/dev/full", "w") as full:
            found, said = run_into(full, *words)
        assert (found, "Traceback" in said) == (3, False), said
        found, said = run_into(subprocess.PIPE, *words, close=True)
        assert (found, "Traceback" in said) == (3, False), said


def test_a_mistake_in_an_output_is_unknown_and_no_warning(inputs, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("wsync.cli.topo.outputs.junit_xml", fail)
    assert check(inputs / "OK", "--junit", tmp_path / "j.xml", "--exit-style", "prolog") == 0
    assert check(inputs / "OK", "--junit", tmp_path / "j.xml") == 3
    assert "wsync failed: ZeroDivisionError" in capsys.readouterr().err
    assert check(inputs / "CRIT", "--junit", tmp_path / "j.xml", "--prometheus", tmp_path / "m.prom") == 2
    assert (tmp_path / "m.prom").exists()
