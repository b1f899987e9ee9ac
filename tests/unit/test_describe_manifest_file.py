"""Manifest files: what is saved is what is loaded, with what it shares; anything else is refused by name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import zlib
from pathlib import Path

import msgspec
import pytest
from describe_checks import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from wsync.describe import describe_sink, describe_source, load_manifest, load_sink, load_source, save_manifest
from wsync.describe.models.facts import Moe
from wsync.errors import ConfigError, FormatVersionError, ManifestError
from wsync.spec.manifest_file import MAX_BODY_BYTES, decode_manifest
from wsync.spec.serde import FORMAT_VERSION, digest_of
from wsync.testing.generators import random_scenario

MODEL = tiny(family="deepseek_v3", heads=4, kv_heads=4, layers=3, moe=Moe(8, 16, 16, 1, router_bias=True))
SOURCE = describe_source(MODEL, "fsdp=4,tp=2", [f"t{i // 4}" for i in range(8)])
SINK = describe_sink(MODEL, "tp=2,ep=2,replicas=3", [f"e{i // 2}" for i in range(6)], "fp8_channel")
BOTH = pytest.mark.parametrize("manifest", [SOURCE, SINK], ids=["source", "sink"])


def shared(manifest):
    """How many different objects a manifest's parts are."""
    if manifest is SOURCE or hasattr(manifest, "shards"):
        boxes = [box for shards in manifest.shards for held in shards for box in held]
        return len({id(s) for s in manifest.shards}), len({id(b) for b in boxes})
    copies = [copy for rank in manifest.ranks for copy in rank.copies]
    return len({id(r.copies) for r in manifest.ranks}), len({id(c.box) for c in copies})


@BOTH
def test_a_file_gives_the_manifest_that_was_saved_with_what_it_shares(tmp_path, manifest):
    save_manifest(manifest, tmp_path / "file")
    found = load_manifest(tmp_path / "file")
    assert found == manifest
    assert digest_of(found) == digest_of(manifest)
    assert shared(found) <= shared(manifest)
    save_manifest(found, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_any_manifests_survive(tmp_path_factory, seed):
    scenario = random_scenario(random.Random(seed))
    path = tmp_path_factory.mktemp("files") / "file"
    for manifest in (scenario.source, scenario.sink):
        save_manifest(manifest, path)
        assert load_manifest(path) == manifest


def test_a_file_of_one_side_is_none_of_the_other(tmp_path):
    save_manifest(SOURCE, tmp_path / "source")
    save_manifest(SINK, tmp_path / "sink")
    assert load_source(tmp_path / "source") == SOURCE
    assert load_sink(tmp_path / "sink") == SINK
    with pytest.raises(ManifestError, match="is the manifest of a sink, needed is that of a source"):
        load_source(tmp_path / "sink")
    with pytest.raises(ManifestError, match="is the manifest of a source, needed is that of a sink"):
        load_sink(tmp_path / "source")


@BOTH
def test_a_file_that_is_truncated_at_any_length_is_refused(tmp_path, manifest):
    save_manifest(manifest, tmp_path / "file")
    whole = (tmp_path / "file").read_bytes()
    line = whole.index(b"\n") + 1
    for length in (*range(line + 40), *range(line + 40, len(whole), 37), len(whole) - 1):
        with pytest.raises(ConfigError):
            decode_manifest(whole[:length])
    with pytest.raises(ManifestError, match=r"\(more\)"):
        decode_manifest(whole + b"\0")


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_changed_byte_is_refused_or_changes_nothing(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("files") / "file"
    manifest = data.draw(st.sampled_from([SOURCE, SINK]))
    save_manifest(manifest, path)
    raw = bytearray(path.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ConfigError, FormatVersionError):
        assert decode_manifest(bytes(raw)) == manifest


def file_of(body, **header):
    """A file with a true header but for what is given."""
    fields = {
        "wsync_manifest": "source",
        "format_version": FORMAT_VERSION,
        "nbytes": len(body),
        "digest": hashlib.blake2b(body, digest_size=16).hexdigest(),
    }
    return json.dumps({**fields, **header}).encode() + b"\n" + zlib.compress(body)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, FORMAT_VERSION - 1, 10**9])
def test_a_file_of_another_version_says_both(version):
    with pytest.raises(FormatVersionError, match=f"version {version}, this wsync reads version {FORMAT_VERSION}"):
        decode_manifest(file_of(b"", format_version=version, something_new=1))


@pytest.mark.parametrize(
    ("body", "header", "said"),
    [
        (b"", {"wsync_manifest": "cluster"}, "of the kind 'cluster', known are source and sink"),
        (b"", {"nbytes": MAX_BODY_BYTES + 1}, f"has {MAX_BODY_BYTES + 1} bytes, allowed are {MAX_BODY_BYTES}"),
        (b"", {"nbytes": -1}, "has -1 bytes"),
        (b"\0" * 1000, {"nbytes": 999}, r"has 1000 bytes \(more\), its header says 999"),
        (b"\0" * 1000, {"nbytes": 1001}, r"has 1000 bytes \(truncated\), its header says 1001"),
        (b"\0" * 1000, {"digest": "00"}, "its header says 00"),
        (b"\xc1", {}, "is not what it says it is"),
        (b"\x91" * 100_000, {}, "is not what it says it is"),
        (b"", {"unknown": 1}, "not a manifest of version"),
        (b"", {"nbytes": "many"}, "not a manifest of version"),
    ],
)
def test_an_absurd_file_is_refused(body, header, said):
    with pytest.raises(ConfigError, match=said):
        decode_manifest(file_of(body, **header))


def test_a_bomb_is_not_unpacked(tmp_path):
    bomb = zlib.compress(b"\0" * (64 << 20))
    raw = file_of(b"x").split(b"\n")[0] + b"\n" + bomb
    with pytest.raises(ManifestError, match=r"has 2 bytes \(more\), its header says 1"):
        decode_manifest(raw)


def body_of(manifest, path):
    save_manifest(manifest, path)
    return msgspec.msgpack.decode(zlib.decompress(path.read_bytes().split(b"\n", 1)[1]))


def test_what_refers_to_nothing_is_refused(tmp_path):
    body = body_of(SOURCE, tmp_path / "file")
    tables = {2: "boxes", 3: "held", 4: "shards"}
    for field in tables:
        changed = list(body)
        changed[field] = changed[field][:-1]
        with pytest.raises(ManifestError, match=r"refers to entry \d+ of a table of \d+"):
            decode_manifest(file_of(msgspec.msgpack.encode(changed)))
    changed = list(body)
    changed[5] = [-1, *changed[5][1:]]
    with pytest.raises(ManifestError, match="refers to entry -1"):
        decode_manifest(file_of(msgspec.msgpack.encode(changed)))
    changed[5] = body[5][1:]
    with pytest.raises(
        ManifestError, match=rf"has {len(SOURCE.tensors)} tensors, but shards of {len(SOURCE.tensors) - 1}"
    ):
        decode_manifest(file_of(msgspec.msgpack.encode(changed)))
    body = body_of(SINK, tmp_path / "file")
    body[4][0][3] = body[4][0][3][1:]
    with pytest.raises(ManifestError, match="has columns of copies of"):
        decode_manifest(file_of(msgspec.msgpack.encode(body), wsync_manifest="sink"))


# ---- where ranks keep what is synced


@BOTH
def test_a_file_that_says_nothing_of_memory_means_that_of_the_gpu(tmp_path, manifest):
    body = body_of(manifest, tmp_path / "file")
    infos = body[0] if manifest is SOURCE else [rank[3] for rank in body[5]]
    assert all(info.keys() == {"host", "pid"} for info in infos[1:])  # what older versions read, too
    for info in infos:
        # As it was written before there was such a field.
        info.update({"pid": info.get("pid", 0), "pid_namespace": "", "gpu": None})
    kind = "source" if manifest is SOURCE else "sink"
    assert decode_manifest(file_of(msgspec.msgpack.encode(body), wsync_manifest=kind)) == manifest


def test_memory_survives_a_file_and_one_that_is_none_is_refused(tmp_path):
    hosts = ["t0"] * 8
    source = describe_source(MODEL, "fsdp=4,tp=2", hosts, memory="host")
    sink = describe_sink(MODEL, "tp=2,ep=2,replicas=4", hosts, "bf16", memory="host")
    for manifest in (source, sink):
        save_manifest(manifest, tmp_path / "file")
        assert load_manifest(tmp_path / "file") == manifest
    assert {rank.memory for rank in source.ranks} == {rank.info.memory for rank in sink.ranks} == {"host"}
    body = body_of(source, tmp_path / "file")
    body[0][3]["memory"] = "disk"
    with pytest.raises(ManifestError, match=r"Invalid enum value 'disk'"):
        decode_manifest(file_of(msgspec.msgpack.encode(body)))
    with pytest.raises(ConfigError, match="memory is 'disk', allowed are 'device' and 'host'"):
        describe_source(MODEL, "fsdp=4,tp=2", hosts, memory="disk")


# ---- writing


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    save_manifest(SOURCE, path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(ConfigError, match="file cannot be written: No space left on device"):
            save_manifest(SINK, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_file_that_cannot_be_written_or_read_is_named(tmp_path):
    for path in (tmp_path / "missing" / "file", tmp_path):
        with pytest.raises(ConfigError, match="cannot be written"):
            save_manifest(SOURCE, path)
        with pytest.raises(ConfigError, match="cannot be read"):
            load_manifest(path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_has_the_mode_of_any_other(tmp_path):
    save_manifest(SOURCE, tmp_path / "file")
    (tmp_path / "other").write_text("")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode
