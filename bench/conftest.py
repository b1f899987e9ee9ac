"""What every record of ``pytest bench/`` says about the machine it was measured on, and what it leaves out."""

from typing import Any

import pytest

from wsync.bench.machine import describe_machine, package_versions

_PRIVATE = ("node", "python_compiler", "python_build")
"""The host's name, and how its Python was built."""


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Processor, instruction sets, memory, and the versions of what was measured; no names of hosts."""
    for key in _PRIVATE:
        machine_info.pop(key, None)
    machine_info["wsync_machine"] = describe_machine()
    machine_info["wsync_versions"] = package_versions()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Statistics of the rounds, without the rounds; the commit, without the names of folder and branch."""
    for key in ("project", "branch"):
        output_json["commit_info"].pop(key, None)
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
