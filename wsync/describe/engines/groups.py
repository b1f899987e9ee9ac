"""A model's tensors gathered by the module that an engine builds of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from wsync.describe.parts import Part, part_of
from wsync.spec.manifest import TensorSpec


@dataclass
class Module:
    """The tensors of one attention, one MLP, one mixture or one lone module.

    Attributes:
        stem: name up to it.
        layer: its number, or None outside of the layers.
        by_kind: (kind, whether it is a bias) -> tensor; those of the experts by number.
        experts: number of the expert -> kind -> tensor.
        others: what is taken whole, by each rank.
    """

    stem: str
    layer: int | None
    by_kind: dict[tuple[str, bool], tuple[TensorSpec, Part]] = field(default_factory=dict)
    experts: dict[int, dict[str, TensorSpec]] = field(default_factory=dict)
    others: list[tuple[TensorSpec, Part]] = field(default_factory=list)


def gather(tensors: tuple[TensorSpec, ...]) -> list[Module]:
    """The modules, in the order of their first tensors."""
    found: dict[str, Module] = {}
    for tensor in tensors:
        part = part_of(tensor.name)
        # Outside of the layers every tensor is a module by itself: stages tell them apart.
        stem = part.stem if part.layer is not None else tensor.name.rpartition(".")[0]
        if part.expert is not None:
            stem = stem[: stem.rindex(".experts.")] + ".experts"
        module = found.get(stem)
        if module is None:
            module = found[stem] = Module(stem, part.layer)
        if part.expert is not None:
            module.experts.setdefault(part.expert, {})[part.kind] = tensor
        elif (part.kind, part.bias) in module.by_kind:
            module.others.append((tensor, part))
        else:
            module.by_kind[(part.kind, part.bias)] = (tensor, part)
    return list(found.values())
