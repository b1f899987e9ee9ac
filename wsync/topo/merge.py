"""Fragments of one machine, read from several files, become one `Machine`; a fact known to one is known to all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import msgspec

from wsync.topo.model import Gpu, Machine, NcclView, Nic, NvLink, Oddity, PciDevice

S = TypeVar("S", bound=msgspec.Struct)

_JOINED = ("paths", "p2p", "xids", "sxids", "kernel", "hca_lists", "gaps", "oddities", "sources")


def merge_machines(parts: Sequence[Machine]) -> tuple[Machine, ...]:
    """Put together the fragments of each host. Fragments without a host belong to the only host, if there is one.

    The order of the hosts is that of their first fragments.
    """
    hosts = list(dict.fromkeys(p.host for p in parts if p.host is not None))
    if len(hosts) <= 1:
        return (_merge(parts),) if parts else ()
    loose = [p for p in parts if p.host is None]
    merged = [_merge([p for p in parts if p.host == host]) for host in hosts]
    return (*merged, _merge(loose)) if loose else tuple(merged)


def _merge(parts: Sequence[Machine]) -> Machine:
    if len(parts) == 1:
        return parts[0]
    gpus = _merge_gpus([g for p in parts for g in p.gpus])
    nics, renamed = _merge_nics([n for p in parts for n in p.nics])
    joined = {name: tuple(dict.fromkeys(x for p in parts for x in getattr(p, name))) for name in _JOINED}
    joined["paths"] = tuple(
        msgspec.structs.replace(p, a=renamed.get(p.a, p.a), b=renamed.get(p.b, p.b)) for p in joined["paths"]
    )
    pci = _by_key((d for p in parts for d in p.pci), lambda d: d.bus_id)
    conflicts = tuple(_conflicts(parts))
    return Machine(
        host=_first(p.host for p in parts),
        arch=_first(p.arch for p in parts),
        # Devices that were also seen, not only declared, are facts.
        declared=all(p.declared for p in parts if p.gpus or p.nics),
        gpus=gpus,
        nics=nics,
        pci=tuple(d for d in pci if isinstance(d, PciDevice)),
        numa_nodes=_by_key((n for p in parts for n in p.numa_nodes), lambda n: n.index),
        nccl=_merge_nccl([p.nccl for p in parts if p.nccl is not None]),
        num_nics_hidden=max(p.num_nics_hidden for p in parts),
        **{**joined, "oddities": (*joined["oddities"], *conflicts)},
    )


def _conflicts(parts: Sequence[Machine]) -> Iterable[Oddity]:
    """Numbers of GPUs that differ between inputs which each list all of them; links that are up here and down there."""
    counts = {p.sources[0]: len(p.gpus) for p in parts if len(p.gpus) > 1 and p.sources and not p.gaps}
    if len(set(counts.values())) > 1:
        text = ", ".join(f"{n} GPUs in {name}" for name, n in counts.items())
        yield Oddity("sources-disagree", "host", text, next(iter(counts)))
    listed: dict[int, tuple[str, Gpu]] = {}
    for part, gpu in ((p, g) for p in parts for g in p.gpus if g.nvlinks is not None and p.sources):
        name, known = listed.setdefault(gpu.index, (part.sources[0], gpu))
        if known is not gpu and _have_failed(known, gpu):
            text = f"{name} and {part.sources[0]} show links of {gpu.label} up and down"
            yield Oddity("sources-disagree", gpu.label, text, part.sources[0])


def _have_failed(a: Gpu, b: Gpu) -> set[int]:
    """Links that one of two listings shows up and the other down; none listed are all down."""
    up, down = ({x.index for g in (a, b) for x in g.nvlinks or () if x.active is state} for state in (True, False))
    none = any(g.nvlinks == () for g in (a, b))
    return up if none else up & down


def _first(values: Iterable[str | None]) -> str | None:
    return next((v for v in values if v is not None), None)


def _fill(known: S, more: S) -> S:
    """``known`` with what only ``more`` knows; nested values are filled, too."""
    changes = {}
    for name in known.__struct_fields__:
        mine, theirs = getattr(known, name), getattr(more, name)
        if mine is None or mine == ():
            # An empty tuple is a statement ("none") unless the other has more to say of it.
            changes[name] = theirs if theirs is not None else mine
        elif isinstance(mine, msgspec.Struct) and isinstance(theirs, msgspec.Struct):
            changes[name] = _fill(mine, theirs)
    return msgspec.structs.replace(known, **changes)


def _merge_gpus(gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    by_bus: dict[str, int] = {}
    for gpu in gpus:
        if gpu.bus_id is not None and gpu.index >= 0:
            # The first input that numbers a GPU decides; NCCL may number those of a container differently.
            by_bus.setdefault(gpu.bus_id, gpu.index)
    found: dict[int, Gpu] = {}
    for gpu in sorted(gpus, key=lambda g: g.index < 0):
        index = by_bus.get(gpu.bus_id, gpu.index) if gpu.bus_id is not None else gpu.index
        if index not in found:
            found[index] = msgspec.structs.replace(gpu, index=index)
            continue
        known = found[index]
        filled = _fill(known, gpu)
        found[index] = msgspec.structs.replace(
            filled,
            index=index,
            shown=known.shown or gpu.shown,
            lost=known.lost or gpu.lost,
            nvlinks=_merge_links(known, gpu),
            nvlinks_cut=(known.nvlinks_cut or known.nvlinks is None) and (gpu.nvlinks_cut or gpu.nvlinks is None),
        )
    return tuple(found[i] for i in sorted(found))


def _merge_links(known: Gpu, more: Gpu) -> tuple[NvLink, ...] | None:
    if known.nvlinks is None or more.nvlinks is None:
        return known.nvlinks if more.nvlinks is None else more.nvlinks
    down = _have_failed(known, more)
    links = {link.index: link for link in known.nvlinks}
    for link in more.nvlinks:
        old = links.get(link.index)
        links[link.index] = _fill(old, link) if old else link
        if old and (old.errors or link.errors):
            links[link.index] = msgspec.structs.replace(links[link.index], errors={**old.errors, **link.errors})
    # The worse state counts: two listings are of two times, or of two hosts by mistake.
    return tuple(msgspec.structs.replace(links[i], active=False) if i in down else links[i] for i in sorted(links))


def _merge_nics(nics: Sequence[Nic]) -> tuple[tuple[Nic, ...], dict[str, str]]:
    """NICs by name, and the aliases (``NIC3``) that turned out to have one."""
    renamed = {n.alias: n.label for n in nics if n.alias is not None and n.alias != n.label}
    found: dict[str, Nic] = {}
    for nic in nics:
        label = renamed.get(nic.label, nic.label)
        known = found.get(label)
        found[label] = msgspec.structs.replace(_fill(known, nic) if known else nic, label=label)
    return tuple(found.values()), renamed


def _by_key(values: Iterable[S], key: Callable[[S], object]) -> tuple[S, ...]:
    found: dict[object, S] = {}
    for i, value in enumerate(values):
        name = key(value)
        name = ("unnamed", i) if name is None else name
        found[name] = _fill(found[name], value) if name in found else value
    return tuple(found.values())


def _merge_nccl(views: Sequence[NcclView]) -> NcclView | None:
    if len(views) <= 1:
        return views[0] if views else None
    names = NcclView.__struct_fields__
    return NcclView(**{name: tuple(x for v in views for x in getattr(v, name)) for name in names})
