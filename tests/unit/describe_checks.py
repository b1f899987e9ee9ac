"""What tests of described layouts share: small models, and which elements lie where."""

from __future__ import annotations

import math

import numpy as np

from wsync.describe import ModelShape
from wsync.describe.models.decoder import decoder_tensors
from wsync.describe.models.facts import Facts
from wsync.spec.manifest import TensorSpec
from wsync.spec.recipes import recipe_parts


def tiny(**more):
    """A decoder of one layer; options of `Facts` go over what it has."""
    sizes = {"family": "llama", "vocab": 64, "hidden": 3, "layers": 1, "heads": 8, "kv_heads": 2, "head_dim": 4}
    facts = Facts(**{**sizes, "intermediate": 16, **more})
    return ModelShape("tiny", decoder_tensors(facts), "a test", facts)


def plain(name, *shape):
    """A model of one tensor of which nothing else is known."""
    return ModelShape("plain", (TensorSpec(name, shape, "bfloat16"),), "a test")


def elements(boxes, shape):
    """Flat indices of the elements in boxes, box by box."""
    whole = np.arange(math.prod(shape)).reshape(shape)
    found = [whole[tuple(slice(o, e) for o, e in zip(b.offset, b.end, strict=True))].ravel() for b in boxes]
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def held(source, name, rank):
    """Flat indices of the elements of a tensor that a trainer's rank holds."""
    idx = [t.name for t in source.tensors].index(name)
    return elements(source.shards[idx][rank], source.tensors[idx].shape)


def memory(rank, tensors):
    """For each storage: its dtype, and for each of its elements which element of which part goes there (-1: none).

    Not of storages that nothing is written to. What the engine widens at the commit counts as what arrives. Parts are
    counted one behind the other, in the order of ``tensors``.
    """
    first, base = {}, 0
    for tensor in tensors:
        for part in recipe_parts(tensor.name, tensor.shape, tensor.dtype, rank.recipes.get(tensor.name, "raw")):
            first[tensor.name, part.role] = base, part.shape
            base += math.prod(part.shape)
    found = [np.full(storage.num_elements, -1, np.int64) for storage in rank.storages]
    for copy in rank.copies:
        begin, shape = first[copy.tensor, copy.role]
        part = np.arange(begin, begin + math.prod(shape)).reshape(shape)
        box = part[tuple(slice(o, o + n) for o, n in zip(copy.box.offset, copy.box.shape, strict=True))]
        at = np.full(box.shape, copy.dst_offset)
        for dim, stride in enumerate(copy.dst_strides):
            at += (np.arange(box.shape[dim]) * stride).reshape([-1] + [1] * (box.ndim - dim - 1))
        assert (found[copy.storage_idx][at] == -1).all(), copy  # nothing is written twice
        found[copy.storage_idx][at] = box
    return {
        s.name.removesuffix(" as bfloat16"): (s.dtype, h)
        for s, h in zip(rank.storages, found, strict=True)
        if (h >= 0).any()
    }
