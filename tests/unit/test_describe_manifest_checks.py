"""Loaded manifests: what is many times as large as its file is not unpacked, and what cannot be is refused by name."""

from __future__ import annotations

import hashlib
import json
import zlib

import msgspec
import pytest
from describe_checks import tiny

from wsync.describe import describe_sink, describe_source, load_manifest, save_manifest
from wsync.errors import ConfigError, ManifestError
from wsync.spec.manifest_file import MAX_BODY_BYTES, MAX_FILE_BYTES, decode_manifest
from wsync.spec.manifest_rows import check_sink_rows, check_source_rows
from wsync.spec.serde import FORMAT_VERSION

SOURCE = describe_source(tiny(), "fsdp=2", ["t"] * 2)
SINK = describe_sink(tiny(), "tp=2,replicas=2", ["e"] * 4, "bf16")


def body_of(manifest, path):
    save_manifest(manifest, path)
    return msgspec.msgpack.decode(zlib.decompress(path.read_bytes().split(b"\n", 1)[1]))


def file_of(kind, fields):
    body = msgspec.msgpack.encode(fields)
    header = {"wsync_manifest": kind, "format_version": FORMAT_VERSION, "nbytes": len(body)}
    header["digest"] = hashlib.blake2b(body, digest_size=16).hexdigest()
    return json.dumps(header).encode() + b"\n" + zlib.compress(body)


def with_rank(idx, **changes):
    ranks = list(SINK.ranks)
    ranks[idx] = msgspec.structs.replace(ranks[idx], **changes)
    return msgspec.structs.replace(SINK, ranks=tuple(ranks))


def with_copy(idx, **changes):
    copies = list(SINK.ranks[0].copies)
    copies[idx] = msgspec.structs.replace(copies[idx], **changes)
    return with_rank(0, copies=tuple(copies))


# ---- sizes


def test_lists_of_boxes_for_each_rank_and_kind_have_a_limit():
    # 30 kB that would be 25 million references
    fields = [[None] * 5000, [], [], [], [None] * 5000, []]
    with pytest.raises(ManifestError, match="it has 25000000 lists of boxes, allowed are 16777216"):
        check_source_rows(msgspec.msgpack.encode(fields), "it")


def test_tables_of_tiny_rows_have_a_limit():
    many = [[]] * ((1 << 22) + 1)
    with pytest.raises(ManifestError, match="it has 4194305 rows, allowed are 4194304"):
        check_source_rows(msgspec.msgpack.encode([[], [], [], many, [], []]), "it")
    memory = [[], [], many, []]
    with pytest.raises(ManifestError, match="it has 4194306 rows, allowed are 4194304"):
        check_sink_rows(msgspec.msgpack.encode([[], [], [], [], [memory], []]), "it")
    memory = [[], [], [], [0] * (1 << 21)]
    with pytest.raises(ManifestError, match="it has 6291456 copies, allowed are 4194304"):
        check_sink_rows(msgspec.msgpack.encode([[], [], [], [], [memory] * 3, []]), "it")


def test_what_no_reader_takes_is_not_written_and_a_file_without_end_is_not_read(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=f"'/dev/zero' has {MAX_FILE_BYTES + 1} bytes or more, allowed are"):
        load_manifest("/dev/zero")
    assert MAX_BODY_BYTES == 64 << 20
    monkeypatch.setattr("wsync.spec.manifest_file.MAX_BODY_BYTES", 100)
    with pytest.raises(ManifestError, match="bytes, allowed are 100"):
        save_manifest(SOURCE, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


# ---- what cannot be


def test_shards_of_other_ranks_are_refused(tmp_path):
    fields = body_of(SOURCE, tmp_path / "file")
    fields[4][0] = fields[4][0][:1]
    with pytest.raises(ManifestError, match="has 2 ranks, but shards on 1"):
        decode_manifest(file_of("source", fields))


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (with_rank(0, world_size=-4), "'engine-0' say world sizes -4 and 2"),
        (with_rank(1, rank=0), "'engine-0' of world size 2 needs each of its ranks once, got 2, among them rank 0"),
        (msgspec.structs.replace(SINK, ranks=SINK.ranks[:1]), "of world size 2 needs each of its ranks once, got 1"),
        (with_copy(0, storage_idx=999), "goes to storage 999 of"),
        (with_copy(0, storage_idx=-1), "goes to storage -1 of"),
        (with_copy(0, dst_offset=-1), "writes elements -1 to"),
        (with_copy(0, dst_offset=10**9), "writes elements 1000000000 to"),
        (with_copy(0, dst_strides=(1,)), r"strides \(1,\)"),
        (with_copy(0, dst_strides=(1, 1)), r"strides \(1, 1\) writes over itself"),
        (with_copy(0, dst_strides=(0, 1)), r"strides \(0, 1\) writes over itself"),
        (with_rank(0, recipes={}), "has copies, but no recipe"),
        (with_rank(0, copies=(*SINK.ranks[0].copies, SINK.ranks[0].copies[0])), "both write element 0 of"),
        (
            msgspec.structs.replace(SOURCE, tensors=(SOURCE.tensors[1], *SOURCE.tensors[1:])),
            r"tensors, but \d+ different names",
        ),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(tmp_path, manifest, said):
    save_manifest(manifest, tmp_path / "file")
    with pytest.raises(ManifestError, match=said):
        load_manifest(tmp_path / "file")
