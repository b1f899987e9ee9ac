"""Programs run on real memory by a plain interpreter of the descriptors, written from their documentation alone."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsync.errors import DtypeMismatchError, ManifestError
from wsync.plan import make_plan, sink_slices, source_slices
from wsync.plan.descriptors import (
    AMAX_DESC,
    OP_BF16,
    OP_COPY,
    OP_FP8_BLOCK128,
    OP_FP8_BLOCK128_F32,
    OP_FP8_SCALED,
    PACK_DESC,
    SRC_BF16,
    SRC_BYTES,
    SRC_F16,
    SRC_F32,
    SRC_F32_EXACT,
    SRC_F64,
    UNPACK_DESC,
)
from wsync.plan.program import ShardMemory, StorageMemory, compile_sink, compile_source
from wsync.plan.types import PlanOptions
from wsync.spec.box import Box, contiguous_strides
from wsync.spec.dtypes import itemsize
from wsync.spec.manifest import (
    CopySpec,
    RankInfo,
    SinkManifest,
    SinkRankManifest,
    SourceManifest,
    StorageSpec,
    TensorSpec,
)
from wsync.spec.recipes import recipe_parts
from wsync.testing.generators import random_scenario

SEEDS = st.integers(0, 2**32 - 1)
M64 = 2**64


def view(address: int, dtype: str, strides, extents, elem_bytes: int) -> np.ndarray:
    """The array that a descriptor describes, over the memory at its address."""

    class Memory:
        def __init__(self) -> None:
            self.__array_interface__ = {
                "data": (int(address), False),
                "typestr": dtype,
                "shape": tuple(int(n) for n in extents),
                "strides": tuple(int(s) * elem_bytes for s in strides),
                "version": 3,
            }

    return np.asarray(Memory())


def word_digest(data: bytes, first_word: int) -> int:
    """The digest of wire bytes, from its definition."""
    words = np.frombuffer(data + bytes(-len(data) % 8), "<u8")
    total = 0
    for i, word in enumerate(words.tolist()):
        x = word ^ ((first_word + i + 1) * 0x9E3779B97F4A7C15 % M64)
        total += (x & 0xFFFFFFFF) * (x >> 32) + x
    return total % M64


def to_f32(raw: np.ndarray, src_dtype: int) -> np.ndarray:
    return (raw.astype(np.uint32) << 16).view(np.float32) if src_dtype == SRC_BF16 else raw


def source_view(desc, strides, extents) -> np.ndarray:
    typestr = {SRC_BF16: "<u2", SRC_F32: "<f4"}[int(desc["src_dtype"])]
    return to_f32(view(desc["src"], typestr, strides, extents, np.dtype(typestr).itemsize), int(desc["src_dtype"]))


def cell_view(address: int, stride: int, desc, extents) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The f32 cells of a descriptor's blocks, and the row and column of every element in them."""
    rows = (np.arange(extents[0]) + int(desc["row_phase"])) // 128
    cols = (np.arange(extents[1]) + int(desc["col_phase"])) // 128
    cells = view(address, "<f4", (int(stride), 1), (rows[-1] + 1, cols[-1] + 1), 4)
    return cells, rows[:, None], cols[None, :]


def run_amax(descs: np.ndarray) -> None:
    for desc in descs:
        values = source_view(desc, desc["src_stride"], desc["extent"])
        cells, rows, cols = cell_view(desc["amax"], desc["amax_stride"], desc, desc["extent"])
        np.maximum.at(cells, np.broadcast_arrays(rows, cols), np.abs(values))


def run_scales(descs: np.ndarray) -> None:
    for desc in descs:
        amax, _, _ = cell_view(desc["amax"], desc["amax_stride"], desc, desc["extent"])
        scales, _, _ = cell_view(desc["scales"], desc["scale_stride"], desc, desc["extent"])
        scales[...] = amax


def run_pack(descs: np.ndarray, bucket: np.ndarray, words_before: int) -> int:
    digest = 0
    for desc_idx, desc in enumerate(descs):
        assert desc["piece_idx"] == desc_idx
        data = packed(desc)
        begin = int(desc["dst_offset"])
        assert begin % 256 == 0
        assert int(desc["wire_word"]) == words_before + begin // 8
        bucket[begin : begin + len(data)] = np.frombuffer(data, np.uint8)
        digest += word_digest(data, int(desc["wire_word"]))
    return digest % M64


def packed(desc) -> bytes:
    op, extents = int(desc["op"]), desc["extent"]
    if op == OP_COPY:
        elem_bytes = int(desc["elem_bytes"])
        assert elem_bytes == {SRC_BF16: 2, SRC_F16: 2, SRC_F32_EXACT: 4, SRC_F64: 8}.get(
            int(desc["src_dtype"]), elem_bytes
        )
        return view(desc["src"], f"|V{elem_bytes}", desc["src_stride"], extents, elem_bytes).tobytes()
    values = source_view(desc, desc["src_stride"], extents)
    if op == OP_BF16:
        return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype("<u2").tobytes()
    assert tuple(extents[:2]) == (1, 1)
    matrix = values[0, 0]
    scales, rows, cols = cell_view(desc["scales"], desc["scale_stride"], desc, extents[2:])
    if op in (OP_FP8_BLOCK128, OP_FP8_BLOCK128_F32):
        assert desc["row_phase"] == desc["col_phase"] == 0
        scales[...] = 0
        np.maximum.at(scales, np.broadcast_arrays(rows, cols), np.abs(matrix))
    else:
        assert op == OP_FP8_SCALED
    return quantised(matrix, scales[rows, cols]).tobytes()


def quantised(matrix: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.round(matrix.astype(np.float64) / scale * 100 + 100).astype(np.uint8)


def run_unpack(descs: np.ndarray, bucket: np.ndarray) -> int:
    digest = 0
    for desc in descs:
        elem_bytes, begin = int(desc["elem_bytes"]), int(desc["src_offset"])
        dst = view(desc["dst"], f"|V{elem_bytes}", desc["dst_stride"], desc["extent"], elem_bytes)
        data = bucket[begin : begin + dst.size * elem_bytes].tobytes()
        dst[...] = np.frombuffer(data, f"|V{elem_bytes}").reshape(dst.shape)
        if int(desc["wire_word"]) != M64 - 1:
            digest += word_digest(data, int(desc["wire_word"]))
    return digest % M64


class Trainer:
    """Every rank's memory: boxes of random layout."""

    def __init__(self, source: SourceManifest, rng: random.Random, seed: int) -> None:
        random_values = np.random.default_rng(seed)
        self.whole = [self._values(random_values, t) for t in source.tensors]
        self._alive: list[np.ndarray] = []
        self.memory = [
            [[self._shard(i, b, rng) for b in source.shards[i][rank]] for i in range(len(source.tensors))]
            for rank in range(len(source.ranks))
        ]

    @staticmethod
    def _values(rng: np.random.Generator, tensor: TensorSpec) -> np.ndarray:
        values = rng.integers(1, 255, tensor.shape).astype(np.float32)
        if tensor.dtype == "float32":
            return values
        if tensor.dtype == "bfloat16":
            return (values.view(np.uint32) >> 16).astype("<u2")
        return values.astype({"int64": "<i8", "uint8": "u1"}[tensor.dtype])

    def _shard(self, tensor_idx: int, box: Box, rng: random.Random) -> ShardMemory:
        whole = self.whole[tensor_idx]
        order = list(range(len(box.shape)))
        rng.shuffle(order)
        wide = np.zeros([box.shape[d] + rng.randrange(2) for d in order], whole.dtype)
        local = wide.transpose([order.index(d) for d in range(len(order))])[(..., *(slice(0, n) for n in box.shape))]
        local[...] = whole[tuple(slice(o, e) for o, e in zip(box.offset, box.end, strict=True))]
        self._alive.append(wide)
        strides = tuple(s // whole.itemsize for s in local.strides)
        return ShardMemory(local.__array_interface__["data"][0], strides, box)


def whole_part(tensor: TensorSpec, values: np.ndarray, recipe: str, role: str) -> np.ndarray:
    """A part, quantised in one go, as elements of opaque bytes."""
    if recipe == "raw":
        return np.ascontiguousarray(values).view(f"|V{values.itemsize}")
    f32 = to_f32(values, SRC_BF16 if tensor.dtype == "bfloat16" else SRC_F32)
    if recipe == "bf16":
        return (np.ascontiguousarray(f32).view(np.uint32) >> 16).astype("<u2").view("|V2")
    grid = np.zeros(recipe_parts(tensor.name, tensor.shape, tensor.dtype, recipe)[1].shape, np.float32)
    codes = np.zeros(tensor.shape, np.uint8)
    rows, cols = np.arange(tensor.shape[-2])[:, None] // 128, np.arange(tensor.shape[-1])[None, :] // 128
    for i in np.ndindex(tensor.shape[:-2]):
        np.maximum.at(grid[i], np.broadcast_arrays(rows, cols), f32[i])
        codes[i] = quantised(f32[i], grid[i][rows, cols])
    return grid.view("|V4") if role == "scale" else codes.view("|V1")


def run_programs(source: SourceManifest, sink: SinkManifest, options: PlanOptions, seed: int) -> None:
    plan = make_plan(source, sink, None, options)
    trainer = Trainer(source, random.Random(seed), seed)
    programs = [compile_source(s, source.tensors, trainer.memory[s.rank]) for s in source_slices(plan)]
    wire, digests = pack_all(programs)
    by_name = {t.name: i for i, t in enumerate(source.tensors)}
    for manifest, slice_ in zip(sink.ranks, sink_slices(plan), strict=True):
        storages = [np.zeros(s.num_elements, f"|V{itemsize(s.dtype)}") for s in manifest.storages]
        memory = [
            StorageMemory(a.__array_interface__["data"][0], a.size, s.dtype)
            for a, s in zip(storages, manifest.storages, strict=True)
        ]
        program = compile_sink(slice_, manifest, memory)
        for pos, bucket in enumerate(slice_.buckets):
            got = run_unpack(program.buckets[pos], wire[bucket.bucket_idx])
            assert (got + program.padding_digests[pos]) % M64 == digests[bucket.bucket_idx]
            check_duplicates(program, pos)
        for copy in manifest.copies:
            spec = manifest.storages[copy.storage_idx]
            size = itemsize(spec.dtype)
            base = memory[copy.storage_idx].address + copy.dst_offset * size
            live = view(base, f"|V{size}", copy.dst_strides, copy.box.shape, size)
            tensor = source.tensors[by_name[copy.tensor]]
            values = trainer.whole[by_name[tensor.alias_of or tensor.name]]
            part = whole_part(tensor, values, manifest.recipes[copy.tensor], copy.role)
            expected = part[tuple(slice(o, e) for o, e in zip(copy.box.offset, copy.box.end, strict=True))]
            assert live.tobytes() == expected.tobytes()


def check_duplicates(program, pos: int) -> None:
    """Each uncounted descriptor has a twin that is counted, and bytes of the digest of its first destination."""
    descs, duplicates = program.buckets[pos], program.duplicates[pos]
    uncounted = descs[descs["wire_word"] == M64 - 1]
    assert len(uncounted) == len(duplicates.descs) == len(duplicates.storages)
    for was, made, first in zip(uncounted, duplicates.descs, descs[duplicates.first_idx], strict=True):
        assert [was[f] for f in ("dst", "piece_idx")] == [made[f] for f in ("dst", "piece_idx")]
        assert made["wire_word"] == first["wire_word"] != M64 - 1
        assert made["src_offset"] == first["src_offset"]
        assert installed(made) == installed(first)


def installed(desc) -> int:
    elem_bytes = int(desc["elem_bytes"])
    live = view(desc["dst"], f"|V{elem_bytes}", desc["dst_stride"], desc["extent"], elem_bytes)
    return word_digest(live.tobytes(), int(desc["wire_word"]))


def pack_all(programs) -> tuple[dict[int, np.ndarray], dict[int, int]]:
    for program in programs:
        run_amax(program.amax_descs)
    total = np.max([p.amax_vector for p in programs], axis=0)
    wire: dict[int, np.ndarray] = {}
    digests: dict[int, int] = {}
    for program in programs:
        program.amax_vector[:] = total
        run_scales(program.amax_descs)
        size = program.slice_.bucket_bytes
        for pos, bucket in enumerate(program.slice_.buckets):
            assert program.buckets[pos].dtype == PACK_DESC
            staged = np.zeros(bucket.used_bytes, np.uint8)
            first_word = bucket.bucket_idx * size // 8
            digest = (run_pack(program.buckets[pos], staged, first_word) + program.padding_digests[pos]) % M64
            assert digest == word_digest(staged.tobytes(), first_word)
            wire[bucket.bucket_idx], digests[bucket.bucket_idx] = staged, digest
    return wire, digests


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_programs_move_every_byte_and_count_each_once_in_the_digest(seed):
    scenario = random_scenario(random.Random(seed), max_tensors=3)
    run_programs(scenario.source, scenario.sink, scenario.options, seed)


HOST = RankInfo("h")


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
    assert (PACK_DESC.itemsize, AMAX_DESC.itemsize, UNPACK_DESC.itemsize) == (128, 88, 96)


def test_scale_tables_are_as_small_as_what_the_rank_writes():
    source, sink = small_job(shape=(2560, 128), cut=1280)
    program = compiled(source, sink)
    assert program.scales.size == 10
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
        == np.array([(4096 + 64, (0, 0, 4, 1), (1, 1, 8, 4), 0, 0, 2, 1)], UNPACK_DESC).tobytes()
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
