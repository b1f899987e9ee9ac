"""The self-test of repacking: the checkpoint that the engine loaded must give, by our road, the bytes that it serves.

Post-processing may behave otherwise at a reload than at the first load (vLLM's MoE layers on a CPU are packed only
once), and a shadow cannot show that. The engine's own checkpoint can: one layer of each kind is made again from it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from wsync.adapters.engines.recorder import Recording
from wsync.adapters.engines.verify import replay_storage
from wsync.adapters.engines.vllm.load_view import Sample
from wsync.errors import RecordError
from wsync.spec.manifest import CopySpec, TensorSpec
from wsync.spec.recipes import recipe_parts

Tensor = torch.Tensor

_LOG = logging.getLogger(__name__)
_WITNESSES = 4
"""In-place tensors that tell whether the engine still serves its checkpoint."""


class Checkpoint:
    """The tensors of a local safetensors checkpoint, read one by one."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        self._file_of: dict[str, Path] = {}
        if index.is_file():
            weight_map: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
            self._file_of = {name: folder / file for name, file in weight_map.items()}
            return
        from safetensors import safe_open

        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                self._file_of.update((name, file) for name in opened.keys())  # noqa: SIM118  (not a mapping)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._file_of[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor


@torch.no_grad()
def self_test(
    recording: Recording,
    name_table: Sequence[TensorSpec],
    samples: Sequence[tuple[Sample, frozenset[int]]],
    checkpoint: Checkpoint,
    scratch: frozenset[int] = frozenset(),
) -> list[str]:
    """Make the given layers again from the engine's checkpoint, and compare with what it serves. Changes nothing live.

    Args:
        recording: of the engine.
        name_table: that it was made against.
        samples: post-processed layers, each with the indices of its storages.
        checkpoint: that the engine was started from.
        scratch: indices of the storages that no kernel reads.

    Returns:
        Names of the layers that were compared; none where the engine serves other weights than its checkpoint by now.

    Raises:
        RecordError: the engine serves other bytes than post-processing makes of its checkpoint.
    """
    processed = frozenset(i for _, storages in samples for i in storages)
    parts = _Parts(recording, name_table, checkpoint)
    if changed := _changed_since_loading(recording, parts, processed | scratch):
        _LOG.warning(
            "the engine does not serve the checkpoint that it was started from (%s differs): there is no self-test",
            changed,
        )
        return []
    compared = []
    for sample, storages in samples:
        copies = _copies_into(recording, storages)
        if not copies or not all(parts.has(c) for c in copies):
            continue
        # A layer in place may share a tensor with one that is repacked, and that one is filled in scratch memory.
        compared_storages = storages - scratch if sample.repack is None else storages
        if different := _differences(recording, sample, compared_storages, parts):
            raise RecordError(
                f"the engine serves other bytes in {sample.name}.{different[0]} than post-processing makes of the "
                f"checkpoint that it was started from ({len(different)} of the layer's tensors differ)",
                hint="this vLLM packs the layer in a way that wsync does not know: please report it with its version",
            )
        compared.append(sample.name)
    return compared


def _differences(recording: Recording, sample: Sample, storages: frozenset[int], parts: _Parts) -> list[str]:
    if sample.repack is None:
        names = [recording.storages[i].name for i in storages if not _serves(recording, i, parts)]
        return [name.removeprefix(f"{sample.name}.") for name in names]
    for i in storages:
        replay_storage(recording, i, recording.storage_view(i), parts)
    return sample.repack.differences()


class _Parts:
    """Parts of checkpoint tensors in the recording's recipes, from the engine's checkpoint."""

    def __init__(self, recording: Recording, name_table: Sequence[TensorSpec], checkpoint: Checkpoint) -> None:
        self._recording = recording
        self._specs = {spec.name: spec for spec in name_table}
        self._checkpoint = checkpoint

    def has(self, copy: CopySpec) -> bool:
        return self._part(copy.tensor, copy.role)[0] in self._checkpoint

    def __call__(self, tensor: str, role: str) -> Tensor:
        name, dtype = self._part(tensor, role)
        return self._checkpoint[name].to(dtype)

    def _part(self, tensor: str, role: str) -> tuple[str, torch.dtype]:
        spec = self._specs[tensor]
        parts = recipe_parts(spec.name, spec.shape, spec.dtype, self._recording.recipes[tensor])
        part = next(p for p in parts if p.role == role)
        return part.name, getattr(torch, part.dtype)


def _changed_since_loading(recording: Recording, parts: _Parts, processed: frozenset[int]) -> str:
    """A tensor that no post-processing touches and that holds other values than the checkpoint says; or nothing."""
    seen = 0
    for i, storage in enumerate(recording.coverage.storages):
        copies = [] if i in processed or storage.constant else _copies_into(recording, {i})
        if not copies or not all(parts.has(c) for c in copies):
            continue
        if not _serves(recording, i, parts):
            return storage.names[0]
        seen += 1
        if seen == _WITNESSES:
            break
    return ""


def _copies_into(recording: Recording, storages: Collection[int]) -> list[CopySpec]:
    """The copies that end up in these storages, with those that are widened into them."""
    narrow = {one.scratch_idx for one in recording.widened if one.live_idx in storages}
    return [c for c in recording.copies if c.storage_idx in storages or c.storage_idx in narrow]


def _serves(recording: Recording, storage_idx: int, parts: _Parts) -> bool:
    """Whether live memory that is written in place holds what the checkpoint says."""
    live = recording.storage_view(storage_idx)
    expected = live.clone()
    replay_storage(recording, storage_idx, expected, parts)
    return torch.equal(expected.view(torch.uint8), live.view(torch.uint8))


def checkpoint_of(vllm_config: object) -> Checkpoint | None:
    """The local checkpoint that a worker's model was loaded from, or None (dummy weights, a hub, another format)."""
    model_config = getattr(vllm_config, "model_config", None)
    load_format = str(getattr(getattr(vllm_config, "load_config", None), "load_format", ""))
    folder = Path(str(getattr(model_config, "model", "")))
    if load_format not in ("auto", "safetensors", "hf") or not any(folder.glob("*.safetensors")):
        return None
    return Checkpoint(folder)
