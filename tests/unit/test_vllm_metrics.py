"""Numbers of workers in the metrics of the API server: other processes, dead ones, several API servers."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import msgspec
import pytest

from wsync.integrations.vllm import metrics

pytest.importorskip("prometheus_client")

from prometheus_client import CollectorRegistry, generate_latest

WORKER = """
import os, sys, types
from wsync.integrations.vllm.metrics import WorkerMetrics
worker = WorkerMetrics("engine-0", 1)
sink = types.SimpleNamespace(version=7, bytes_installed=100, last_pause_s=0.25, last_stamps={"install": 0.125})
worker.committed(sink)
worker.committed(sink)
print("written", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    monkeypatch.setenv(metrics.DIRECTORY, str(private))
    return private


def scraped(collector):
    """Samples as text, without comments."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return {line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")}


def sink(**fields):
    return types.SimpleNamespace(
        **{"version": 1, "bytes_installed": 5, "last_pause_s": 0.5, "last_stamps": {}} | fields
    )


EXPECTED = {
    'wsync_version{rank="1",replica="engine-0"} 7.0',
    'wsync_poisoned{rank="1",replica="engine-0"} 0.0',
    'wsync_commits_total{rank="1",replica="engine-0"} 2.0',
    'wsync_installed_bytes_total{rank="1",replica="engine-0"} 100.0',
    'wsync_pause_seconds{rank="1",replica="engine-0"} 0.25',
    'wsync_phase_seconds{phase="install",rank="1",replica="engine-0"} 0.125',
}


def sorted_labels(lines):
    """Lines with their labels in one order: prometheus_client's versions differ."""
    found = set()
    for line in lines:
        name, _, rest = line.partition("{")
        labels, _, value = rest.partition("} ")
        found.add(f"{name}{{{','.join(sorted(labels.split(',')))}}} {value}")
    return found


def start_worker(**environment):
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    assert worker.stdout.readline() == "written\n"
    return worker


def end(worker):
    worker.stdin.close()
    worker.wait(10)
    worker.stdout.close()


def test_the_api_server_shows_what_its_worker_processes_count(directory):
    worker = start_worker()
    try:
        assert sorted_labels(scraped(metrics._Collector())) == EXPECTED
    finally:
        end(worker)


def test_a_worker_that_died_is_not_shown(directory):
    worker = start_worker()
    worker.kill()
    end(worker)
    assert list(directory.glob("*.json"))
    assert scraped(metrics._Collector()) == set()


def test_a_worker_of_another_server_is_not_shown(directory):
    """Servers that one process started inherit one directory."""
    parent, start = metrics._parent_and_start(os.getpid())[0], 0
    start = metrics._parent_and_start(parent)[1]
    numbers = metrics.RankNumbers(parent, start, "engine-9", 0, version=1)
    (directory / "other.json").write_bytes(msgspec.json.encode(numbers))
    assert metrics.read_numbers(str(directory)) == []


def test_a_process_number_that_is_used_again_is_not_taken_for_the_worker(directory):
    numbers = metrics.RankNumbers(os.getpid(), 1, "engine-9", 0)
    (directory / "old.json").write_bytes(msgspec.json.encode(numbers))
    assert metrics.read_numbers(str(directory)) == []


@pytest.mark.parametrize("raw", [b"", b"{", b'{"pid": "x"}', b"[" * (1 << 17)])
def test_a_file_that_is_none_of_ours_is_passed_over(directory, raw):
    (directory / "strange.json").write_bytes(raw)
    assert metrics.read_numbers(str(directory)) == []


def test_an_engine_in_the_api_servers_own_process_is_shown_until_it_leaves(directory):
    worker = metrics.WorkerMetrics("engine-0", 0)
    assert not any("wsync_version" in line for line in scraped(metrics._Collector()))
    worker.committed(sink(version=3))
    assert any(line.startswith("wsync_version") and line.endswith(" 3.0") for line in scraped(metrics._Collector()))
    worker.close()
    assert scraped(metrics._Collector()) == set()


def test_a_poisoned_rank_shows_no_version_until_it_is_healed(directory):
    worker = metrics.WorkerMetrics("engine-0", 0)
    worker.committed(sink(version=3))
    worker.failed(sink(version=None, state="poisoned"))
    assert {'wsync_version{rank="0",replica="engine-0"} NaN', 'wsync_poisoned{rank="0",replica="engine-0"} 1.0'} <= (
        sorted_labels(scraped(metrics._Collector()))
    )
    worker.committed(sink(version=4))
    assert {'wsync_version{rank="0",replica="engine-0"} 4.0', 'wsync_poisoned{rank="0",replica="engine-0"} 0.0'} <= (
        sorted_labels(scraped(metrics._Collector()))
    )
    worker.close()


def test_a_directory_that_went_with_its_server_does_not_end_the_worker(directory):
    worker = metrics.WorkerMetrics("engine-0", 0)
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
    worker.committed(sink())
    worker.committed(sink())


@pytest.mark.parametrize("imported_before", [False, True])
def test_several_api_servers_read_prometheus_clients_own_files(tmp_path, monkeypatch, imported_before):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    if imported_before:  # a forked worker: prometheus_client was imported before the directory was set
        monkeypatch.setitem(
            globals(),
            "WORKER",
            "import os\nd = os.environ.pop('PROMETHEUS_MULTIPROC_DIR')\nimport prometheus_client\n"
            "os.environ['PROMETHEUS_MULTIPROC_DIR'] = d\n" + WORKER,
        )
    worker = start_worker()
    try:
        from prometheus_client.multiprocess import MultiProcessCollector

        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        lines = {x for x in generate_latest(registry).decode().splitlines() if x.startswith("wsync")}
    finally:
        end(worker)
    assert sorted_labels(lines) == EXPECTED


SERVER = """
import os, signal, stat, sys, tempfile, types
from wsync.integrations.vllm import metrics
metrics.serve_metrics()
directory = os.environ[metrics.DIRECTORY]
metrics.serve_metrics()
assert os.environ[metrics.DIRECTORY] == directory and not os.path.exists(directory)
worker = metrics.WorkerMetrics("engine-0", 0)
assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
pid = os.fork()
if pid == 0:
    raise SystemExit(0)  # a child that ends orderly must not take it away
os.waitpid(pid, 0)
assert os.path.isdir(directory)
print(directory, flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "left":
    worker.close()
    assert not os.path.exists(directory)
"""


def run_server(folder, how):
    environment = {k: v for k, v in os.environ.items() if k not in (metrics.DIRECTORY, "PROMETHEUS_MULTIPROC_DIR")}
    done = subprocess.run(
        [sys.executable, "-c", SERVER, how],
        capture_output=True,
        text=True,
        env=environment | {"TMPDIR": str(folder)},
        check=False,
    )
    assert done.stdout.strip(), done.stderr
    assert how == "killed" or done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("how", ["ended", "left"])
def test_a_server_leaves_no_directory_behind(tmp_path, how):
    run_server(tmp_path, how)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_server_left_is_removed_by_the_next_and_that_of_a_living_one_is_not(tmp_path):
    killed = run_server(tmp_path, "killed")
    assert os.path.isdir(killed)
    living = tmp_path / f"wsync-metrics-{metrics._namespace()}-{os.getpid()}-0"
    living.mkdir()
    run_server(tmp_path, "ended")
    assert list(tmp_path.iterdir()) == [living]


def test_a_directory_that_others_can_write_to_is_not_used(directory):
    directory.chmod(0o777)
    with pytest.raises(PermissionError):
        metrics.WorkerMetrics("engine-0", 0)
    assert not list(directory.iterdir())
