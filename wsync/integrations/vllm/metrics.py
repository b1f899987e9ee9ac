"""Prometheus metrics in a vLLM server's own ``/metrics``.

The numbers arise in worker processes and are asked for in the API server. With one API server, workers keep a small
file each in a private directory, whose path they inherit, and a collector in the API server reads those of its own
descendants. With several (vLLM then sets ``PROMETHEUS_MULTIPROC_DIR``), workers write prometheus_client's own files.

    wsync_version{replica,rank}                   the version that the rank serves; NaN while it is poisoned
    wsync_poisoned{replica,rank}                  1 while its weights are of no known version
    wsync_commits_total{replica,rank}             versions committed
    wsync_installed_bytes_total{replica,rank}     bytes written into live weights
    wsync_pause_seconds{replica,rank}             the last commit on this rank: decision, install, confirmation
    wsync_phase_seconds{replica,rank,phase}       each phase of the last version
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

DIRECTORY = "WSYNC_METRICS_DIR"
"""Environment variable: where workers leave their numbers."""
_PREFIX = "wsync-metrics-"
_MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"
_MAX_BYTES = 1 << 16
_MAX_DEPTH = 64

_HELP = {
    "wsync_version": "Version of the weights that the rank serves.",
    "wsync_poisoned": "Whether the weights are of no known version: the rank must not serve.",
    "wsync_commits": "Versions that the rank committed.",
    "wsync_installed_bytes": "Bytes written into live weights.",
    "wsync_pause_seconds": "The last commit on this rank: decision, install, confirmation.",
    "wsync_phase_seconds": "Phases of the last version on this rank.",
}
_COUNTERS = ("wsync_commits", "wsync_installed_bytes")


class RankNumbers(msgspec.Struct, forbid_unknown_fields=True):
    """What one engine rank counts.

    Attributes:
        pid, started: the process, and its start in clock ticks since boot: a number may be used again.
        replica, rank: labels.
        version: that it serves, or None.
        poisoned: its weights are of no known version.
        commits, installed_bytes: totals of this Sink.
        pause_s, phases_s: of the last version.
    """

    pid: int
    started: int
    replica: str
    rank: int
    version: int | None = None
    poisoned: bool = False
    commits: int = 0
    installed_bytes: int = 0
    pause_s: float = 0.0
    phases_s: dict[str, float] = {}

    def samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """Metric, labels and value of everything that is known."""
        labels = {"replica": self.replica, "rank": str(self.rank)}
        if self.version is not None or self.poisoned:
            yield "wsync_version", labels, math.nan if self.version is None else float(self.version)
        yield "wsync_poisoned", labels, float(self.poisoned)
        yield "wsync_commits", labels, float(self.commits)
        yield "wsync_installed_bytes", labels, float(self.installed_bytes)
        yield "wsync_pause_seconds", labels, self.pause_s
        for phase, seconds in sorted(self.phases_s.items()):
            yield "wsync_phase_seconds", {**labels, "phase": phase}, seconds


# ---- in a worker


class WorkerMetrics:
    """The numbers of one engine rank, brought to where the API server finds them.

    Args:
        replica, rank: labels.
    """

    def __init__(self, replica: str, rank: int) -> None:
        self._numbers = RankNumbers(os.getpid(), _parent_and_start(os.getpid())[1], replica, rank)
        self._file: Path | None = None
        self._values: _MultiprocessValues | None = None
        if os.environ.get(_MULTIPROCESS):
            self._values = _MultiprocessValues()
        elif os.environ.get(DIRECTORY):
            self._file = _open_directory(Path(os.environ[DIRECTORY])) / f"{os.getpid()}-{id(self):x}.json"
        self._write()

    def committed(self, sink: Any) -> None:
        """A `Sink` has committed. Takes microseconds: the server may be paused."""
        numbers = self._numbers
        numbers.version, numbers.poisoned = sink.version, False
        numbers.commits += 1
        numbers.installed_bytes = int(sink.bytes_installed)
        numbers.pause_s = float(sink.last_pause_s)
        numbers.phases_s = {str(phase): float(seconds) for phase, seconds in sink.last_stamps.items()}
        self._write()

    def failed(self, sink: Any) -> None:
        """A `Sink` could not commit."""
        self._numbers.version, self._numbers.poisoned = sink.version, sink.state == "poisoned"
        self._write()

    def close(self) -> None:
        """The rank left its trainer."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # another worker's file is there, or everything went with the server
                self._file.unlink(missing_ok=True)
                self._file.parent.rmdir()

    def _write(self) -> None:
        if self._values is not None:
            self._values.set(self._numbers.samples())
        if self._file is not None:
            fresh = self._file.with_suffix(".tmp")
            try:
                fresh.write_bytes(msgspec.json.encode(self._numbers))
                os.replace(fresh, self._file)
            except OSError:
                self._file = None  # the directory went with its server


def _open_directory(path: Path) -> Path:
    """The server's directory, made by its first worker that joins a trainer, for this user alone.

    Servers that were killed left theirs behind: those are removed.

    Raises:
        OSError: it cannot be made, or is somebody else's.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
        for other in path.parent.glob(f"{_PREFIX}{_namespace()}-*"):
            owner = other.name.removeprefix(f"{_PREFIX}{_namespace()}-").split("-")[0]
            if owner.isdecimal() and not _parent_and_start(int(owner))[1]:
                shutil.rmtree(other, ignore_errors=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise PermissionError(f"{path} is not a directory that only this user can write to")
    return path


def _namespace() -> str:
    """In which process numbers count; containers may share a folder for temporary files."""
    try:
        return re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
    except OSError:
        return "0"


class _MultiprocessValues:
    """Values in prometheus_client's files, whether or not this process imported it before the directory was set."""

    def __init__(self) -> None:
        from prometheus_client import values

        # Files of our own: two maps of one file in one process would overwrite each other.
        make_kind: Any = values.MultiProcessValue
        self._kind = make_kind(lambda: f"{os.getpid()}wsync")
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], Any] = {}

    def set(self, samples: Iterable[tuple[str, dict[str, str], float]]) -> None:
        now = time.time()
        for name, labels, number in samples:
            key = (name, tuple(labels.items()))
            if key not in self._values:
                self._values[key] = self._new(name, labels)
            self._values[key].set(number, timestamp=now)

    def _new(self, name: str, labels: dict[str, str]) -> Any:
        names, given = tuple(labels), tuple(labels.values())
        if name in _COUNTERS:
            return self._kind("counter", name, f"{name}_total", names, given, _HELP[name])
        return self._kind("gauge", name, name, names, given, _HELP[name], multiprocess_mode="mostrecent")


# ---- in the API server


class _Collector:
    """Reads what the workers of this process left."""

    def describe(self) -> Iterable[Any]:
        """Nothing is known of the labels before a worker has joined."""
        return []

    def collect(self) -> Iterable[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        families: dict[str, Any] = {}
        for numbers in read_numbers(os.environ.get(DIRECTORY, "")):
            for name, labels, number in numbers.samples():
                if name not in families:
                    kind = CounterMetricFamily if name in _COUNTERS else GaugeMetricFamily
                    families[name] = kind(name, _HELP[name], labels=list(labels))
                families[name].add_metric(list(labels.values()), number)
        return families.values()


_serving = False


def serve_metrics() -> None:
    """Add the metrics to this process's registry, and give the workers that it starts a place to write to.

    Raises:
        ImportError: there is no prometheus_client.
    """
    global _serving
    if _serving:
        return
    from prometheus_client import REGISTRY

    if not os.environ.get(DIRECTORY):
        # Made by the first worker that has something to write: most processes that load plug-ins never do.
        name = f"{_PREFIX}{_namespace()}-{os.getpid()}-{secrets.token_hex(8)}"
        os.environ[DIRECTORY] = directory = os.path.join(tempfile.gettempdir(), name)
        atexit.register(_remove, directory, os.getpid())
    registry: Any = REGISTRY
    registry.register(_Collector())
    _serving = True


def _remove(directory: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(directory, ignore_errors=True)


def read_numbers(directory: str) -> list[RankNumbers]:
    """What living workers of this process left in ``directory``, by replica and rank."""
    found = []
    for path in Path(directory).glob("*.json") if directory else ():
        try:
            raw = path.read_bytes()
            numbers = msgspec.json.decode(raw, type=RankNumbers) if len(raw) <= _MAX_BYTES else None
        except (OSError, msgspec.MsgspecError):
            continue
        if numbers is not None and _is_ours(numbers.pid, numbers.started):
            found.append(numbers)
    return sorted(found, key=lambda n: (n.replica, n.rank))


def _is_ours(pid: int, started: int) -> bool:
    """Whether that very process lives, and this one started it or is it: servers may share an inherited directory."""
    if _parent_and_start(pid)[1] != started:
        return False
    for _ in range(_MAX_DEPTH):
        if pid == os.getpid():
            return True
        pid = _parent_and_start(pid)[0]
        if pid <= 1:
            return False
    return False


def _parent_and_start(pid: int) -> tuple[int, int]:
    """Parent and start time of a process; zeros where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0, 0
    fields = text[text.rindex(")") + 2 :].split()  # the name before it may hold blanks
    return int(fields[1]), int(fields[19])
