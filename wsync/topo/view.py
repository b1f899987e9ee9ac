"""Questions that checks ask of a `Machine`, answered once."""

from __future__ import annotations

from functools import cached_property

from wsync.topo.model import KIND_RANK, LOCAL_RANK, Gpu, Machine, Nic, Path


class View:
    """An index over a machine. Nothing in it changes after it is made."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.gpus = machine.gpus
        # Beside RDMA devices, interfaces without RDMA are the front end and no matter of the GPUs'.
        self.nics = tuple(n for n in machine.nics if n.rdma is not False) or machine.nics
        self._cells: dict[tuple[str, str], Path] = {}
        for path in machine.paths:
            # The first input that shows a pair is believed; `conflicts` has what others say of it.
            self._cells.setdefault((path.a, path.b), path)

    @property
    def sockets_only(self) -> bool:
        """There are NICs, and none has RDMA: distances to GPUs mean little, as all goes through host memory."""
        return bool(self.nics) and all(n.rdma is False for n in self.nics)

    def cell(self, a: str, b: str) -> Path | None:
        """How ``a`` itself says that it sees ``b``."""
        return self._cells.get((a, b))

    def path(self, a: str, b: str) -> Path | None:
        """How ``a`` sees ``b``, from either's row."""
        return self._cells.get((a, b)) or self._cells.get((b, a))

    @cached_property
    def conflicts(self) -> tuple[tuple[Path, Path], ...]:
        """Pairs of cells of which one says NVLink and the other does not, or not as many links."""
        cells = self._cells
        pairs = ((cells[p.a, p.b], p) for p in self.machine.paths if "NV" in (p.kind, cells[p.a, p.b].kind))
        return tuple((a, b) for a, b in pairs if (a.kind, a.links) != (b.kind, b.links))

    @cached_property
    def gpu_paths(self) -> dict[tuple[int, int], Path]:
        """Paths of pairs of GPUs by index, ``a < b``, from either's row."""
        # Over what is known, not over all pairs: a machine may name thousands of GPUs and say nothing of them.
        at = {g.label: i for i, g in enumerate(self.gpus)}
        pairs = {
            (min(at[a], at[b]), max(at[a], at[b])) for a, b in self._cells if a in at and b in at and at[a] != at[b]
        }
        found = {}
        for i, j in sorted(pairs):
            path = self.path(self.gpus[i].label, self.gpus[j].label)
            if path is not None:
                found[self.gpus[i].index, self.gpus[j].index] = path
        return found

    @cached_property
    def links_between(self) -> dict[int, dict[int, int]]:
        """For each GPU the known numbers of NVLinks to each other GPU; 0 for a path over PCIe."""
        found: dict[int, dict[int, int]] = {g.index: {} for g in self.gpus}
        for (a, b), path in self.gpu_paths.items():
            links = path.links if path.kind == "NV" else 0
            found[a][b] = found[b][a] = links
        return found

    @cached_property
    def islands(self) -> tuple[tuple[int, ...], ...]:
        """Sets of GPUs that NVLinks join, by smallest index; only those of more than one GPU."""
        left = {g.index for g in self.gpus}
        found = []
        while left:
            frontier, island = [min(left)], set()
            while frontier:
                gpu = frontier.pop()
                if gpu in island:
                    continue
                island.add(gpu)
                frontier += [peer for peer, links in self.links_between[gpu].items() if links]
            left -= island
            if len(island) > 1:
                found.append(tuple(sorted(island)))
        return tuple(found)

    @cached_property
    def nic_paths(self) -> dict[int, dict[str, str]]:
        """For each GPU the kind of path to each NIC that is known."""
        found: dict[int, dict[str, str]] = {}
        for gpu in self.gpus:
            paths = ((n.label, self.path(gpu.label, n.label)) for n in self.nics)
            found[gpu.index] = {label: p.kind for label, p in paths if p is not None}
        return found

    def nearest(self, gpu: Gpu) -> str | None:
        """Kind of the shortest path from a GPU to any NIC; None if no path is known."""
        kinds = self.nic_paths[gpu.index].values()
        return min(kinds, key=KIND_RANK.__getitem__, default=None)

    def is_local(self, gpu: Gpu, nic: Nic) -> bool:
        """Whether they share a PCIe switch."""
        kind = self.nic_paths[gpu.index].get(nic.label)
        return kind is not None and KIND_RANK[kind] <= LOCAL_RANK
