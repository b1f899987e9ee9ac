"""What ``wsync doctor`` says, also about machines that are not well."""

import json
import sys

import pytest

from wsync.cli import doctor, probes
from wsync.cli.main import main
from wsync.cli.probes import BROKEN, FOUND, MISSING, Finding, in_child, package_probe

NAMES = [
    "python",
    "wsync",
    "cpu",
    "memory",
    "/dev/shm",
    "torch",
    "CUDA driver",
    "wsync CUDA library",
    "nvcc",
    "NCCL",
    "MPI",
    "triton",
    "CuPy",
    "vLLM",
    "NIXL",
    "transformers",
    "safetensors",
    "nvidia-ml-py",
    "matplotlib",
]


def test_json_has_a_finding_for_every_feature_and_says_how_to_get_what_is_missing(capsys):
    status = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"format_version", "wsync", "ok", "findings"}
    assert [finding["name"] for finding in report["findings"]] == NAMES
    for finding in report["findings"]:
        assert set(finding) == {"name", "status", "version", "detail", "needed_for", "get_it", "required"}
        assert finding["status"] in (FOUND, MISSING, BROKEN)
        assert finding["needed_for"]
        assert finding["status"] == FOUND or finding["get_it"]
    assert report["ok"] is True
    assert status == 0


def test_a_missing_core_requirement_is_status_one_and_an_optional_one_is_not(monkeypatch, capsys):
    optional = Finding("gadget", MISSING, None, "not there", "fun", "pip install gadget")
    core = Finding("engine", BROKEN, None, "does not start", "everything", "buy one", required=True)
    monkeypatch.setattr(doctor, "PROBES", (lambda: optional,))
    assert main(["doctor"]) == 0
    monkeypatch.setattr(doctor, "PROBES", (lambda: optional, lambda: core))
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "pip install gadget" in text
    assert "wsync does not work here: engine" in text


def test_table_on_a_pipe_has_no_colour_codes(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "PROBES", (lambda: Finding("a", FOUND, "1", "[bold]here[/bold]", "b"),))
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "[bold]here[/bold]" in text


def test_probe_that_crashes_hangs_or_raises_is_an_answer(monkeypatch):
    assert in_child("report({'x': 1})") == {"x": 1}
    assert in_child("raise OSError('no such library')") == {"error": "no such library"}
    assert "signal 11" in in_child("import os; os.kill(os.getpid(), 11)")["error"]
    assert "status" in in_child("import os; os._exit(3)")["error"]
    monkeypatch.setattr(probes, "CHILD_DEADLINE_S", 0.5)
    assert in_child("import time; time.sleep(60)") == {"error": "no answer within 0.5 s"}


def test_nccl_that_was_named_but_cannot_be_opened_is_broken_not_missing(monkeypatch):
    monkeypatch.setenv("WSYNC_NCCL_LIBRARY", "/nowhere/libnccl.so.2")
    finding = probes.probe_nccl()
    assert finding.status == BROKEN
    assert "/nowhere/libnccl.so.2" in finding.detail


def test_small_shared_memory_comes_with_a_remedy(monkeypatch):
    monkeypatch.setattr(probes, "SHM_BYTES_WANTED", 1 << 60)
    assert "shm-size" in probes.probe_shm().get_it


def test_package_is_found_under_any_of_its_names_without_importing_it():
    finding = package_probe("X", ("surely-not-installed", "pytest"), "tests", "pip install x")()
    assert (finding.status, finding.version) == (FOUND, pytest.__version__)
    missing = package_probe("X", ("surely-not-installed",), "tests", "pip install x")()
    assert (missing.status, missing.get_it) == (MISSING, "pip install x")


def test_python_that_is_too_old_is_broken(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 0))
    assert probes.probe_python().status == BROKEN
