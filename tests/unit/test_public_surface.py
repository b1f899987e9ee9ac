"""What users see is frozen: a change of it is made here on purpose."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import wsync

EXPORTED = [
    "Cluster",
    "CommitError",
    "ConfigError",
    "ConnectError",
    "DeadlineError",
    "DigestError",
    "DtypeMismatchError",
    "FormatVersionError",
    "ManifestError",
    "MissingTensorError",
    "NonFiniteError",
    "PeerLostError",
    "Plan",
    "PlanMismatchError",
    "PlanOptions",
    "Publication",
    "PublishReport",
    "RecipeError",
    "RecordError",
    "ShapeMismatchError",
    "Sink",
    "Source",
    "StateError",
    "Ticket",
    "TransportError",
    "UnknownTensorError",
    "WireError",
    "WsyncError",
    "__version__",
    "dequantize",
    "make_plan",
    "new_key_file",
    "quantize",
]


def parameters(function):
    return [
        f"{'*' if p.kind is p.KEYWORD_ONLY else ''}{p.name}" + ("" if p.default is p.empty else f"={p.default!r}")
        for p in inspect.signature(function).parameters.values()
        if p.name != "self"
    ]


def public_members(cls):
    return sorted(n for n in vars(cls) if not n.startswith("_"))


def test_the_exported_names_are_these():
    assert sorted(wsync.__all__) == EXPORTED
    for name in EXPORTED:
        assert getattr(wsync, name) is not None


def test_source_has_this_surface():
    assert public_members(wsync.Source) == ["close", "publish", "replicas"]
    assert parameters(wsync.Source) == [
        "model_or_tensors",
        "*store",
        "*key_file=None",
        "*rank=None",
        "*world_size=None",
        "*transport='auto'",
        "*name_map=None",
        "*recipe=None",
        "*cluster=None",
        "*options=None",
        "*num_threads=None",
        "*join_deadline_s=60.0",
        "*peer_timeout_s=10.0",
        "*write_check='counts'",
        "*delta=False",
        "*delta_anchor_every=50",
    ]
    assert parameters(wsync.Source.publish) == ["version", "*min_replicas=None", "*deadline_s=60.0"]


def test_publication_and_report_have_this_surface():
    members = {"released", "over", "replicas", "dropped", "wait_released", "wait_committed", "wait_replica"}
    assert members <= set(public_members(wsync.Publication))
    assert parameters(wsync.Publication.wait_replica) == ["replica", "deadline_s=None"]
    assert set(wsync.PublishReport.__struct_fields__) == {
        "version",
        "committed",
        "dropped",
        "replicas",
        "seconds",
        "logical_bytes",
        "wire_bytes",
        "sink_bytes",
        "staging_bytes",
        "ranks",
        "sent",
        "is_delta",
    }


def test_sink_has_this_surface():
    assert public_members(wsync.Sink) == [
        "bytes_installed",
        "close",
        "commit",
        "last_error",
        "last_pause_s",
        "last_stamps",
        "poll",
        "prepare",
        "prepared",
        "recording",
        "start",
        "state",
        "version",
        "wait",
    ]
    assert parameters(wsync.Sink.wait) == ["version", "deadline_s=10.0"]
    assert parameters(wsync.Sink) == [
        "engine_model",
        "load_weights=None",
        "*store",
        "*key_file=None",
        "*replica='engine-0'",
        "*rank=0",
        "*world_size=1",
        "*mode='staged'",
        "*recipes=None",
        "*scale_groups=None",
        "*transforms=None",
        "*layouts=None",
        "*allow_missing=()",
        "*num_threads=None",
        "*join_deadline_s=60.0",
        "*peer_timeout_s=10.0",
    ]
    assert set(wsync.Ticket.__struct_fields__) == {"version", "incarnation", "seq", "deadline_s"}


def test_functions_have_these_signatures():
    assert parameters(wsync.quantize)[:2] == ["weight", "recipe"]
    assert [p.split("=")[0] for p in parameters(wsync.dequantize)[:3]] == ["parts", "recipe", "dtype"]
    assert [p.split("=")[0] for p in parameters(wsync.make_plan)] == ["source", "sink", "cluster", "options"]


def test_every_error_is_a_leaf_of_the_documented_tree():
    docs = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
    for name in EXPORTED:
        value = getattr(wsync, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert name in wsync.errors.__doc__
            assert name in docs or name == "WireError"


def test_importing_the_package_loads_no_torch():
    code = "import sys, wsync; sys.exit('torch' in sys.modules or 'zmq' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_tests_run_against_the_installed_package_where_they_should():
    if os.environ.get("WSYNC_EXPECT_INSTALLED"):
        assert "site-packages" in wsync.__file__
    else:
        assert Path(wsync.__file__).is_file()
