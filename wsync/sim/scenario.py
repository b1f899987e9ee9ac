"""A scenario: everything that a simulation needs, from a preset or from files.

The file is JSON, versioned and strict. Its paths are relative to its own folder:

    {"format_version": 1, "source": "source.json", "sink": "sink.json", "cluster": "cluster.json",
     "plan_options": {"bucket_bytes": 16777216}, "sim_options": {"install": "in_place"}}

With ``"plan": "plan.bin"`` that plan is simulated; without, one is made.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from wsync.errors import ConfigError, FormatVersionError, ManifestError, WireError
from wsync.plan import Plan, decode_plan, make_plan
from wsync.plan.types import PlanOptions
from wsync.sim.options import SimOptions, check_options, nearest
from wsync.sim.presets import PRESETS, find_preset
from wsync.spec.cluster import Cluster, load_cluster
from wsync.spec.files import read_file
from wsync.spec.manifest import SinkManifest, SourceManifest

SCENARIO_VERSION = 1
MAX_FILE_BYTES = 16 << 20
MAX_PLAN_BYTES = 1 << 30


class ScenarioFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a scenario file says.

    Attributes:
        format_version: of the file.
        source, sink: paths of manifests that `wsync describe` writes.
        cluster: path of a cluster file.
        name: for reports; the file's name by default.
        plan: path of a plan that was made from these; None to make one.
        plan_options, sim_options: as in Python.
    """

    format_version: int
    source: str
    sink: str
    cluster: str
    name: str = ""
    plan: str | None = None
    plan_options: PlanOptions = PlanOptions()
    sim_options: SimOptions = SimOptions()


@dataclass
class Scenario:
    """A scenario, read.

    Attributes:
        name: for reports.
        source, sink, cluster: of the plan.
        plan_options, options: of the plan and of the simulation.
        text: lines that say what was assumed.
        plan: if one was given.
        published_s: what a peer has published, or None.
    """

    name: str
    source: SourceManifest
    sink: SinkManifest
    cluster: Cluster
    plan_options: PlanOptions
    options: SimOptions
    text: tuple[str, ...] = ()
    plan: Plan | None = None
    published_s: float | None = None

    def drop_replicas(self, names: tuple[str, ...]) -> None:
        """Leave replicas out, before a plan is made.

        Raises:
            ConfigError: no such replica, no replica left, or a plan that has them is there already.
        """
        known = list(dict.fromkeys(rank.replica for rank in self.sink.ranks))
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"there is no replica {name!r} to leave out; there are {', '.join(known[:8])}",
                    hint=nearest(name, known),
                )
        left = tuple(rank for rank in self.sink.ranks if rank.replica not in names)
        if not left:
            raise ConfigError(f"without {', '.join(names)} there are 0 of {len(known)} replicas left")
        if names and self.plan is not None:
            raise ConfigError(f"the plan that was given has the replicas {', '.join(names)}: make one without them")
        self.sink = SinkManifest(left)

    def make_plan(self) -> tuple[Plan, float | None]:
        """The plan, and how many seconds it took to make it (None if it was given)."""
        if self.plan is not None:
            return self.plan, None
        begin = time.perf_counter()
        plan = make_plan(self.options.source_of(self.source), self.sink, self.cluster, self.plan_options)
        return plan, time.perf_counter() - begin


def open_scenario(name_or_path: str) -> Scenario:
    """A preset by its name, or a scenario file by its path.

    Raises:
        ConfigError: neither; or the file, or one that it names, is truncated, not one, or says what cannot be.
        FormatVersionError: a file is of another version.
    """
    if name_or_path in PRESETS or not _is_path(name_or_path):
        preset = find_preset(name_or_path)
        source, sink, cluster, plan_options = preset.build()
        published_s = preset.published.seconds if preset.published else None
        return Scenario(
            preset.name, source, sink, cluster, plan_options, preset.sim, preset.assumptions, None, published_s
        )
    return _load(Path(name_or_path))


def _is_path(text: str) -> bool:
    if "/" in text or text.endswith(".json"):
        return True
    try:
        return Path(text).exists()
    except OSError:  # longer than any name may be
        return False


def _load(path: Path) -> Scenario:
    from wsync.spec.manifest_file import load_manifest

    found = decode_scenario(read_file(path, MAX_FILE_BYTES, "scenario"), f"scenario {str(path)!r}")
    folder = path.parent
    source, sink = load_manifest(folder / found.source), load_manifest(folder / found.sink)
    if not isinstance(source, SourceManifest):
        raise ManifestError(f"{found.source} of scenario {str(path)!r} describes engines, but stands for the trainer")
    if not isinstance(sink, SinkManifest):
        raise ManifestError(f"{found.sink} of scenario {str(path)!r} describes a trainer, but stands for the engines")
    cluster = load_cluster(folder / found.cluster)
    plan = None if found.plan is None else _load_plan(folder / found.plan)
    name = found.name or path.stem
    return Scenario(name, source, sink, cluster, found.plan_options, found.sim_options, (), plan)


def _load_plan(path: Path) -> Plan:
    data = read_file(path, MAX_PLAN_BYTES, "plan")
    try:
        return decode_plan(data)
    except FormatVersionError:
        raise
    except WireError as e:
        raise ConfigError(f"plan {str(path)!r} is not a plan: {e.message}") from e


class _Version(msgspec.Struct):
    format_version: int


def decode_scenario(data: bytes, name: str = "scenario") -> ScenarioFile:
    """Read a scenario from JSON, strictly.

    Args:
        data: the file's bytes.
        name: of the file, for messages.

    Raises:
        ConfigError: truncated, not JSON, unknown or missing fields, wrong types, impossible values.
        FormatVersionError: written for another version of wsync.
    """
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{name} has {len(data)} bytes, allowed are {MAX_FILE_BYTES}")
    try:
        # The version goes first: a newer file's unknown fields should read as "newer", not as a typing error.
        version = msgspec.json.decode(data, type=_Version).format_version
        if version != SCENARIO_VERSION:
            raise FormatVersionError(f"{name} has format version {version}, this wsync reads {SCENARIO_VERSION}")
        found = msgspec.json.decode(data, type=ScenarioFile)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{name} ({len(data)} bytes) is not a scenario of version {SCENARIO_VERSION}: {e}") from e
    check_options(found.sim_options)
    return found
