"""Programs run on real memory by a plain interpreter of the descriptors, written from their documentation alone."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from program_checks import HOST, M64, run_programs

from wsync.errors import DtypeMismatchError, ManifestError
from wsync.plan import make_plan, sink_slices, source_slices
from wsync.plan.descriptors import (
    AMAX_DESC,
    OP_COPY,
    PACK_DESC,
    SRC_BF16,
    SRC_BYTES,
    SRC_F16,
    SRC_F32_EXACT,
    SRC_F64,
    UNPACK_DESC,
)
from wsync.plan.program import ShardMemory, StorageMemory, compile_sink, compile_source
from wsync.plan.types import PlanOptions
from wsync.spec.box import Box, contiguous_strides
from wsync.spec.manifest import (
    CopySpec,
    SinkManifest,
    SinkRankManifest,
    SourceManifest,
    StorageSpec,
    TensorSpec,
)
from wsync.spec.recipes import recipe_parts
from wsync.testing.generators import random_scenario

SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_programs_move_every_byte_and_count_each_once_in_the_digest(seed):
    scenario = random_scenario(random.Random(seed), max_tensors=3)
    run_programs(scenario.source, scenario.sink, scenario.options, seed)


def small_job(shape=(300, 200), dtype="bfloat16", recipe="fp8_block128", cut=100):
    """Two trainer ranks whose edge cuts a scale block, and one engine rank that takes everything."""
    tensors = (TensorSpec("w", shape, dtype),)
    rest = shape[1:]
    boxes = (Box((0,) * len(shape), (cut, *rest)), Box((cut, *(0,) * len(rest)), (shape[0] - cut, *rest)))
    source = SourceManifest((HOST, HOST), tensors, (((boxes[0],), (boxes[1],)),))
    parts = recipe_parts("w", shape, dtype, recipe)
    storages = tuple(StorageSpec(p.name, p.dtype, int(np.prod(p.shape))) for p in parts)
    copies = tuple(
        CopySpec("w", p.role, Box.whole(p.shape), i, 0, contiguous_strides(p.shape)) for i, p in enumerate(parts)
    )
    sink = SinkManifest((SinkRankManifest("e", 0, 1, HOST, {"w": recipe}, storages, copies),))
    return source, sink


def test_cut_blocks_are_quantised_on_the_grid_of_the_whole_tensor():
    source, sink = small_job()
    run_programs(source, sink, PlanOptions(16384), 3)


def test_a_stack_of_matrices_has_one_descriptor_for_each_matrix():
    source, sink = small_job(shape=(4, 64, 96), cut=2)
    run_programs(source, sink, PlanOptions(65536), 4)
    plan = make_plan(source, sink, None, PlanOptions(65536))
    memory = [[ShardMemory(4096, (6144, 96, 1), source.shards[0][0][0])]]
    program = compile_source(source_slices(plan)[0], source.tensors, memory)
    assert [len(b) for b in program.buckets] == [2, 1]
    assert [tuple(d["extent"]) for d in program.buckets[0]] == [(1, 1, 64, 96)] * 2
    assert [len(b.pieces) for b in program.slice_.buckets] == [1, 1]


def compiled(source, sink, rank=0):
    plan = make_plan(source, sink)
    memory = [[ShardMemory(1 << 20, contiguous_strides(b.shape), b) for b in source.shards[0][rank]]]
    return compile_source(source_slices(plan)[rank], source.tensors, memory)


def test_a_bad_value_is_named_by_its_global_index():
    source, sink = small_job()
    program = compiled(source, sink, rank=1)
    desc_idx = next(i for i, d in enumerate(program.buckets[0]) if d["extent"][2] == 172)
    assert program.locate(0, desc_idx, 200 * 3 + 7) == ("w", (128 + 3, 7))
    assert program.locate_amax(0, 205)[0] == "w"
    assert program.locate_amax(0, 205)[1] == (101, 5)


def test_a_bad_value_in_a_stack_is_named_by_its_global_index():
    source, sink = small_job(shape=(4, 64, 96), cut=2)
    program = compiled(source, sink, rank=1)
    assert program.locate(0, 1, 96 * 5 + 6) == ("w", (3, 5, 6))


def test_descriptors_have_the_sizes_of_the_contract():
    assert (PACK_DESC.itemsize, AMAX_DESC.itemsize, UNPACK_DESC.itemsize) == (136, 88, 136)


def test_scale_tables_are_as_small_as_what_the_rank_writes():
    source, sink = small_job(shape=(2560, 128), cut=1280)
    program = compiled(source, sink)
    assert program.scales.nbytes == 10 * 4
    assert program.amax_vector.size == 0
    assert len(program.amax_descs) == 0


def test_the_second_home_of_a_tied_weight_is_not_counted_again():
    tensors = (TensorSpec("w", (8, 4), "bfloat16"), TensorSpec("tied", (8, 4), "bfloat16", alias_of="w"))
    source = SourceManifest((HOST,), tensors, (((Box.whole((8, 4)),),), ((),)))
    copies = tuple(CopySpec(n, "weight", Box.whole((8, 4)), 0, i * 32, (4, 1)) for i, n in enumerate(("w", "tied")))
    rank = SinkRankManifest("e", 0, 1, HOST, {"w": "bf16", "tied": "bf16"}, (StorageSpec("s", "bfloat16", 64),), copies)
    run_programs(source, SinkManifest((rank,)), PlanOptions(), 1)
    (slice_,) = sink_slices(make_plan(source, SinkManifest((rank,))))
    program = compile_sink(slice_, rank, [StorageMemory(4096, 64, "bfloat16")])
    assert [int(w) for w in program.buckets[0]["wire_word"]] == [0, M64 - 1]
    (duplicates,) = program.duplicates
    assert (
        duplicates.descs.tobytes()
        == np.array([(4096 + 64, (0, 0, 4, 1), (32, 32, 4, 1), (1, 1, 8, 4), 0, 0, 2, 1, 0, 0)], UNPACK_DESC).tobytes()
    )
    assert (duplicates.first_idx.tolist(), duplicates.storages) == ([0], ("s",))


@pytest.mark.parametrize(
    ("dtype", "kind", "src_dtype"),
    [
        ("float32", "parameter", SRC_F32_EXACT),
        ("float16", "parameter", SRC_F16),
        ("bfloat16", "parameter", SRC_BF16),
        ("float64", "parameter", SRC_F64),
        ("int64", "parameter", SRC_BYTES),
        ("float8_e4m3fn", "parameter", SRC_BYTES),
        ("float32", "buffer", SRC_BYTES),
        ("float16", "buffer", SRC_BYTES),
    ],
)
def test_raw_parameters_of_a_wide_float_dtype_are_checked_and_buffers_are_not(dtype, kind, src_dtype):
    tensors = (TensorSpec("w", (8, 4), dtype, kind=kind),)
    source = SourceManifest((HOST,), tensors, (((Box.whole((8, 4)),),),))
    copy = CopySpec("w", "weight", Box.whole((8, 4)), 0, 0, (4, 1))
    rank = SinkRankManifest("e", 0, 1, HOST, {"w": "raw"}, (StorageSpec("s", dtype, 32),), (copy,))
    program = compiled(source, SinkManifest((rank,)))
    assert program.buckets[0]["op"].tolist() == [OP_COPY]
    assert program.buckets[0]["src_dtype"].tolist() == [src_dtype]


def test_compile_sink_takes_bytes_for_fp8():
    source, sink = small_job()
    (slice_,), (rank,) = sink_slices(make_plan(source, sink)), sink.ranks
    memory = [StorageMemory(4096, 60000, "uint8"), StorageMemory(1 << 20, 6, "float32")]
    assert len(compile_sink(slice_, rank, memory).buckets) == len(slice_.buckets)
    with pytest.raises(DtypeMismatchError, match="int8 in memory, float8_e4m3fn in the manifest"):
        compile_sink(slice_, rank, [StorageMemory(4096, 60000, "int8"), memory[1]])


def test_compile_source_refuses_memory_of_another_box():
    source, sink = small_job()
    slice_ = source_slices(make_plan(source, sink))[0]
    with pytest.raises(ManifestError, match=r"shape=\(90, 200\).*slice reads"):
        compile_source(slice_, source.tensors, [[ShardMemory(4096, (200, 1), Box((0, 0), (90, 200)))]])
    with pytest.raises(ManifestError, match="memory is given for 0 tensors, the source has 1"):
        compile_source(slice_, source.tensors, [])


def test_compile_sink_refuses_memory_that_is_not_the_manifests():
    source, sink = small_job(recipe="bf16")
    (slice_,) = sink_slices(make_plan(source, sink))
    with pytest.raises(DtypeMismatchError, match="float32 in memory, bfloat16 in the manifest"):
        compile_sink(slice_, sink.ranks[0], [StorageMemory(4096, 60000, "float32")])
    with pytest.raises(ManifestError, match="59999 elements in memory, 60000"):
        compile_sink(slice_, sink.ranks[0], [StorageMemory(4096, 59999, "bfloat16")])
    with pytest.raises(ManifestError, match="0 storages, the manifest has 1"):
        compile_sink(slice_, sink.ranks[0], [])


def test_compile_sink_refuses_a_slice_of_another_manifest():
    source, sink = small_job(recipe="bf16")
    (slice_,) = sink_slices(make_plan(source, sink))
    (rank,) = sink.ranks
    half = CopySpec("w", "weight", Box((0, 0), (50, 200)), 0, 0, (200, 1))
    memory = [StorageMemory(4096, 60000, "bfloat16")]
    fewer = SinkRankManifest("e", 0, 1, HOST, rank.recipes, rank.storages, (half,))
    with pytest.raises(ManifestError, match="none of its 1 copies takes it"):
        compile_sink(slice_, fewer, memory)
    more = SinkRankManifest(
        "e",
        0,
        1,
        HOST,
        {**rank.recipes, "x": "bf16"},
        rank.storages,
        (*rank.copies, CopySpec("x", "weight", Box((0,), (4,)), 0, 0, (1,))),
    )
    with pytest.raises(ManifestError, match=r"needs 4 elements of 'x'.*brings 0"):
        compile_sink(slice_, more, memory)
