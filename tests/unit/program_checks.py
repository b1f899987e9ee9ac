"""A plain interpreter of the descriptors, written from their documentation alone, and a trainer to run it on."""

import random

import numpy as np
from standin_recipes import codes_of, group_amaxes, scales_of, whole_parts

from wsync.plan import make_plan, sink_slices, source_slices
from wsync.plan.descriptors import (
    OP_BF16,
    OP_COPY,
    OP_FP8_BLOCK128,
    OP_FP8_BLOCK128_F32,
    OP_FP8_CHANNEL,
    OP_FP8_CHANNEL_SCALED,
    OP_FP8_SCALED,
    OP_FP8_TENSOR,
    OP_MXFP8,
    OP_NVFP4,
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

M64 = 2**64
FLOATS = ("bfloat16", "float16", "float32")
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
    if src_dtype == SRC_F16:
        return raw.view("<f2").astype(np.float32)
    return (raw.astype(np.uint32) << 16).view(np.float32) if src_dtype == SRC_BF16 else raw


def source_view(desc, strides, extents) -> np.ndarray:
    typestr = {SRC_BF16: "<u2", SRC_F16: "<u2", SRC_F32: "<f4"}[int(desc["src_dtype"])]
    raw = view(desc["src"], typestr, strides, extents, np.dtype(typestr).itemsize)
    return to_f32(np.ascontiguousarray(raw), int(desc["src_dtype"]))


RECIPES = {OP_FP8_CHANNEL: "fp8_channel", OP_FP8_TENSOR: "fp8_tensor", OP_MXFP8: "mxfp8", OP_NVFP4: "nvfp4"}
"""Of the operations that do more than blocks of 128 x 128."""

BLOCKS = {
    OP_FP8_BLOCK128: (128, 128),
    OP_FP8_BLOCK128_F32: (128, 128),
    OP_FP8_SCALED: (128, 128),
    OP_FP8_CHANNEL: (1, 2**62),
    OP_FP8_CHANNEL_SCALED: (1, 2**62),
    OP_FP8_TENSOR: (2**62, 2**62),
    OP_MXFP8: (1, 32),
    OP_NVFP4: (1, 16),
}
"""Rows and columns of weights that share a scale of the table (of the exchanged amax where there is no table)."""


def cell_index(desc, block, extents) -> tuple[np.ndarray, np.ndarray]:
    """The cell of every element of a descriptor's box."""
    phases = (int(desc["row_phase"]), int(desc["col_phase"]))
    assert phases == (0, 0) or block == (128, 128)
    rows, cols = ((np.arange(n) + phase) // step for n, phase, step in zip(extents, phases, block, strict=True))
    return np.broadcast_arrays(rows[:, None], cols[None, :])


def cells_at(address: int, stride: int, index, elem_bytes: int = 4) -> np.ndarray:
    shape = (index[0].max() + 1, index[1].max() + 1)
    return view(address, "<f4" if elem_bytes == 4 else "|u1", (int(stride), 1), shape, elem_bytes)


def amax_block(desc) -> tuple[int, int]:
    op = int(desc["recipe_op"])
    assert op in (OP_FP8_BLOCK128, OP_FP8_BLOCK128_F32, OP_FP8_CHANNEL, OP_FP8_TENSOR, OP_NVFP4)
    return BLOCKS[OP_FP8_TENSOR] if op == OP_NVFP4 else BLOCKS[op]


def run_amax(descs: np.ndarray) -> None:
    for desc in descs:
        values = source_view(desc, desc["src_stride"], desc["extent"])
        index = cell_index(desc, amax_block(desc), desc["extent"])
        np.maximum.at(cells_at(desc["amax"], desc["amax_stride"], index), index, np.abs(values))


def run_scales(descs: np.ndarray) -> None:
    for desc in descs:
        index = cell_index(desc, amax_block(desc), desc["extent"])
        cells = cells_at(desc["amax"], desc["amax_stride"], index)
        cells_at(desc["scales"], desc["scale_stride"], index)[...] = cells


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
    block, recipe = BLOCKS[op], RECIPES.get(op, "fp8_block128")
    tensor_amax = None
    if op in (OP_FP8_TENSOR, OP_NVFP4):
        tensor_amax = view(desc["amax"], "<f4", (1,), (1,), 4)[0]
        assert tensor_amax > 0
    else:
        assert desc["amax"] == 0
    if op == OP_FP8_TENSOR:
        assert desc["scales"] == 0
        return codes_of(recipe, matrix, np.zeros((1, 1)), tensor_amax).tobytes()
    index = cell_index(desc, block, extents[2:])
    elem_bytes = 1 if op in (OP_MXFP8, OP_NVFP4) else 4
    scales = cells_at(desc["scales"], desc["scale_stride"], index, elem_bytes)
    if op not in (OP_FP8_SCALED, OP_FP8_CHANNEL_SCALED):
        assert desc["row_phase"] == desc["col_phase"] == 0
        amax = np.zeros(scales.shape, np.float32)
        np.maximum.at(amax, index, matrix)
        scales[...] = scales_of(recipe, amax, tensor_amax).astype(scales.dtype)
    return codes_of(recipe, matrix, scales[index], tensor_amax).tobytes()


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
        return values.astype({"int64": "<i8", "uint8": "u1", "float16": "<f2"}[tensor.dtype])

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


def as_f32(tensor: TensorSpec, values: np.ndarray) -> np.ndarray:
    return to_f32(values, {"bfloat16": SRC_BF16, "float16": SRC_F16}.get(tensor.dtype, SRC_F32))


def expected_part(tensor: TensorSpec, values: np.ndarray, recipe: str, role: str, group_amax) -> np.ndarray:
    """A part, quantised in one go, as elements of opaque bytes."""
    if recipe == "raw":
        return np.ascontiguousarray(values).view(f"|V{values.itemsize}")
    f32 = np.ascontiguousarray(as_f32(tensor, values))
    if recipe == "bf16":
        return (f32.view(np.uint32) >> 16).astype("<u2").view("|V2")
    raw = whole_parts(tensor, f32, recipe, group_amax)[role]
    return np.ascontiguousarray(raw).view(f"|V{raw.shape[-1]}")[..., 0]


def amaxes_of(source: SourceManifest, ranks, trainer) -> dict:
    """(rank index, checkpoint name) -> amax of its scale group."""
    f32 = [as_f32(t, v) if t.dtype in FLOATS else v for t, v in zip(source.tensors, trainer.whole, strict=True)]
    return group_amaxes(source, ranks, f32)


def run_programs(source: SourceManifest, sink: SinkManifest, options: PlanOptions, seed: int) -> None:
    plan = make_plan(source, sink, None, options)
    trainer = Trainer(source, random.Random(seed), seed)
    programs = [compile_source(s, source.tensors, trainer.memory[s.rank]) for s in source_slices(plan)]
    wire, digests = pack_all(programs)
    by_name = {t.name: i for i, t in enumerate(source.tensors)}
    groups = amaxes_of(source, sink.ranks, trainer)
    for rank_idx, (manifest, slice_) in enumerate(zip(sink.ranks, sink_slices(plan), strict=True)):
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
            amax = groups.get((rank_idx, copy.tensor))
            part = expected_part(tensor, values, manifest.recipes[copy.tensor], copy.role, amax)
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
