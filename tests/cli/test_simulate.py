"""``wsync simulate``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from wsync.cli.main import build_parser, main
from wsync.describe import save_manifest
from wsync.plan import encode_plan, make_plan
from wsync.sim.presets import PRESETS
from wsync.sim.scenario import decode_scenario
from wsync.spec.cluster import dump_cluster

KEYS = {"score", "plan_s", "lower_bound_s", "binding_cut", "plan_wall_s", "simulated_s", "stall_s", "format_version"}


@pytest.fixture
def scenario(tmp_path):
    """The tiny preset as files."""
    source, sink, cluster, options = PRESETS["tiny"].build()
    save_manifest(source, tmp_path / "source.json")
    save_manifest(sink, tmp_path / "sink.json")
    dump_cluster(cluster, tmp_path / "cluster.json")
    return write(
        tmp_path,
        {
            "format_version": 1,
            "source": "source.json",
            "sink": "sink.json",
            "cluster": "cluster.json",
            "plan_options": {"bucket_bytes": options.bucket_bytes},
        },
    )


def write(folder, fields):
    path = folder / "scenario.json"
    path.write_text(json.dumps(fields))
    return path


def change(path, **fields):
    return write(path.parent, json.loads(path.read_text()) | fields)


def run_json(capsys, *argv):
    status = main(["simulate", *map(str, argv), "--json"])
    return status, json.loads(capsys.readouterr().out)


def refused(capsys, *argv):
    """Status and message of a run that must print no data."""
    status = main(["simulate", *map(str, argv)])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    return status, captured.err


def test_the_list_names_every_preset_with_its_assumptions(capsys):
    status, found = run_json(capsys, "--list")
    assert status == 0
    assert found["format_version"] == 1
    assert [p["name"] for p in found["presets"]] == list(PRESETS)
    assert all(p["assumptions"] for p in found["presets"])
    assert main(["simulate", "--list"]) == 0
    assert "perplexity-kimi-k2-k4" in capsys.readouterr().out


def test_a_run_says_how_good_its_plan_is(capsys):
    status, result = run_json(capsys, "tiny")
    assert status == 0
    assert set(result) >= KEYS
    assert result["binding_cut"] == "egress of node trainer-0"
    assert result["score"] == pytest.approx(result["simulated_s"] / result["lower_bound_s"])
    assert 1.0 <= result["score"] < 1.1
    assert result["plan_wall_s"] > 0
    assert [r["state"] for r in result["replicas"]] == ["committed", "committed"]


def test_the_table_names_replicas_and_the_busiest_ports(capsys):
    assert main(["simulate", "tiny"]) == 0
    captured = capsys.readouterr()
    for words in ("lower bound", "score", "engine-0", "committed", "engine-0/nic"):
        assert words in captured.out
    assert "assumed: " in captured.err


def test_a_port_that_fails_is_reported_and_its_buckets_go_over_others(capsys):
    status, result = run_json(capsys, "tiny", "--fail", "engine-1/0@0.0005s", "--detect", "0.0001")
    assert status == 0
    assert [e["what"] for e in result["events"]] == ["port 0 of node engine-1 failed"]
    assert result["resent"] > 0
    assert all(r["state"] == "committed" for r in result["replicas"])


def test_a_node_that_dies_leaves_its_replica_on_the_old_version(capsys):
    status, result = run_json(capsys, "tiny", "--fail", "engine-1@0.0005", "--install", "staged")
    assert status == 0
    states = {r["name"]: r["state"] for r in result["replicas"]}
    assert states == {"engine-0": "committed", "engine-1": "old version serving"}


def test_without_trainers_nothing_commits_and_the_status_says_so(capsys):
    status, result = run_json(capsys, "tiny", "--fail", "trainer-0@0.0001")
    assert status == 1
    assert result["score"] is None
    assert result["no_score"] == "the bound is that of all replicas, and 2 did not commit: engine-0, engine-1"
    assert result["simulated_s"] is None
    assert result["phases"]["commit"] is None
    assert result["horizon_s"] > 0
    assert 0 < max(use["utilisation"] for use in result["resources"]) <= 1


def test_a_run_in_which_nothing_commits_is_drawn_over_all_that_happened(tmp_path, capsys):
    chart, trace = tmp_path / "c.png", tmp_path / "t.json"
    argv = ["simulate", "tiny", "--fail", "trainer-0@0.0004", "--chart", str(chart), "--trace", str(trace)]
    assert main(argv) == 1
    out = capsys.readouterr().out
    assert "no replica committed" in out
    assert "the bound is that of all replicas" in out
    assert chart.read_bytes().startswith(b"\x89PNG")
    spans = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    assert max(e["dur"] for e in spans) == pytest.approx(400, rel=0.01)


def test_a_failure_after_the_end_is_noted_and_changes_nothing(capsys):
    _, healthy = run_json(capsys, "tiny")
    _, result = run_json(capsys, "tiny", "--fail", "engine-0@5")
    assert result["notes"] == ["node engine-0 failed at 5 s, after the end: this changed nothing"]
    for field in ("simulated_s", "score", "events", "resources", "horizon_s"):
        assert result[field] == healthy[field]


def test_gpus_that_are_too_small_are_named(scenario, capsys):
    change(scenario, sim_options={"gpu_memory_gb": 0.1})
    status, result = run_json(capsys, scenario)
    assert status == 0
    assert re.search(
        r"24 of 24 GPUs lack memory .* GPU \d of node trainer-0 needs 0\.\d GB and has 0\.1", *result["notes"]
    )
    assert main(["simulate", str(scenario)]) == 0
    assert "note: 24 of 24 GPUs lack memory" in capsys.readouterr().out


def test_the_list_goes_with_json_only(capsys):
    for argv, words in ((["tiny"], "takes none; got 'tiny'"), (["--chart", "c.png"], "not with --chart")):
        status, message = refused(capsys, "--list", *argv)
        assert status == 2
        assert words in message


def test_a_replica_that_is_not_there_is_planned_without(capsys):
    status, result = run_json(capsys, "tiny", "--without", "engine-0")
    assert status == 0
    assert [r["name"] for r in result["replicas"]] == ["engine-1"]


def test_equal_seeds_give_equal_runs(capsys):
    argv = ("tiny", "--jitter", "0.3", "--seed")
    first, again, other = (run_json(capsys, *argv, seed)[1]["simulated_s"] for seed in (1, 1, 2))
    assert first == again != other


def test_chart_and_trace_are_written_whole(tmp_path, capsys):
    chart, trace, out = tmp_path / "c.png", tmp_path / "t.json", tmp_path / "r.json"
    argv = ["simulate", "tiny", "--chart", str(chart), "--trace", str(trace), "--json", str(out)]
    assert main(argv) == 0
    assert chart.read_bytes().startswith(b"\x89PNG")
    events = json.loads(trace.read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert {"replicas", "trainer-0", "engine-1"} <= names
    assert all(e["dur"] >= 0 for e in events if e["ph"] == "X")
    assert set(json.loads(out.read_text())) >= KEYS
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.png", "r.json", "t.json"]


def test_a_scenario_file_is_simulated_like_its_preset(scenario, capsys):
    _, of_file = run_json(capsys, scenario, "--install", "in_place")
    _, of_preset = run_json(capsys, "tiny")
    assert of_file["name"] == "scenario"
    assert of_file["simulated_s"] == of_preset["simulated_s"]


def test_a_plan_that_is_given_is_not_made_again(scenario, capsys):
    source, sink, cluster, options = PRESETS["tiny"].build()
    (scenario.parent / "plan.bin").write_bytes(encode_plan(make_plan(source, sink, cluster, options)))
    status, result = run_json(capsys, change(scenario, plan="plan.bin"))
    assert status == 0
    assert result["plan_wall_s"] is None


def test_options_of_a_scenario_count_and_those_of_the_command_come_on_top(scenario, capsys):
    change(scenario, sim_options={"failures": [{"node": "engine-1", "time_s": 0.0001}]})
    _, result = run_json(capsys, scenario, "--fail", "engine-0@0.0001")
    assert {r["fault"] for r in result["replicas"]} == {"node engine-0 failed", "node engine-1 failed"}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["tiny", "--trace", "-"], "only --json goes to stdout"),
        ([], "needs a preset or a scenario file"),
        (["tinny"], "did you mean 'tiny'?"),
        (["/nowhere/s.json"], "cannot be read: No such file"),
        (["tiny", "--straggler", "engine-0:0"], "factor of straggler 'engine-0' is 0.0, allowed is 1e-06 to 1"),
        (["tiny", "--straggler", "engine-0:-2"], "is -2.0, allowed is"),
        (["tiny", "--straggler", "engine-0:1e9"], "is 1000000000.0, allowed is"),
        (["tiny", "--straggler", "engine-0:nan"], "is nan, allowed is"),
        (["tiny", "--straggler", "engine-0:fast"], "is 'fast', which is not a number"),
        (["tiny", "--straggler", "engine-0"], "is not NODE:FACTOR"),
        (["tiny", "--straggler", "engine-7:0.5"], "'engine-7' has no rank of this plan"),
        (["tiny", "--straggler", "engine-0:0.5", "--straggler", "engine-0:0.4"], "a straggler 2 times"),
        (["tiny", "--fail", "engine-0"], "is not NODE@SECONDS"),
        (["tiny", "--fail", "engine-0@-1"], "is -1.0, allowed is 0 to 1e+06"),
        (["tiny", "--fail", "engine-0@inf"], "is inf, allowed is"),
        (["tiny", "--fail", "engine-0/8@1"], "has 8 ports, from 0 on; got 8"),
        (["tiny", "--fail", "engine-9/0@1"], "'engine-9' has no rank of this plan"),
        (["tiny", "--without", "engine-9"], "no replica 'engine-9'"),
        (["tiny", "--without", "engine-0", "--without", "engine-1"], "0 of 2 replicas left"),
        (["tiny", "--jitter", "1.5"], "jitter is 1.5, allowed is 0 to 0.99"),
        (["tiny", "--detect", "-1"], "detect_s is -1.0, allowed is"),
        (["tiny", "--chart", "c.svg"], "must end in .png"),
        (["tiny", "--chart", ""], "--chart needs the name of a file"),
        (["tiny", "--chart", "-"], "only --json goes to stdout"),
        (["tiny", "--json", ""], "--json needs the name of a file"),
        (["tiny", "--json", "./t.json"], "--trace is to be written to t.json, but --json is written to that file"),
        (["tiny", "--chart", "x" * 300 + ".png"], "cannot be written"),
        (["x" * 300], "neither a preset nor a file"),
        (["x" * 300 + ".json"], "File name too long"),
        (["tiny", "--fail", "engine-0/" + "9" * 5000 + "@1"], "(5000 characters)', which is not an index"),
        (["tiny", "--fail", "engine-0/\u0663@1"], "which is not an index"),
        (["tiny", "--fail", "engine-0/0_5@1"], "'0_5', which is not an index"),
        (["tiny", "--fail", "engine-0@0_5"], "'0_5', which is not a number"),
        (["tiny", "--straggler", "engine-0:\u0660.5"], "which is not a number"),
        (["tiny", "--jitter", "0_5"], "--jitter is '0_5', which is not a number"),
        (["tiny", "--detect", "1" * 500], "(500 characters)', which is not a number"),
        (["tiny", "--seed", "\u0663"], "which is not an index"),
        (["tiny", "--json", "/nowhere/r.json"], "the folder /nowhere does not exist"),
    ],
)
def test_mistakes_are_named_and_write_nothing(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    outputs = ["--trace", "t.json"] if argv and "--trace" not in argv else []
    status, message = refused(capsys, *argv, *outputs)
    assert status == 2
    assert words in message.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "words", "status"),
    [
        ({"format_version": 99}, "has format version 99, this wsync reads 1", 2),
        ({"colour": "red"}, "unknown field `colour`", 2),
        ({"source": "nowhere.json"}, "nowhere.json", 2),
        ({"source": "sink.json"}, "stands for the trainer", 2),
        ({"sink": "source.json"}, "stands for the engines", 2),
        ({"sim_options": {"stragglers": [{"node": "engine-0", "factor": 0}]}}, "is 0.0, allowed is", 2),
        ({"sim_options": {"install": "later"}}, "later", 2),
        ({"plan": "cluster.json"}, "is not a plan", 2),
    ],
)
def test_a_scenario_that_cannot_be_is_named(scenario, fields, words, status, capsys):
    found, message = refused(capsys, change(scenario, **fields))
    assert found == status
    assert words in message.replace("\n", " ")


@pytest.mark.parametrize("name", ["scenario.json", "source.json", "sink.json", "cluster.json"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_named(scenario, name, share, capsys):
    path = scenario.parent / name
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data.rstrip()) * share)])
    status, message = refused(capsys, scenario)
    assert status == 2
    assert name in message


@pytest.mark.parametrize("rate", [0, -1, 1e30])
def test_a_cluster_with_rates_that_cannot_be_is_named(scenario, rate, capsys):
    path = scenario.parent / "cluster.json"
    cluster = json.loads(path.read_text())
    cluster["groups"][0]["nics"][0]["rate_gbps"] = rate
    path.write_text(json.dumps(cluster))
    status, message = refused(capsys, scenario)
    assert status == 2
    assert "nics[0].rate_gbps" in message


def test_the_guide_runs():
    text = (Path(__file__).parents[2] / "docs" / "guides" / "simulate.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.S)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "engine-0" in done.stdout
    commands = re.findall(r"^wsync (simulate [^#\n]*)", text, re.M)
    assert len(commands) >= 4
    for command in commands:
        build_parser().parse_args(command.split())


def test_the_scenario_of_the_guide_can_be_read():
    text = (Path(__file__).parents[2] / "docs" / "guides" / "simulate.md").read_text()
    (example,) = re.findall(r"```json\n(.*?)```", text, re.S)
    assert decode_scenario(example.encode()).sim_options.install == "in_place"


def test_replicas_that_are_not_shown_are_counted_by_what_became_of_them(capsys):
    from wsync.cli.output import stdout_console
    from wsync.cli.simulate_table import print_result
    from wsync.sim import Failure, simulate

    source, sink, cluster, options = PRESETS["tiny"].build()
    result = simulate(
        make_plan(source, sink, cluster, options), source, sink, cluster, failures=[Failure("trainer-0", time_s=0.0)]
    )
    print_result(result, stdout_console(), max_replicas=1, max_resources=1)
    assert "and 1 that did not commit" in capsys.readouterr().out


def test_a_result_is_not_written_over_the_scenario(scenario, capsys):
    before = scenario.read_bytes()
    status, message = refused(capsys, scenario, "--trace", scenario)
    assert (status, scenario.read_bytes()) == (2, before)
    assert "but the scenario is read from that file" in message
