"""Exit statuses of every command that judges: the same options, the same four verdicts, the same errors."""

from __future__ import annotations

import json

import machines as m
import msgspec
import pytest
from test_topo_achieved import LINKS, report
from test_topo_bandwidth import nccl_tests

from wsync.cli.main import main
from wsync.session.report import PublishReport


@pytest.fixture
def files(tmp_path):
    """A folder with what each command gets for each verdict."""
    boxes = {"good": m.h100(), "lost": m.isolate(m.h100(), 2), "moved": m.move_nics(m.h100(), 0)}
    for name, box in boxes.items():
        (tmp_path / name).write_text(m.topo_m(box))
    (tmp_path / "good2").write_text(m.topo_m(m.h100()))
    (tmp_path / "good.xml").write_text(m.system_xml(m.h100()))
    (tmp_path / "slow.xml").write_text(m.system_xml(m.h100(), uplink="5.0 GT/s PCIe"))
    (tmp_path / "lost.xml").write_text(m.system_xml(m.isolate(m.h100(), 2)))
    assert main(["topo", "golden", "save", str(tmp_path / "good"), "--output", str(tmp_path / "kept")]) == 0
    for name, rate in (("fast", 235.0), ("slower", 200.0), ("slow", 100.0)):
        (tmp_path / name).write_text(nccl_tests("all_reduce", rate))
    return tmp_path


def status(files, words, *options):
    argv = [str(files / w) if (files / w).exists() or w == "no" else w for w in words]
    return main(["topo", *argv, *options])


COMMANDS = {
    "compare": {"OK": ["good", "good2"], "WARN": ["good", "good2", "moved"], "CRIT": ["good", "good2", "lost"]},
    "golden check": {"OK": ["kept", "good2"], "WARN": ["kept", "moved"], "CRIT": ["kept", "lost"]},
    "golden diff": {"OK": ["kept", "good2"], "WARN": ["kept", "moved"], "CRIT": ["good", "lost"]},
    "lint": {"OK": ["good.xml"], "WARN": ["slow.xml"], "CRIT": ["lost.xml"], "UNKNOWN": ["good"]},
    "import-bandwidth": {"OK": ["fast"], "WARN": ["slower"], "CRIT": ["slow"], "UNKNOWN": ["good"]},
    "check": {"OK": ["good"], "CRIT": ["lost"], "UNKNOWN": ["no"]},
}
STYLES = {
    (): {"OK": 0, "WARN": 1, "CRIT": 2, "UNKNOWN": 3},
    ("--fail-on", "crit"): {"OK": 0, "WARN": 0, "CRIT": 2, "UNKNOWN": 3},
    ("--exit-style", "npd"): {"OK": 0, "WARN": 1, "CRIT": 1, "UNKNOWN": 2},
    ("--exit-style", "prolog"): {"OK": 0, "WARN": 0, "CRIT": 1, "UNKNOWN": 0},
    ("--exit-style", "strict"): {"OK": 0, "WARN": 1, "CRIT": 1, "UNKNOWN": 1},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_judging_command_has_the_statuses_of_check(command, files):
    cases = {"UNKNOWN": ["no", "no"][: len(next(iter(COMMANDS[command].values())))], **COMMANDS[command]}
    for options, wanted in STYLES.items():
        found = {verdict: status(files, [*command.split(), *names], *options) for verdict, names in cases.items()}
        assert found == {verdict: wanted[verdict] for verdict in cases}, (command, options)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "check"])
def test_a_report_that_cannot_be_written_is_unknown_before_anything_is_read(command, files, capsys):
    words = [*command.split(), *COMMANDS[command]["OK"]]
    assert status(files, words, "--json", str(files / "none" / "r.json")) == 3
    assert status(files, words, "--json", str(files / "none" / "r.json"), "--exit-style", "prolog") == 0
    assert "does not exist" in capsys.readouterr().err
    assert status(files, words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "OK"


def test_a_publish_below_its_prediction_is_a_warning_in_every_style(tmp_path):
    plan, slow = tmp_path / "plan.json", tmp_path / "report.json"
    links = [list(msgspec.structs.astuple(link)) for link in LINKS]
    predicted = {"time_s": 1.1, "wire_bytes": 50_000_000_000, "links": links}
    placement = {"now": {"time_s": 1.0, "slowest": "NICs"}}
    whole = {"format_version": 1, "nbytes": 1, "placement": placement, "plan": predicted}
    plan.write_bytes(msgspec.json.encode(whole))
    value: PublishReport = report(3.0)
    slow.write_bytes(msgspec.json.encode(value))
    for options, wanted in STYLES.items():
        assert main(["topo", "achieved", str(slow), "--plan", str(plan), *options]) == wanted["WARN"]
        assert main(["topo", "achieved", str(slow), "--plan", str(slow), *options]) == wanted["UNKNOWN"]


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["compare"], 3),
        (["golden", "check"], 3),
        (["golden"], 3),
        (["lint", "--exit-style", "npd", "--wings"], 2),
        (["achieved", "--exit-style=prolog"], 0),
        (["save"], 3),
        (["golden", "save", "--exit-style", "strict"], 1),
        (["plan", "--bytes", "many"], 3),
        (["advise", "--wings"], 3),
    ],
)
def test_wrong_arguments_are_unknown_to_every_topo_command(argv, status, capsys):
    with pytest.raises(SystemExit) as e:
        main(["topo", *argv])
    assert e.value.code == status
    assert "error:" in capsys.readouterr().err


def test_an_error_of_our_own_is_unknown(files, monkeypatch, capsys):
    def fail(*_):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("wsync.cli.topo.compare.compare", fail)
    assert status(files, ["compare", "good", "good2"]) == 3
    assert "wsync failed: ZeroDivisionError" in capsys.readouterr().err
