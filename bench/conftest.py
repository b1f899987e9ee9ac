"""What every record of ``pytest bench/`` says about the machine it was measured on."""

from typing import Any

import pytest

from wsync.bench.machine import describe_machine, package_versions


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Processor, instruction sets, memory, and the versions of what was measured."""
    machine_info["wsync_machine"] = describe_machine()
    machine_info["wsync_versions"] = package_versions()
