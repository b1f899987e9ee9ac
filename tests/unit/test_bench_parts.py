"""The pieces of the benchmark that can be checked without processes."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from wsync.bench import checkpoint
from wsync.bench.e2e import choose_workdir
from wsync.bench.events import WARM_UP, Began, EventReader, EventWriter, Repeated, Started, Step, Verified
from wsync.bench.limit import MemcpyRate, limit_seconds, measure_memcpy
from wsync.bench.machine import filesystem_of
from wsync.bench.memory import PeakMemory, owned_bytes
from wsync.bench.options import (
    PRESETS,
    BenchOptions,
    check_counts,
    load_model_config,
    parse_baselines,
    parse_fault,
    parse_names,
)
from wsync.bench.quantise import encode, quantise_block128
from wsync.bench.result import Collector
from wsync.bench.spans import ASSEMBLE, INSTALL, OTHER, WIRE, Span, attribute
from wsync.bench.streams import pack_plan, used_bytes
from wsync.bench.trace import trace_events
from wsync.errors import ConfigError, RecipeError
from wsync.spec.recipes import PartSpec

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors"
RATE = MemcpyRate(10.0, 2, "libc memcpy", {})


def options(**changes: object) -> BenchOptions:
    fields = {
        "model": PRESETS["tiny"],
        "model_name": "tiny",
        "num_trainers": 1,
        "num_engines": 2,
        "recipes": ("bf16",),
        "baselines": ("disk",),
        "repeats": 1,
        "transport": "shm",
        "quantise_on": "trainer",
        "disk_dir": "/tmp",
        "tmpfs_dir": "/tmp",
        "store_dir": "/tmp",
        "deadline_s": 1.0,
    }
    return BenchOptions(**{**fields, **changes})


# The quantiser of the baselines.


@pytest.mark.skipif(not VECTORS.is_dir(), reason="the reference vectors are not beside the repository")
@pytest.mark.parametrize(
    ("repo", "entry_id", "power_of_two"),
    [
        ("deepseek-ai/DeepGEMM", "per_block_cast_to_fp8.ue8m0=True", True),
        ("vllm-project/vllm", "per_block_cast_to_fp8.f32scale", False),
    ],
)
@pytest.mark.parametrize("source", ["rand_bf16_128x256", "edge_bf16_130x140"])
def test_quantiser_of_the_baselines_equals_the_published_quantisers(repo, entry_id, power_of_two, source):
    index = json.loads((VECTORS / "index.json").read_text())
    blobs = np.load(VECTORS / "vectors.npz")
    entry = next(
        e for e in index["entries"] if (e["repo"], e["id"], e["input"], e["mode"]) == (repo, entry_id, source, "cpu")
    )
    weight = torch.from_numpy(blobs[index["inputs"][source]["blob"]].copy()).view(torch.bfloat16)
    encoded, scale = quantise_block128(weight, power_of_two)
    outputs = entry["outputs"]
    np.testing.assert_array_equal(encoded.view(torch.uint8).numpy(), blobs[outputs["q"]["blob"]])
    np.testing.assert_array_equal(scale.numpy(), blobs[outputs["scale"]["blob"]])


def test_quantiser_of_the_baselines_pads_partial_blocks_with_nothing_that_shows():
    weight = torch.randn(200, 130).to(torch.bfloat16)
    encoded, scale = quantise_block128(weight, power_of_two=True)
    assert encoded.shape == (200, 130)
    assert scale.shape == (2, 2)
    corner, corner_scale = quantise_block128(weight[128:, 128:].contiguous(), power_of_two=True)
    assert torch.equal(encoded[128:, 128:].view(torch.uint8), corner.view(torch.uint8))
    assert scale[1, 1] == corner_scale[0, 0]


def test_quantiser_of_the_baselines_refuses_recipes_that_it_does_not_know():
    with pytest.raises(RecipeError, match="nvfp4"):
        encode("w", torch.zeros(2, 2), "nvfp4")


# Phases.


def test_each_moment_counts_for_one_phase_and_the_phases_sum_to_the_whole():
    spans = [
        Span("pack", ASSEMBLE, 1.0, 4.0),
        Span("receive", WIRE, 0.0, 6.0),
        Span("install", INSTALL, 3.0, 5.0),
        Span("note", "", 0.0, 100.0),
    ]
    seconds = attribute(spans, 0.0, 8.0)
    assert seconds == {ASSEMBLE: 3.0, INSTALL: 1.0, WIRE: 2.0, OTHER: 2.0}


def test_spans_outside_the_repeat_are_cut_off():
    seconds = attribute([Span("pack", ASSEMBLE, -5.0, 1.0), Span("pack", ASSEMBLE, 9.0, 20.0)], 0.0, 10.0)
    assert seconds[ASSEMBLE] == 2.0
    assert seconds[OTHER] == 8.0


# The limit.


def test_limit_is_the_mean_of_both_sides_over_the_memcpy_rate():
    assert limit_seconds(12_000_000_000, 8_000_000_000, RATE) == pytest.approx(1.0)


def test_memcpy_rate_is_measured_on_every_core():
    rate = measure_memcpy(rounds=1, total_bytes=1 << 20)
    assert rate.gbps > 0.05
    assert rate.copier in rate.rounds_gbps
    assert rate.gbps == max(rate.rounds_gbps[rate.copier])


def test_peak_memory_sees_what_was_freed_again():
    before = owned_bytes()
    with PeakMemory() as memory:
        block = bytearray(b"x") * (64 << 20)
        time.sleep(0.2)
        del block
    if before == 0:
        pytest.skip("this kernel has no smaps_rollup")
    assert memory.peak_bytes - before > 32 << 20


# Buckets of the baseline.


def test_buckets_hold_every_part_once_without_overlap_and_large_parts_get_their_own():
    sizes = [10, 300, 5000, 256, 1, 4000]
    parts = [PartSpec(f"t{i}", "weight", "uint8", (size,)) for i, size in enumerate(sizes)]
    buckets = pack_plan(parts, bucket_bytes=1024)
    slots = [slot for bucket in buckets for slot in bucket]
    assert [slot.part for slot in slots] == parts
    for bucket in buckets:
        assert len(bucket) == 1 or used_bytes(bucket) <= 1024
        for left, right in itertools.pairwise(bucket):
            assert left.offset + left.part.nbytes <= right.offset
            assert right.offset % 256 == 0


# The disk.


def test_a_checkpoint_that_does_not_fit_is_refused_with_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"needs 5000 bytes in .*, but 1000 bytes are free"):
        checkpoint.write_checkpoint(tmp_path / "a.safetensors", {"w": torch.zeros(4)}, 5000)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_writing_is_named_and_leaves_no_file(tmp_path, monkeypatch):
    def fill_up(state, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fill_up)
    with pytest.raises(ConfigError, match="needs 16 bytes"):
        checkpoint.write_checkpoint(tmp_path / "a.safetensors", {"w": torch.zeros(4)}, 16)
    assert list(tmp_path.iterdir()) == []


def test_workdir_must_be_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="not a folder"):
        choose_workdir(tmp_path / "nothing")
    assert choose_workdir(tmp_path) == tmp_path


@pytest.mark.skipif(not Path("/proc/self/mounts").exists(), reason="needs /proc")
def test_filesystem_is_that_of_the_innermost_mount():
    assert filesystem_of(Path("/proc/self"))[0] == "proc"


# Options.


def test_lists_keep_the_order_of_the_table():
    assert parse_names("b,a", ("a", "b", "c"), "letter") == ("a", "b")
    assert parse_baselines("none") == ()
    assert parse_baselines("buckets,disk") == ("disk", "buckets")


@pytest.mark.parametrize("text", ["", "fp9", "disk,fp9"])
def test_unknown_names_are_refused(text):
    with pytest.raises(ConfigError, match="unknown"):
        parse_baselines(text)


@pytest.mark.parametrize("counts", [(0, 2, 1, 1.0), (2, 0, 1, 1.0), (2, 2, 0, 1.0), (2, 2, 1, 0.0)])
def test_counts_must_be_positive(counts):
    with pytest.raises(ConfigError, match="is 0"):
        check_counts(*counts)


@pytest.mark.parametrize("text", ["boom", "kill:engine:x:wsync", "kill:engine:0:nothing", "burn:engine:0:wsync"])
def test_faults_are_checked(text):
    with pytest.raises(ConfigError, match="fault"):
        parse_fault(text)


@pytest.mark.parametrize("content", ["{", "[1]", "{}", '{"model_type": 3}'])
def test_model_configurations_are_checked(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="config"):
        load_model_config("tiny", str(path))


# Events and results.


def test_events_survive_the_pipe_in_any_pieces(tmp_path):
    path = tmp_path / "pipe"
    sent = [Started(7), Began(Step("bf16", "wsync", 0))]
    with path.open("wb") as file:
        writer = EventWriter(file.fileno())
        for event in sent:
            writer.send(event)
    reader = EventReader()
    data = path.read_bytes()
    assert [event for byte in data for event in reader.feed(bytes([byte]))] == sent


def collected(difference: str = "", verified: tuple[int, ...] = (1, 2)) -> Collector:
    collector = Collector(options())
    collector.add(0, Started(1_000_000))
    for row, seconds in (("wsync", 0.5), ("disk", 2.0)):
        for repeat in (WARM_UP, 0):
            step = Step("bf16", row, repeat)
            spans = [Span("pack", ASSEMBLE, 10.0, 10.25)]
            remote = {"engine/1": [Span("install", INSTALL, 10.3, 10.4)]}
            collector.add(0, Repeated(step, 1, 10.0, 10.3, 10.26, 0.0, 500, spans, remote))
            for rank in (1, 2):
                collector.add(rank, Repeated(step, 1, 9.9, 10.0 + seconds * rank / 2, 0.0, 0.1 * rank, 0, []))
            for rank in verified:
                collector.add(rank, Verified(step, 100, difference if (rank, row) == (2, "disk") else ""))
    return collector


def test_a_row_lasts_from_the_publish_to_the_last_engine_and_stalls_until_the_release():
    rows = {row.row: row for row in collected().rows(RATE)}
    ours = rows["wsync"]
    assert ours.seconds.p50 == pytest.approx(0.5)
    assert ours.stall_s.p50 == pytest.approx(0.26)
    assert ours.pause_s.p50 == pytest.approx(0.2)
    assert ours.assemble_s.p50 == pytest.approx(0.25)
    assert ours.install_s.p50 == pytest.approx(0.1)
    assert ours.logical_gbps == pytest.approx(0.002)
    assert rows["disk"].ratio == pytest.approx(4.0)
    assert ours.verdict == rows["disk"].verdict == "ok"


def test_one_wrong_byte_on_one_engine_spoils_the_verdict_of_its_row_only():
    rows = {row.row: row for row in collected("w differs in 1 of 100 bytes").rows(RATE)}
    assert rows["wsync"].verdict == "ok"
    assert "w differs" in rows["disk"].verdict
    assert "engine 1" in rows["disk"].verdict


def test_an_engine_that_was_not_verified_is_not_ok():
    assert "1 of 2" in collected(verified=(1,)).rows(RATE)[0].verdict


def test_trace_has_a_track_for_each_process_and_complete_events():
    collector = collected()
    trace = trace_events(options(), collector.spans())
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"]
    assert names == ["trainer 0", "engine 0", "engine 1"]
    complete = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert {e["name"] for e in complete} == {"pack", "install"}
    assert all(e["ts"] >= 0 and e["dur"] >= 0 for e in complete)
    assert next(e for e in complete if e["name"] == "install")["pid"] == 2


def test_options_and_results_need_no_torch():
    code = "import sys, wsync.bench.result, wsync.bench.launch, wsync.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
