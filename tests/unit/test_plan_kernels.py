"""Plans run by the compiled kernels: live memory has the bytes of the reference quantiser of the whole tensor."""

import random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from program_checks import M64, Trainer, view

from wsync import kernels
from wsync.formats import quantize_reference
from wsync.plan import make_plan, sink_slices, source_slices
from wsync.plan.program import StorageMemory, compile_sink, compile_source
from wsync.spec.dtypes import itemsize
from wsync.spec.recipes import get_recipe, recipe_parts
from wsync.testing.generators import random_scenario

SEEDS = st.integers(0, 2**32 - 1)
FLOATS = ("bfloat16", "float16", "float32")


class RealTrainer(Trainer):
    """Values of both signs, with a matrix of zeros and a heavy tail now and then."""

    @staticmethod
    def _values(rng, tensor):
        if tensor.dtype not in FLOATS:
            return Trainer._values(rng, tensor)
        values = rng.standard_normal(tensor.shape) * 10.0 ** rng.integers(-4, 3)
        if rng.random() < 0.3:
            values = values * (rng.random(tensor.shape) < 0.5)
        if rng.random() < 0.1:
            values = values * 0
        made = torch.from_numpy(np.asarray(values)).to(getattr(torch, tensor.dtype))
        return made.numpy() if tensor.dtype == "float32" else made.view(torch.uint16).numpy()


def as_published(tensor, values: np.ndarray) -> torch.Tensor:
    """A whole tensor as recipes see it: f32 masters rounded to bf16."""
    raw = torch.from_numpy(np.ascontiguousarray(values))
    if tensor.dtype == "float32":
        return raw.to(torch.bfloat16)
    return raw.view(getattr(torch, tensor.dtype)) if tensor.dtype in FLOATS else raw


def group_amax(rank, name: str, whole: dict[str, torch.Tensor]) -> torch.Tensor | None:
    names = next((names for names in rank.scale_groups if name in names), None)
    if names is None:
        return None
    return torch.stack([whole[n].to(torch.float32).abs().amax(dim=(-2, -1)) for n in names]).amax(dim=0)


def replay_all(programs) -> tuple[dict[int, np.ndarray], dict[int, int]]:
    for program in programs:
        assert kernels.amax(program.amax_descs) is None
    total = np.max([p.amax_vector for p in programs], axis=0)
    wire, digests = {}, {}
    for program in programs:
        program.amax_vector[:] = total
        kernels.scales_from_amax(program.amax_descs)
        for pos, bucket in enumerate(program.slice_.buckets):
            staged = np.zeros(bucket.used_bytes, np.uint8)
            digest, bad = kernels.pack(program.buckets[pos], staged.ctypes.data)
            assert bad is None
            wire[bucket.bucket_idx] = staged
            digests[bucket.bucket_idx] = (digest + program.padding_digests[pos]) % M64
    return wire, digests


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_every_recipe_arrives_as_the_reference_quantises_the_whole_tensor(seed):
    scenario = random_scenario(random.Random(seed), max_tensors=4)
    source = scenario.source
    plan = make_plan(source, scenario.sink, None, scenario.options)
    trainer = RealTrainer(source, random.Random(seed), seed)
    wire, digests = replay_all([compile_source(s, source.tensors, trainer.memory[s.rank]) for s in source_slices(plan)])
    specs = {t.name: t for t in source.tensors}
    held = {t.name: v for t, v in zip(source.tensors, trainer.whole, strict=True)}
    whole = {t.name: as_published(t, held[t.alias_of or t.name]) for t in source.tensors}
    for rank, slice_ in zip(scenario.sink.ranks, sink_slices(plan), strict=True):
        live = [np.zeros(s.num_elements * itemsize(s.dtype), np.uint8) for s in rank.storages]
        memory = [
            StorageMemory(a.ctypes.data, s.num_elements, s.dtype) for a, s in zip(live, rank.storages, strict=True)
        ]
        program = compile_sink(slice_, rank, memory)
        for i, pos in enumerate(program.positions):
            bucket = slice_.buckets[pos]
            got = kernels.unpack(program.buckets[i], wire[bucket.bucket_idx].ctypes.data)
            assert (got + program.padding_digests[i]) % M64 == digests[bucket.bucket_idx]
        for copy in rank.copies:
            spec, recipe = specs[copy.tensor], rank.recipes[copy.tensor]
            part = reference_part(spec, whole, held, recipe, copy.role, rank)
            for dim, (first, extent) in enumerate(zip(copy.box.offset, copy.box.shape, strict=True)):
                part = part.narrow(dim, first, extent)
            size = part.element_size()
            base = memory[copy.storage_idx].address + copy.dst_offset * size
            got = view(base, f"|V{size}", copy.dst_strides, copy.box.shape, size)
            assert got.tobytes() == part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), copy


def reference_part(spec, whole, held, recipe: str, role: str, rank) -> torch.Tensor:
    if recipe == "raw":
        return torch.from_numpy(np.ascontiguousarray(held[spec.alias_of or spec.name]))
    amax = group_amax(rank, spec.name, whole) if get_recipe(recipe).needs_amax else None
    made = quantize_reference(whole[spec.name], recipe, amax)
    return next(
        made["weight" + part.name.removeprefix(spec.name)]
        for part in recipe_parts(spec.name, spec.shape, spec.dtype, recipe)
        if part.role == role
    )
