"""A plain interpreter of the descriptors, written from their documentation alone, and a trainer to run it on."""

import random

import numpy as np

from wsync.plan import make_plan, sink_slices, source_slices
from wsync.plan.descriptors import (
    OP_BF16,
    OP_COPY,
    OP_FP8_BLOCK128,
    OP_FP8_BLOCK128_F32,
    OP_FP8_SCALED,
    PACK_DESC,
    SRC_BF16,
    SRC_F16,
    SRC_F32,
    SRC_F32_EXACT,
    SRC_F64,
)
from wsync.plan.program import ShardMemory, StorageMemory, compile_sink, compile_source
from wsync.plan.types import PlanOptions
from wsync.spec.box import Box
from wsync.spec.dtypes import itemsize
from wsync.spec.manifest import (
    RankInfo,
    SinkManifest,
    SourceManifest,
    TensorSpec,
)
from wsync.spec.recipes import recipe_parts

M64 = 2**64
HOST = RankInfo("h")


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
