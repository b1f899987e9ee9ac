"""Fills: where an engine repacks, each repack's scratch memory is unpacked and counted by itself."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from program_checks import (
    HOST,
    M64,
    Trainer,
    amaxes_of,
    check_duplicates,
    expected_part,
    pack_all,
    run_unpack,
    view,
    word_digest,
)

from wsync.errors import ManifestError
from wsync.plan import make_plan, sink_slices, source_slices
from wsync.plan.program import StorageMemory, compile_sink, compile_source
from wsync.plan.types import PlanOptions
from wsync.spec.box import Box
from wsync.spec.dtypes import itemsize
from wsync.spec.manifest import CopySpec, SinkManifest, SinkRankManifest, SourceManifest, StorageSpec, TensorSpec
from wsync.testing.generators import random_scenario


def random_repacks(num_storages: int, rng: random.Random) -> list[frozenset[int]]:
    owners = [rng.randrange(4) for _ in range(num_storages)]
    return [frozenset(i for i, owner in enumerate(owners) if owner == number) for number in (1, 2, 3)]


def check_fill(program, fill, wire, expected) -> None:
    """Unpacking gives each bucket the digest of the runs that the fill takes, as they lie on the wire."""
    for i, pos in enumerate(fill.positions):
        got = run_unpack(fill.buckets[i], wire[program.slice_.buckets[pos].bucket_idx])
        assert (got + fill.padding_digests[i]) % M64 == expected[fill.first_slot + i]
        check_duplicates(fill, i)


def check_copies(source, trainer, manifest, memory, storage_idxs) -> None:
    """What lies in these storages is what the copies say, taken from the trainer's whole tensors."""
    by_name = {t.name: i for i, t in enumerate(source.tensors)}
    groups = amaxes_of(source, [manifest], trainer)
    for copy in manifest.copies:
        if copy.storage_idx not in storage_idxs:
            continue
        size = itemsize(manifest.storages[copy.storage_idx].dtype)
        base = memory[copy.storage_idx].address + copy.dst_offset * size
        live = view(base, f"|V{size}", copy.dst_strides, copy.box.shape, size)
        tensor = source.tensors[by_name[copy.tensor]]
        values = trainer.whole[by_name[tensor.alias_of or tensor.name]]
        amax = groups.get((0, copy.tensor))
        part = expected_part(tensor, values, manifest.recipes[copy.tensor], copy.role, amax)
        box = tuple(slice(o, e) for o, e in zip(copy.box.offset, copy.box.end, strict=True))
        assert live.tobytes() == part[box].tobytes()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_every_repack_gets_its_bytes_in_memory_that_all_share_and_the_digests_add_up(seed):
    rng = random.Random(seed)
    scenario = random_scenario(rng, max_tensors=3)
    source, sink = scenario.source, scenario.sink
    plan = make_plan(source, sink, None, scenario.options)
    trainer = Trainer(source, random.Random(seed), seed)
    wire, digests = pack_all([compile_source(s, source.tensors, trainer.memory[s.rank]) for s in source_slices(plan)])
    for manifest, slice_ in zip(sink.ranks, sink_slices(plan), strict=True):
        repacks = random_repacks(len(manifest.storages), rng)
        sizes = [s.num_elements * itemsize(s.dtype) for s in manifest.storages]
        # Every repack begins at the same address; live storages have memory of their own.
        shared = np.zeros(sum(sizes) + 8, np.uint8)
        live = [np.zeros(n + 8, np.uint8) for n in sizes]
        memory = []
        for i, spec in enumerate(manifest.storages):
            mine = next((r for r in repacks if i in r), None)
            base = live[i] if mine is None else shared
            offset = 0 if mine is None else sum(sizes[j] for j in mine if j < i)
            memory.append(StorageMemory(base.ctypes.data + offset, spec.num_elements, spec.dtype))
        program = compile_sink(slice_, manifest, memory, repacks)

        expected = [0] * program.num_slots
        for bucket, runs in zip(slice_.buckets, program.runs, strict=True):
            assert [r.begin for r in runs] == [0, *(r.end for r in runs[:-1])]
            assert runs[-1].end == bucket.used_bytes
            total = 0
            for run in runs:
                first_word = (bucket.bucket_idx * slice_.bucket_bytes + run.begin) // 8
                got = word_digest(wire[bucket.bucket_idx][run.begin : run.end].tobytes(), first_word)
                total += got
                for slot in run.slots:
                    expected[slot] = (expected[slot] + got) % M64
            assert total % M64 == digests[bucket.bucket_idx]

        for repack, fill in zip(repacks, program.scratch, strict=True):
            before = [a.copy() for a in live]
            check_fill(program, fill, wire, expected)
            check_copies(source, trainer, manifest, memory, repack)
            assert all(np.array_equal(a, b) for a, b in zip(live, before, strict=True))
        scratch = shared.copy()
        check_fill(program, program, wire, expected)
        check_copies(source, trainer, manifest, memory, program.live_storages)
        assert np.array_equal(shared, scratch)


def job(copies, num_storages=3):
    """Two tensors of 32 elements, and storages ``s0``, ``s1`` ... of 64 elements."""
    tensors = (TensorSpec("w", (8, 4), "bfloat16"), TensorSpec("v", (8, 4), "bfloat16"))
    source = SourceManifest((HOST,), tensors, (((Box.whole((8, 4)),),), ((Box.whole((8, 4)),),)))
    storages = tuple(StorageSpec(f"s{i}", "bfloat16", 64) for i in range(num_storages))
    rank = SinkRankManifest("e", 0, 1, HOST, {"w": "bf16", "v": "bf16"}, storages, copies)
    (slice_,) = sink_slices(make_plan(source, SinkManifest((rank,)), None, PlanOptions()))
    return rank, slice_


def copy(name, storage_idx, dst_offset=0):
    return CopySpec(name, "weight", Box.whole((8, 4)), storage_idx, dst_offset, (4, 1))


def apart(num=3):
    return [StorageMemory(4096 * (i + 1), 64, "bfloat16") for i in range(num)]


def test_without_repacks_a_bucket_is_one_run_that_is_unpacked_at_once():
    rank, slice_ = job((copy("w", 0), copy("v", 1)), 2)
    program = compile_sink(slice_, rank, apart(2))
    (bucket,) = slice_.buckets
    assert program.runs == [((0, bucket.used_bytes, (0,)),)]
    assert (program.positions, program.scratch, len(program.buckets[0])) == ([0], (), 2)


def test_a_piece_with_a_live_and_two_scratch_homes_is_counted_in_each_of_the_three():
    rank, slice_ = job((copy("v", 0), copy("w", 0, 32), copy("w", 1), copy("w", 2), copy("w", 2, 32)))
    program = compile_sink(slice_, rank, apart(), [frozenset({1}), frozenset({2})])
    assert len(program.runs[0]) == 2
    assert sorted(len(run.slots) for run in program.runs[0]) == [1, 3]
    assert [int(d["wire_word"] != M64 - 1) for d in program.buckets[0]] == [1, 1]
    first, second = program.scratch
    assert [int(d["wire_word"] != M64 - 1) for d in first.buckets[0]] == [1]
    assert [int(d["wire_word"] != M64 - 1) for d in second.buckets[0]] == [1, 0]
    assert [len(f.duplicates[0].descs) for f in (program, first, second)] == [0, 0, 1]
    assert second.duplicates[0].storages == ("s2",)


def test_repacks_that_cannot_be_are_refused():
    rank, slice_ = job((copy("w", 0), copy("v", 1)))
    with pytest.raises(ManifestError, match="repack 0 has storage 3, the manifest has 3"):
        compile_sink(slice_, rank, apart(), [frozenset({3})])
    with pytest.raises(ManifestError, match=r"'s1' belongs to repacks 0 and 1"):
        compile_sink(slice_, rank, apart(), [frozenset({1}), frozenset({1, 2})])
    memory = apart()
    memory[1] = StorageMemory(memory[0].address + 126, 64, "bfloat16")
    with pytest.raises(ManifestError, match="scratch storage 's1' overlaps the live storage 's0'"):
        compile_sink(slice_, rank, memory, [frozenset({1})])
    with pytest.raises(ManifestError, match="scratch storage 's0' overlaps the live storage 's1'"):
        compile_sink(slice_, rank, memory, [frozenset({0})])
    compile_sink(slice_, rank, memory, [frozenset({0}), frozenset({1})])
    memory[1] = StorageMemory(memory[0].address + 128, 64, "bfloat16")
    compile_sink(slice_, rank, memory, [frozenset({1})])
