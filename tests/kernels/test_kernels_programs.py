"""Compiled programs run by the kernels: what a publish refuses, and what the first commit reads back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_boxes import ISAS

from wsync import kernels
from wsync.plan import make_plan, sink_slices, source_slices
from wsync.plan.program import ShardMemory, StorageMemory, compile_sink, compile_source
from wsync.spec import (
    Box,
    CopySpec,
    RankInfo,
    SinkManifest,
    SinkRankManifest,
    SourceManifest,
    StorageSpec,
    TensorSpec,
)

HOST = RankInfo("h")
SHAPE = (600, 40)


def job(dtype: str, copies: tuple[CopySpec, ...], kind: str = "parameter") -> tuple[SourceManifest, SinkRankManifest]:
    tensors = (TensorSpec("w", SHAPE, dtype, kind=kind), TensorSpec("tied", SHAPE, dtype, kind=kind, alias_of="w"))
    source = SourceManifest((HOST,), tensors, (((Box.whole(SHAPE),),), ((),)))
    storages = (StorageSpec("model.w", dtype, 24000), StorageSpec("head.w", dtype, 30000))
    recipes = {c.tensor: "raw" for c in copies}
    return source, SinkRankManifest("e", 0, 1, HOST, recipes, storages, copies)


WHOLE = CopySpec("w", "weight", Box.whole(SHAPE), 0, 0, (40, 1))
TIED = CopySpec("tied", "weight", Box.whole(SHAPE), 1, 5, (50, 1))
TOP = CopySpec("tied", "weight", Box((0, 0), (300, 40)), 1, 0, (1, 300))
BOTTOM = CopySpec("tied", "weight", Box((300, 0), (300, 40)), 1, 12000, (40, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_a_raw_parameter_that_is_not_finite_is_found_and_named_and_a_raw_buffer_is_not(dtype, value):
    values = torch.zeros(SHAPE, dtype=getattr(torch, dtype)).t().contiguous().t()
    values[417, 23] = value
    for kind, name in (("parameter", ("w", (417, 23))), ("buffer", None)):
        source, rank = job(dtype, (WHOLE,), kind)
        (slice_,) = source_slices(make_plan(source, SinkManifest((rank,))))
        memory = [[ShardMemory(values.data_ptr(), values.stride(), Box.whole(SHAPE))], []]
        program = compile_source(slice_, source.tensors, memory)
        staged = np.zeros(slice_.bucket_bytes, np.uint8)
        found = kernels.pack(program.buckets[0], staged.ctypes.data).bad
        assert (found and program.locate(0, *found)) == name
        assert found or staged[: values.nbytes].tobytes() == values.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("copies", [(WHOLE, TIED), (WHOLE, TOP, BOTTOM), (TIED, WHOLE)])
def test_a_changed_element_of_a_further_destination_is_found_and_its_storage_named(copies):
    source, rank = job("bfloat16", copies)
    (slice_,) = sink_slices(make_plan(source, SinkManifest((rank,))))
    live = {s.name: np.zeros(s.num_elements, np.uint16) for s in rank.storages}
    program = compile_sink(slice_, rank, [StorageMemory(a.ctypes.data, a.size, "bfloat16") for a in live.values()])
    staged = np.random.default_rng(0).integers(0, 256, slice_.bucket_bytes, dtype=np.uint8)
    digest = kernels.unpack(program.buckets[0], staged.ctypes.data)
    for isa in ISAS:
        assert kernels.mismatched_duplicate(program, 0, isa=isa) is None
    storages = program.duplicates[0].storages
    further = live[storages[0]]
    assert set(storages) == {rank.storages[copies[-1].storage_idx].name}
    written = np.flatnonzero(further)
    for at in (written[0], written[len(written) // 2], written[-1]):
        further[at] ^= 1
        found = kernels.mismatched_duplicate(program, 0)
        further[at] ^= 1
        assert found is not None
        assert covers(program.duplicates[0].descs[found], further.ctypes.data + 2 * int(at))
        assert kernels.installed_digest(program.buckets[0]) == digest
    assert kernels.mismatched_duplicate(program, 0) is None


def covers(desc, address: int) -> bool:
    """Whether a descriptor of two-byte elements writes to the address."""
    index = np.indices(desc["extent"]).reshape(4, -1)
    return address in int(desc["dst"]) + 2 * (index * desc["dst_stride"][:, None]).sum(axis=0)


def test_a_program_without_further_destinations_has_nothing_to_compare():
    source, rank = job("bfloat16", (WHOLE,))
    (slice_,) = sink_slices(make_plan(source, SinkManifest((rank,))))
    live = np.zeros(24000, np.uint16)
    other = np.zeros(30000, np.uint16)
    program = compile_sink(
        slice_,
        rank,
        [StorageMemory(live.ctypes.data, 24000, "bfloat16"), StorageMemory(other.ctypes.data, 30000, "bfloat16")],
    )
    assert [len(d.descs) for d in program.duplicates] == [0]
    assert kernels.mismatched_duplicate(program, 0) is None
