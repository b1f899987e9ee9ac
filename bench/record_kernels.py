"""Writes the committed record of the CPU kernels and of delta: ``python bench/record_kernels.py RECORD``.

The record holds the machine, the versions and, for each operation, its rate, that of memcpy in the same run, their
ratio, the bar of one core and whether the results were checked.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
FIGURES = ("gbps", "memcpy_gbps", "ratio_to_memcpy", "bar", "correct")
HERE = Path(__file__).resolve().parent


def measured() -> dict[str, Any]:
    """What pytest-benchmark says of a run of the kernels' benchmarks. Raises CalledProcessError if one fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.json"
        tests = [str(HERE / name) for name in ("test_kernels.py", "test_delta.py")]
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *tests, "--benchmark-only", f"--benchmark-json={path}"], check=True
        )
        found: dict[str, Any] = json.loads(path.read_text())
        return found


def record_of(run: dict[str, Any]) -> dict[str, Any]:
    """The record: rows in the order of the benchmarks."""
    rows = []
    for benchmark in run["benchmarks"]:
        info = benchmark["extra_info"]
        name, _, case = benchmark["name"].removeprefix("test_").partition("[")
        words = case.rstrip("]").split("-")
        (cores,) = (word for word in words if word in ("one_core", "all_cores"))
        words.remove(cores)
        if name == "delta":
            name = f"delta_{words.pop(0)}"
        row = {"operation": name, "case": "-".join(words), "cores": cores.partition("_")[0]}
        rows.append(row | {key: info[key] for key in FIGURES if key in info})
    machine = run["machine_info"]
    return {
        "format_version": FORMAT_VERSION,
        "command": "python bench/record_kernels.py",
        "started_utc": run["datetime"],
        "machine": machine["wsync_machine"],
        "versions": machine["wsync_versions"],
        "isa": run["benchmarks"][0]["extra_info"]["isa"],
        "unit": "GB/s of bf16 bytes read (dequantise: written; delta: of the new version), fastest of 7 rounds",
        "verdict": "ok" if all(row["correct"] for row in rows) else "wrong",
        "rows": rows,
    }


def main() -> None:
    """Measure, and write the record to the path that the command line gives."""
    record = record_of(measured())
    Path(sys.argv[1]).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
