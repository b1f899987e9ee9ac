"""The main job as users run it: real processes, every byte verified, and every failure named."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from bench_runs import COMMAND, check_nothing_is_left, environment, run_bench

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(240)]

BASELINES = ["disk", "tmpfs", "broadcast", "buckets"]
SPREADS = ("seconds", "stall_s", "pause_s", "assemble_s", "wire_s", "install_s", "other_s")


def deep(*values: object) -> object:
    """A case that ``make test-deep`` runs: every run of the command starts four processes."""
    return pytest.param(*values, marks=pytest.mark.deep)


def command(*args: str) -> list[str]:
    return [*COMMAND, "e2e", *args]


def bench(tmp_path: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return run_bench(tmp_path, "e2e", *args)


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    files = {name: folder / f"result.{name}" for name in ("json", "png", "trace")}
    done = bench(
        folder,
        *("--recipes", "bf16,fp8_block128,fp8_block128_f32", "--repeats", "2"),
        *("--json", str(files["json"]), "--chart", str(files["png"]), "--trace", str(files["trace"])),
    )
    assert done.returncode == 0, done.stderr
    return done, files, json.loads(files["json"].read_text())


def test_every_row_of_every_recipe_is_there_and_bitwise_right(full_run):
    _, _, result = full_run
    rows = [(row["recipe"], row["row"]) for row in result["rows"]]
    recipes = ("bf16", "fp8_block128", "fp8_block128_f32")
    assert rows == [(recipe, row) for recipe in recipes for row in ["wsync", *BASELINES]]
    assert {row["verdict"] for row in result["rows"]} == {"ok"}
    assert all(repeat["verified"] for row in result["rows"] for repeat in row["repeats"])
    assert result["verdict"] == "ok"


def test_every_column_has_a_plausible_number(full_run):
    _, _, result = full_run
    for row in result["rows"]:
        for name in SPREADS:
            spread = row[name]
            assert 0 <= spread["min"] <= spread["p50"] <= spread["max"], (row["row"], name)
        assert row["limit_s"] > 0
        assert row["limit_share"] == pytest.approx(row["limit_s"] / row["seconds"]["p50"])
        assert row["logical_gbps"] == pytest.approx(result["trainer_bytes"] / row["seconds"]["p50"] / 1e9)
        assert len(row["repeats"]) == 2
        for repeat in row["repeats"]:
            assert sum(repeat["phases_s"].values()) == pytest.approx(repeat["seconds"], abs=1e-6)
            assert [rank["name"] for rank in repeat["ranks"]] == ["trainer/0", "trainer/1", "engine/0", "engine/1"]
            assert repeat["pause_s"] > 0
            assert repeat["stall_s"] > 0


def test_bytes_on_the_wire_are_those_of_the_recipe(full_run):
    _, _, result = full_run
    by_name = {(row["recipe"], row["row"]): row for row in result["rows"]}
    model = result["trainer_bytes"]
    assert by_name["bf16", "wsync"]["wire_bytes"] == model
    assert by_name["bf16", "broadcast"]["wire_bytes"] == 2 * model
    for baseline in ("disk", "tmpfs"):
        assert model <= by_name["bf16", baseline]["wire_bytes"] < 1.01 * model
    fp8 = by_name["fp8_block128", "wsync"]["wire_bytes"]
    assert 0.5 * model < fp8 < 0.7 * model
    assert by_name["fp8_block128", "broadcast"]["wire_bytes"] == 2 * fp8
    assert result["engine_bytes"]["fp8_block128"] < result["engine_bytes"]["bf16"]


def test_record_names_machine_versions_and_conditions(full_run):
    _, _, result = full_run
    assert result["machine"]["num_cores"] >= 1
    assert result["machine"]["cpu"]
    assert result["versions"]["torch"]
    assert "fsync" in result["conditions"]["disk"]
    assert "page cache" in result["conditions"]["disk"]
    assert result["argv"][1:3] == ["bench", "e2e"]
    assert result["memcpy"]["gbps"] > 0


def test_table_goes_to_stdout_and_progress_to_stderr(full_run):
    done, _, _ = full_run
    for word in ("wsync", "reload from disk", "packed buckets", "limit", "verdict", "fp8_block128_f32"):
        assert word in done.stdout
    assert "\x1b" not in done.stdout
    assert "warm-up" in done.stderr
    assert "warm-up" not in done.stdout


def test_chart_is_a_picture_and_trace_has_the_phases_of_every_process(full_run):
    _, files, _ = full_run
    assert files["png"].read_bytes().startswith(b"\x89PNG\r\n")
    events = json.loads(files["trace"].read_text())["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    assert {event["pid"] for event in complete} == {0, 1, 2, 3}
    assert all(set(event) == {"name", "cat", "ph", "ts", "dur", "pid", "tid", "args"} for event in complete)
    names = {event["name"] for event in complete if event["args"]["row"] == "wsync"}
    assert {"pack", "receive", "install"} <= names
    assert {"gather", "write", "fsync", "load"} <= {e["name"] for e in complete if e["args"]["row"] == "disk"}


def test_three_trainers_cut_scale_blocks_and_one_engine_takes_all_over_gloo(tmp_path):
    done = bench(
        tmp_path,
        *("--trainers", "3", "--engines", "1", "--transport", "gloo", "--recipes", "fp8_block128_f32"),
        *("--baselines", "buckets", "--quantise-on", "engine", "--repeats", "1", "--json", "-"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [row["verdict"] for row in result["rows"]] == ["ok", "ok"]
    assert result["rows"][1]["wire_bytes"] >= result["trainer_bytes"]


def test_one_wrong_bit_in_one_engine_fails_the_command_and_names_the_parameter(tmp_path):
    done = bench(
        tmp_path,
        *("--recipes", "fp8_block128", "--baselines", "tmpfs", "--repeats", "1", "--json", "-"),
        *("--fault", "corrupt:engine:1:wsync"),
    )
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout)
    verdicts = {row["row"]: row["verdict"] for row in result["rows"]}
    assert result["verdict"] == "wrong"
    assert "engine 1" in verdicts["wsync"]
    assert "embed_tokens" in verdicts["wsync"]
    assert verdicts["tmpfs"] == "ok"


@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        ("kill:engine:1:wsync", 3, "engine 1 (process"),
        deep("kill:trainer:0:buckets", 3, "was killed by SIGKILL (bf16, buckets, repeat 0)"),
        deep("raise:trainer:1:broadcast", 2, "trainer 1 (bf16, broadcast, repeat 0): a failure was injected"),
    ],
)
def test_a_rank_that_fails_ends_the_command_with_its_name(tmp_path, fault, status, words):
    # A deadline that outlasts the test: it is the failure that ends the command.
    done = bench(tmp_path, "--recipes", "bf16", "--repeats", "1", "--deadline", "600", "--fault", fault)
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("row", ["wsync", deep("disk")])
def test_a_rank_that_hangs_is_noticed_within_the_deadline(tmp_path, row):
    done = bench(
        tmp_path,
        *("--recipes", "bf16", "--baselines", "disk", "--repeats", "1", "--deadline", "10"),
        *("--fault", f"hang:trainer:1:{row}"),
    )
    assert done.returncode == 3, done.stderr
    assert "error: " in done.stderr
    assert "still running: trainer 1" in done.stderr or "trainer ranks [1]" in done.stderr


def test_a_short_deadline_does_not_count_while_processes_start(tmp_path):
    done = bench(tmp_path, "--recipes", "bf16", "--baselines", "none", "--repeats", "1", "--deadline", "0.1")
    assert "no process made progress" not in done.stderr or ": start" not in done.stderr


def test_a_full_disk_is_named_with_the_bytes_needed_and_free(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    inside = command("--recipes", "bf16", "--baselines", "disk", "--repeats", "1", "--workdir", str(small))
    mount = f"mount -t tmpfs -o size=1m none {small}"
    unshare = ["unshare", "--mount", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "sh", "-c", mount], check=False).returncode != 0:
        pytest.skip("no small filesystem can be mounted here")
    done = subprocess.run(
        [*unshare, "sh", "-c", f'{mount} && exec "$@"', "sh", *inside],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "a checkpoint needs" in done.stderr
    assert "bytes are free" in done.stderr
    assert "hint: give --workdir" in done.stderr
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.deep
def test_sigterm_ends_every_process_and_leaves_no_file(tmp_path):
    process = subprocess.Popen(
        command("--recipes", "bf16", "--repeats", "500"),
        env=environment(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "wsync, warm-up" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    process.stderr.close()
    check_nothing_is_left(tmp_path, process.pid)


@pytest.mark.deep
def test_engines_that_the_model_does_not_divide_by_are_refused(tmp_path):
    done = bench(tmp_path, "--engines", "3", "--recipes", "bf16", "--baselines", "none", "--repeats", "1")
    assert done.returncode == 2, done.stderr
    assert "divide" in done.stderr or "3" in done.stderr
    assert "Traceback" not in done.stderr
