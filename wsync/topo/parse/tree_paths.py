"""Paths that a PCIe tree implies, in the words of ``topo -m``."""

from __future__ import annotations

from collections.abc import Sequence

from wsync.topo.model import Gpu, Nic, Path, PathKind, PciDevice


def tree_paths(
    gpus: Sequence[Gpu], nics: Sequence[Nic], pci: Sequence[PciDevice], source: str = "PCIe tree"
) -> tuple[Path, ...]:
    """Paths from every GPU to every other GPU and NIC, and back.

    NVLinks between GPUs win over PCIe. Devices below one bridge are PIX, below bridges of one root PXB, below one CPU
    PHB, else SYS; a NUMA node that is not known gives no path.
    """
    parents = {d.bus_id: d.parent for d in pci if d.bus_id is not None}
    devices: list[Gpu | Nic] = [*gpus, *nics]
    chains = [_chain(d.parent, parents) for d in devices]
    labels = [d.label for d in devices]
    nodes = [d.numa for d in devices]
    links = _nvlinks(gpus)
    paths = []
    for i in range(len(gpus)):
        for j in range(len(labels)):
            if i == j:
                continue
            if (i, j) in links:
                paths.append(Path(labels[i], labels[j], "NV", links[i, j], source))
                continue
            if j < len(gpus) and None in (gpus[i].peers, gpus[j].peers):
                # A file without <gpu> elements does not say that there is no NVLink.
                continue
            kind = _kind(chains[i], chains[j], nodes[i], nodes[j])
            if kind is None:
                continue
            paths.append(Path(labels[i], labels[j], kind, 0, source))
            if j >= len(gpus):
                paths.append(Path(labels[j], labels[i], kind, 0, source))
    return tuple(paths)


def _chain(parent: str | None, parents: dict[str, str | None]) -> list[str]:
    found: list[str] = []
    while parent is not None and parent not in found:
        found.append(parent)
        parent = parents.get(parent)
    return found


def _kind(
    a: list[str], b: list[str], numa_a: tuple[int, ...] | None, numa_b: tuple[int, ...] | None
) -> PathKind | None:
    if set(a) & set(b):
        return "PIX" if a[0] == b[0] else "PXB"
    if numa_a is None or numa_b is None or () in (numa_a, numa_b):
        return None
    return "PHB" if numa_a == numa_b else "SYS"


def _nvlinks(gpus: Sequence[Gpu]) -> dict[tuple[int, int], int]:
    """Links of each pair: to each other, or the smaller number of links to switches that both reach."""
    index = {g.bus_id: i for i, g in enumerate(gpus)}
    found: dict[tuple[int, int], int] = {}
    to_switch = [sum(p.count for p in g.peers or () if p.kind == "switch") for g in gpus]
    for i, gpu in enumerate(gpus):
        for peer in gpu.peers or ():
            j = index.get(peer.target)
            if peer.kind == "gpu" and j is not None and j != i and peer.count:
                found[i, j] = peer.count
        for j in range(len(gpus)):
            if j != i and to_switch[i] and to_switch[j]:
                found[i, j] = min(to_switch[i], to_switch[j])
    return found
