"""The snippets of ``examples/topo``: run or parsed as Slurm, node-problem-detector and Kubernetes would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fake_nvml as fake
import machines as m
import msgspec
import pytest
from live_rig import options, sysfs_of

FOLDER = Path(__file__).parents[2] / "examples" / "topo"
ROOT = FOLDER.parents[1]

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the examples are not here")


@pytest.fixture
def bin_folder(tmp_path):
    """A folder with a ``wsync`` command."""
    folder = tmp_path / "bin"
    folder.mkdir()
    put(folder / "wsync", f'exec "{sys.executable}" -m wsync.cli.main "$@"')
    return folder


def put(path, line):
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


@pytest.fixture
def machine(tmp_path):
    """Writes a machine's file."""

    def write(name, text):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def run(command, cwd, **env):
    clean = {"PYTHONPATH": os.pathsep.join(sys.path), **env}
    return subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=120, check=False)


# ---- Slurm


def prolog(tmp_path, **env):
    # Slurm gives a prolog no PATH.
    return run(["/bin/bash", str(FOLDER / "slurm_prolog.sh")], tmp_path, **env)


def test_the_prolog_drains_a_faulty_node_and_says_why(tmp_path, bin_folder, machine):
    faulty = machine("faulty", m.topo_m(m.isolate(m.h100(), 2)))
    done = prolog(tmp_path, WSYNC_BIN=str(bin_folder), WSYNC_TOPO_INPUTS=faulty)
    assert done.returncode == 1
    assert "TOPO CRITICAL - GPU2" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (m.topo_m(m.h100()), "TOPO OK"),
        (m.topo_m(m.h100_vm()), "vm.tree-hidden"),
        ("no topology", "TOPO UNKNOWN"),
    ],
)
def test_the_prolog_drains_nothing_else(tmp_path, bin_folder, machine, text, words):
    done = prolog(tmp_path, WSYNC_BIN=str(bin_folder), WSYNC_TOPO_INPUTS=machine("input", text))
    assert done.returncode == 0, done.stderr
    assert words in done.stderr


def test_the_prolog_lets_jobs_run_where_wsync_is_missing_or_broken(tmp_path):
    done = prolog(tmp_path, WSYNC_BIN=str(tmp_path / "empty"))
    assert done.returncode == 0
    assert "not installed" in done.stderr
    for line, status in (("exit 1", 1), ("echo Traceback; exit 1", 1), ("echo TOPO CRITICAL; exit 137", 137)):
        folder = tmp_path / str(status) / line[:6].strip()
        folder.mkdir(parents=True)
        put(folder / "wsync", line)
        assert prolog(tmp_path, WSYNC_BIN=str(folder)).returncode == 0


LIVE = """import sys
import msgspec
from wsync.cli.main import main
from wsync.cli.topo import inputs
from wsync.topo.live import LiveOptions
inputs.LIVE = msgspec.json.decode({options!r}, type=LiveOptions)
sys.exit(main([*sys.argv[1:], "--root", inputs.LIVE.root, "--timeout", "6"]))
"""


@pytest.mark.multiproc
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("faults", "status", "words"),
    [
        (fake.Faults(), 0, "TOPO OK"),
        (fake.Faults(hang=("nvmlDeviceGetNvLinkState", 5, 7)), 1, "GPU5"),
        (fake.Faults(hang=("nvmlInitWithFlags", -1, -1)), 1, "probe.hang"),
        (fake.Faults(refuse={"nvmlInitWithFlags": 9}), 0, "TOPO UNKNOWN"),
    ],
    ids=["well", "a link's call hangs", "the driver does not start", "no driver"],
)
def test_the_prolog_drains_where_a_call_of_the_driver_hangs(tmp_path, faults, status, words):
    folder, root = tmp_path / "bin", tmp_path / "root"
    folder.mkdir()
    made = msgspec.json.encode(options(fake.of_box(m.h100()), sysfs_of(m.h100(), root), faults))
    (folder / "live.py").write_text(LIVE.format(options=made))
    put(folder / "wsync", f'exec "{sys.executable}" "{folder / "live.py"}" "$@"')
    done = prolog(tmp_path, WSYNC_BIN=str(folder))
    assert (done.returncode, words in done.stderr) == (status, True), done.stderr


# ---- node-problem-detector


def test_the_detectors_rule_runs_with_its_exit_statuses(tmp_path, bin_folder, machine):
    config = json.loads((FOLDER / "node_problem_detector.json").read_text())
    assert config["plugin"] == "custom"
    types = {c["type"] for c in config["conditions"]}
    (rule,) = config["rules"]
    assert rule["condition"] in types
    assert rule["type"] == "permanent"
    wanted = {0: m.topo_m(m.h100()), 1: m.topo_m(m.isolate(m.h100(), 2)), 2: "no topology"}
    assert Path(rule["path"]).name == "wsync"
    for status, text in wanted.items():
        path = machine(f"input{status}", text)
        done = run([str(bin_folder / "wsync"), *rule["args"], path], tmp_path, PATH="/usr/bin:/bin")
        assert done.returncode == status, done.stderr
        # The detector shows the beginning of what stands on stdout.
        assert done.stdout.startswith("TOPO ")
    warn = machine("warn", m.topo_m(m.h100_vm()))
    done = run([str(bin_folder / "wsync"), *rule["args"], warn], tmp_path, PATH="/usr/bin:/bin")
    assert (done.returncode, done.stdout[:8]) == (0, "TOPO OK ")


def test_what_matters_fits_into_the_detectors_message(tmp_path, bin_folder, machine):
    config = json.loads((FOLDER / "node_problem_detector.json").read_text())
    path = machine("faulty", m.system_xml(m.isolate(m.gb200(), 1)))
    done = run([str(bin_folder / "wsync"), *config["rules"][0]["args"], path], tmp_path, PATH="/usr/bin:/bin")
    shown = done.stdout[: config["pluginConfig"]["max_output_length"]]
    assert "GPU1" in shown
    assert "nvlink.gpu-isolated" in shown


# ---- Kubernetes


def documents():
    yaml = pytest.importorskip("yaml")
    return {d["kind"]: d for d in yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())}


def container(document):
    (found,) = document["spec"]["template"]["spec"]["containers"]
    return found


def test_the_daemon_set_writes_metrics_of_its_node_again_and_again(tmp_path, bin_folder, machine):
    document = documents()["DaemonSet"]
    assert document["spec"]["selector"]["matchLabels"] == document["spec"]["template"]["metadata"]["labels"]
    box = container(document)
    mount = box["volumeMounts"][0]
    volumes = {v["name"] for v in document["spec"]["template"]["spec"]["volumes"]}
    assert mount["name"] in volumes
    (script,) = box["args"]
    assert mount["mountPath"] in script
    textfile = tmp_path / "textfile"
    textfile.mkdir()
    put(bin_folder / "sleep", 'echo "$1" >> slept; test $(wc -l < slept) -lt 2 || kill $PPID')
    faulty = machine("faulty", m.topo_m(m.isolate(m.h100(), 2)))
    command = [*box["command"], script.replace(mount["mountPath"], str(textfile))]
    env = {"PATH": f"{bin_folder}:/usr/bin:/bin", "NODE_NAME": "node9", "WSYNC_TOPO_INPUTS": faulty}
    done = run(command, tmp_path, **env)
    assert (tmp_path / "slept").read_text().split() == ["300", "300"], done.stderr
    assert 'wsync_topo_verdict{host="node9"} 2' in (textfile / "wsync_topo.prom").read_text()


def test_the_job_fails_on_a_fault_and_where_nothing_can_be_told(tmp_path, bin_folder, machine):
    document = documents()["Job"]
    assert document["spec"]["backoffLimit"] == 0
    assert document["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    command = container(document)["command"]
    wanted = {
        m.topo_m(m.h100()): 0,
        m.topo_m(m.h100_vm()): 0,
        m.topo_m(m.isolate(m.h100(), 2)): 1,
        "no topology": 1,
    }
    for i, (text, status) in enumerate(wanted.items()):
        done = run([*command, machine(f"input{i}", text)], tmp_path, PATH=f"{bin_folder}:/usr/bin:/bin")
        assert done.returncode == status, done.stderr
