"""Checks a recording by an executor that shares nothing with the recorder: NumPy on the recorded copies."""

import numpy as np
import torch
from torch import nn

from wsync.adapters.engines import record_loader, verify_recording
from wsync.spec.manifest import TensorSpec
from wsync.spec.recipes import recipe_parts


def raw(tensor):
    """A tensor's elements as integers of their size."""
    return (
        tensor.detach()
        .contiguous()
        .view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    )


def random_checkpoint(table, recipes, seed=0):
    g = torch.Generator().manual_seed(seed)
    found = {}
    for spec in table:
        for part in recipe_parts(spec.name, spec.shape, spec.dtype, recipes[spec.name]):
            dtype = getattr(torch, part.dtype)
            if dtype.is_floating_point:
                found[part.name] = torch.randn(part.shape, generator=g).to(dtype)
            else:
                found[part.name] = torch.randint(0, 100, part.shape, generator=g).to(dtype)
            found[spec.name, part.role] = found[part.name]
    return found


def executed(recording, checkpoint):
    """The live storages after the recorded copies, by NumPy: an executor that shares nothing with the recorder."""
    found = []
    for i, storage in enumerate(recording.storages):
        live = raw(recording.storage_view(i).clone()).numpy()
        assert live.shape == (storage.num_elements,)
        for c in recording.constants:
            if c.storage_idx == i:
                value = raw(c.value.expand(c.shape)).numpy()
                for index in np.ndindex(*c.shape):
                    live[c.dst_offset + sum(k * s for k, s in zip(index, c.dst_strides, strict=True))] = value[index]
        for c in recording.copies:
            if c.storage_idx != i:
                continue
            box = tuple(slice(o, o + n) for o, n in zip(c.box.offset, c.box.shape, strict=True))
            source = raw(checkpoint[c.tensor, c.role]).numpy()[box]
            for index in np.ndindex(*c.box.shape):
                live[c.dst_offset + sum(k * s for k, s in zip(index, c.dst_strides, strict=True))] = source[index]
        found.append(live)
    for w in recording.widened:
        view = recording.storage_view(w.live_idx)
        live, narrow = (torch.from_numpy(found[i]) for i in (w.live_idx, w.scratch_idx))
        live, narrow = live.view(view.dtype).numpy(), narrow.view(w.scratch.dtype).to(view.dtype).numpy()
        for offset, shape, strides in w.region.places:
            for index in np.ndindex(*shape):
                k = offset + sum(i * s for i, s in zip(index, strides, strict=True))
                live[w.region.first + k] = narrow[k]
    return found[: len(found) - len(recording.widened)]


def check(load, shapes, params, recipes=None, **kwargs):
    """Record a loader, check that nothing changed, run it for real, and compare every live byte with the copies."""
    table = [s if isinstance(s, TensorSpec) else TensorSpec(n, *_shape_dtype(s)) for n, s in shapes.items()]
    before = {n: raw(p.detach().clone()) for n, p in params.items()}
    recording = record_loader(load, table, params, recipes, **kwargs)
    for n, p in params.items():
        assert torch.equal(raw(p), before[n]), f"recording changed {n}"
    offered = {**recording.offered, **recording.recipes}
    checkpoint = random_checkpoint(table, offered)
    replayed = executed(recording, checkpoint)
    with torch.no_grad():
        load((n, t) for n, t in checkpoint.items() if isinstance(n, str))
    for i, expected in enumerate(replayed):
        name = recording.storages[i].name
        np.testing.assert_array_equal(raw(recording.storage_view(i)).numpy(), expected, err_msg=name)
    verify_recording(recording, load, table)
    return recording


def _shape_dtype(given):
    return given if given and isinstance(given[-1], str) else (given, "bfloat16")


def param(*shape, dtype=torch.bfloat16):
    return nn.Parameter(torch.full(shape, 7).to(dtype), requires_grad=False)
