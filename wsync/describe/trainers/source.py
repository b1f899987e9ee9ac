"""A trainer's manifest from a model and a layout string."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from msgspec import structs

from wsync.describe.layout import MAX_LISTS, Degrees, check_length, check_ranks
from wsync.describe.models.shape import ModelShape
from wsync.describe.parts import part_of
from wsync.describe.ranks import rank_infos
from wsync.describe.trainers import fsdp, megatron, zero3
from wsync.describe.trainers.fsdp import Fsdp
from wsync.describe.trainers.megatron import Megatron
from wsync.describe.trainers.scheme import Keys, Scheme, Shards
from wsync.describe.trainers.zero3 import Zero3
from wsync.errors import ConfigError, MissingTensorError
from wsync.spec.dtypes import itemsize
from wsync.spec.manifest import DEVICE, PARAMETER, Memory, SourceManifest, TensorSpec

_FSDP, _MEGATRON, _ZERO3 = "FSDP2", "Megatron-Core", "ZeRO-3"

TRAINERS: dict[str, Keys] = {_FSDP: fsdp.KEYS, _MEGATRON: megatron.KEYS, _ZERO3: zero3.KEYS}
"""Name of a layout's family -> its keys."""

_FLOATS = ("bfloat16", "float16", "float32")


def describe_source(
    model: ModelShape,
    layout: str,
    hosts: Sequence[str],
    dtype: str = "bfloat16",
    gpus: Sequence[int] | None = None,
    memory: Memory = DEVICE,
) -> SourceManifest:
    """What every rank of a trainer holds.

    Tensors that are laid out alike share one tuple of shards, the same object.

    Args:
        model: from `load_model`.
        layout: ``fsdp=32,tp=8`` (FSDP2, with ``fsdp`` or ``replicate``), ``tp=8,pp=4,ep=8`` (Megatron-Core), or
            ``zero3=64``; `TRAINERS` has all keys.
        hosts: the host of each rank.
        dtype: of the parameters that ranks hold; ``float32`` for masters.
        gpus: the GPU of each rank on its host; None leaves it to the planner, as `RankInfo` says.
        memory: where ranks have their weights, as `RankInfo` says: ``"host"`` for an offloaded trainer.

    Raises:
        ConfigError: a layout that is malformed, or does not divide the world or the model.
        ManifestError: a tensor that the layout does not say how to cut.
        MissingTensorError: an element of a tensor that no rank would hold.
    """
    itemsize(dtype)
    if dtype not in _FLOATS:
        raise ConfigError(f"a trainer's parameters are {', '.join(_FLOATS)}, got {dtype!r}")
    scheme = _scheme(model, layout, len(hosts))
    tensors = tuple(_in_dtype(t, dtype) for t in model.tensors)
    found: dict[Hashable, Shards] = {}
    equal: dict[Shards, Shards] = {}
    nothing: Shards = ((),) * len(hosts)
    shards: list[Shards] = []
    for tensor in tensors:
        if tensor.alias_of is not None:
            shards.append(nothing)
            continue
        part = part_of(tensor.name)
        key = scheme.key(tensor, part)
        if key not in found:
            if (len(found) + 1) * len(hosts) > MAX_LISTS:
                raise ConfigError(
                    f"layout {layout!r} gives {len(hosts)} ranks more than {len(found)} lists of boxes each, allowed "
                    f"are {MAX_LISTS} together"
                )
            held = scheme.shards(tensor, part)
            found[key] = equal.setdefault(held, held)
            _check_cover(tensor, held, layout)
        shards.append(found[key])
    ranks = rank_infos(hosts, gpus, memory)
    return SourceManifest(ranks, tensors, tuple(shards))


def trainer_ranks(layout: str) -> int:
    """How many ranks a layout has; one of Megatron-Core without ``dp`` has the fewest that fit.

    Raises:
        ConfigError: a layout that is malformed, or has too many ranks.
    """
    family, degrees = _family(layout)
    count = {_FSDP: fsdp.num_ranks, _MEGATRON: megatron.num_ranks, _ZERO3: zero3.num_ranks}[family]
    return check_ranks(layout, count(degrees))


def _scheme(model: ModelShape, layout: str, world: int) -> Scheme:
    if not world:
        raise ConfigError("a trainer needs at least 1 rank, got 0 hosts")
    family, degrees = _family(layout)
    makers: dict[str, Callable[[ModelShape, Degrees, int], Scheme]]
    makers = {_FSDP: Fsdp, _MEGATRON: Megatron, _ZERO3: Zero3}
    return makers[family](model, degrees, world)


def _family(layout: str) -> tuple[str, Degrees]:
    check_length(layout)
    named = {pair.partition("=")[0].strip() for pair in layout.split(",")}
    unknown = [key for key in named if key and not any(key in keys for keys in TRAINERS.values())]
    if unknown:
        known = "; ".join(f"{name} has {', '.join(keys)}" for name, keys in TRAINERS.items())
        raise ConfigError(f"layout {layout!r} has the unknown key {sorted(unknown)[0]!r}: {known}")
    family = _ZERO3 if "zero3" in named else _FSDP if named & {"fsdp", "replicate"} else _MEGATRON
    return family, Degrees(layout, TRAINERS[family])


def _in_dtype(tensor: TensorSpec, dtype: str) -> TensorSpec:
    if tensor.dtype == dtype or tensor.kind != PARAMETER or tensor.dtype != "bfloat16":
        return tensor
    return structs.replace(tensor, dtype=dtype)


def _check_cover(tensor: TensorSpec, shards: Shards, layout: str) -> None:
    """Every element is held by someone: distinct boxes are disjoint or equal, so that counting them is enough."""
    boxes = {box for held in shards for box in held}
    covered = sum(box.num_elements for box in boxes)
    total = 1
    for extent in tensor.shape:
        total *= extent
    if covered != total:
        raise MissingTensorError(
            f"layout {layout!r} puts {covered} of the {total} elements of {tensor.name!r} on ranks"
        )
