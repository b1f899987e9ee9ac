"""Runs of `wsync bench` in a temporary folder of their own, and a look at what they leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMMAND = [sys.executable, "-m", "wsync.cli.main", "bench"]


def environment(tmp_path: Path) -> dict[str, str]:
    temporary = tmp_path / "temporary"
    temporary.mkdir(exist_ok=True)
    return {**os.environ, "TMPDIR": str(temporary), "NO_COLOR": "1"}


def run_bench(tmp_path: Path, *args: str, timeout_s: float = 220) -> subprocess.CompletedProcess[str]:
    """Run the command and check that nothing of it is left."""
    process = subprocess.Popen(
        [*COMMAND, *args], env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    out, err = process.communicate(timeout=timeout_s)
    check_nothing_is_left(tmp_path, process.pid)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def check_nothing_is_left(tmp_path: Path, pid: int) -> None:
    """No process that was started there (by its arguments, or by the log that it writes to), no file, no memory."""
    marker = str(tmp_path / "temporary")
    for path in Path("/proc").glob("[0-9]*"):
        try:
            found = marker.encode() in (path / "cmdline").read_bytes() or marker in os.readlink(path / "fd" / "1")
        except OSError:
            continue
        assert not found, f"process {path.name} is still there"
    # torch makes this folder, which all programs share, when it is imported.
    left = [path.name for path in (tmp_path / "temporary").iterdir() if not path.name.startswith("torchinductor_")]
    assert left == []
    assert list(Path("/dev/shm").glob(f"wsync-bench-{pid}-*")) == []
