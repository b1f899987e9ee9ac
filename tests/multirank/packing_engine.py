"""An engine that keeps some weights in a form of its own: every bit of its packed memory is reversed and in its place.

It knows nothing of wsync but the two values that it returns from `record`, and remembers what was called.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch

from wsync.plan.program import StorageMemory
from wsync.session.laststep import LastSteps, Repack
from wsync.spec.box import Box
from wsync.spec.manifest import CopySpec, SinkRankManifest, StorageSpec

SHAPE = (40, 24)
ROWS = 48
"""Rows of a storage; those that no tensor fills are padding, which the loader sets to `PADDING`."""
PADDING = 7
ELEMENTS = ROWS * SHAPE[1]


def packed_form(scratch: np.ndarray) -> np.ndarray:
    """The bits of the whole memory in reverse order."""
    return np.packbits(np.unpackbits(scratch.view(np.uint8))[::-1])


def padded(weight: torch.Tensor) -> np.ndarray:
    """What a storage holds after loading one tensor."""
    out = np.full((ROWS, SHAPE[1]), PADDING, np.int16)
    out[: SHAPE[0]] = weight.numpy()
    return out.reshape(-1)


class Constant:
    """The padding of a storage, as the recorder describes what a loader sets itself."""

    def __init__(self, storage_idx):
        self.storage_idx = storage_idx

    def write(self, target):
        target[SHAPE[0] * SHAPE[1] :] = PADDING


class PackingEngine:
    """Storage ``i`` takes the tensors ``homes[i]``, one padded tensor each; storages in ``packed`` are scratch memory.

    Args:
        homes: for each storage the tensor that it holds.
        packed: for each repack its storages.
        shared: all repacks fill the same scratch memory.
    """

    def __init__(self, homes, packed, *, shared=False):
        self.homes, self.packed_storages = homes, packed
        of_repack = {i: (r, k) for r, storages in enumerate(packed) for k, i in enumerate(storages)}
        common = np.full(ELEMENTS * max([1, *map(len, packed)]), -1, np.int16)
        self.scratch = [common if shared else np.full(ELEMENTS * len(s), -1, np.int16) for s in packed]
        self.memory = []
        for i in range(len(homes)):
            if i in of_repack:
                r, k = of_repack[i]
                self.memory.append(self.scratch[r][k * ELEMENTS : (k + 1) * ELEMENTS])
            else:
                self.memory.append(np.full(ELEMENTS, -1, np.int16))
        self.serving = [np.zeros(2 * ELEMENTS * len(s), np.uint8) for s in packed]
        self.prepared: dict[int, np.ndarray] = {}
        self.events: list[str] = []
        self.threads: dict[str, str] = {}
        self.fail_at = ""
        self.before: dict[str, Callable[[], object]] = {}
        self.derived = 0

    def live_tensors(self):
        scratch = {i for storages in self.packed_storages for i in storages}
        return {f"s{i}": torch.from_numpy(m) for i, m in enumerate(self.memory) if i not in scratch}

    def record(self, name_table, recipes, allow_missing):
        spec = {t.name: t for t in name_table}
        assert all(spec[name].shape == SHAPE for name in self.homes)
        storages = tuple(StorageSpec(f"s{i}", "int16", ELEMENTS) for i in range(len(self.homes)))
        copies = tuple(
            CopySpec(name, "weight", Box.whole(SHAPE), i, 0, (SHAPE[1], 1)) for i, name in enumerate(self.homes)
        )
        recording = SimpleNamespace(
            constants=tuple(Constant(i) for i in range(len(self.homes))),
            memory=[StorageMemory(m.ctypes.data, ELEMENTS, "int16") for m in self.memory],
            storage_view=lambda i: self.memory[i],
            check_addresses=lambda current: None,
            manifest=lambda replica, rank, world_size, info: SinkRankManifest(
                replica, rank, world_size, info, dict.fromkeys(self.homes, "raw"), storages, copies
            ),
        )
        return SimpleNamespace(recording=recording, last_steps=self.last_steps())

    def last_steps(self):
        repacks = tuple(
            Repack(
                f"layer{r}",
                frozenset(storages),
                lambda r=r: self._prepare(r),
                lambda r=r: self._commit(r),
                lambda r=r: self._discard(r),
            )
            for r, storages in enumerate(self.packed_storages)
        )
        return LastSteps(repacks, self._refresh)

    def _did(self, event):
        self.events.append(event)
        self.threads[event] = threading.current_thread().name
        if event in self.before:
            self.before[event]()
        if event == self.fail_at:
            raise RuntimeError(f"{event} went wrong")

    def _prepare(self, r):
        self.prepared[r] = np.zeros(0, np.uint8)
        self._did(f"prepare {r}")
        self.prepared[r] = packed_form(self.scratch[r][: ELEMENTS * len(self.packed_storages[r])])
        self.scratch[r][:] = -1  # an engine's code may use up what it is given

    def _commit(self, r):
        self._did(f"commit {r}")
        self.serving[r][:] = self.prepared.pop(r)

    def _discard(self, r):
        self._did(f"discard {r}")
        self.prepared.pop(r, None)

    def _refresh(self):
        self._did("refresh")
        self.derived = sum(int(t.sum()) for t in self.live_tensors().values())

    def holds(self, weights):
        """Whether everything that it would generate with is this version."""
        live = all(
            np.array_equal(tensor.numpy(), padded(weights[self.homes[int(name[1:])]]))
            for name, tensor in self.live_tensors().items()
        )
        repacked = all(
            np.array_equal(served, packed_form(np.concatenate([padded(weights[self.homes[i]]) for i in storages])))
            for served, storages in zip(self.serving, self.packed_storages, strict=True)
        )
        derived = self.derived == sum(int(t.sum()) for t in self.live_tensors().values())
        return live and repacked and derived

    def snapshot(self):
        """Copies of everything that it would generate with."""
        return [t.numpy().copy() for t in self.live_tensors().values()] + [a.copy() for a in self.serving]


def same(a, b):
    """Whether two snapshots are equal."""
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
