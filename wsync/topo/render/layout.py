"""Where a machine's parts stand in a picture: frames are NUMA nodes or sockets, groups share a PCIe switch."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from wsync.topo.model import KIND_RANK, LOCAL_RANK, Gpu, Machine, Nic
from wsync.topo.view import View

Device = Gpu | Nic


@dataclass
class Group:
    """Devices below one PCIe switch, or a device of its own.

    Attributes:
        gpus, nics: in the order of the machine.
        bridges: bus ids above them, nearest first.
        switched: a PCIe switch joins them, or one above them has something to tell.
        most_rows: of NICs, where there is no GPU whose place they share.
    """

    gpus: list[Gpu] = field(default_factory=list)
    nics: list[Nic] = field(default_factory=list)
    bridges: list[str] = field(default_factory=list)
    switched: bool = False
    most_rows: int = 2

    @property
    def devices(self) -> list[Device]:
        """GPUs, then NICs."""
        return [*self.gpus, *self.nics]

    @property
    def columns(self) -> int:
        """Places side by side; NICs of GPUs stand below them, as many rows as it takes."""
        return len(self.gpus) or max(1, -(-len(self.nics) // self.most_rows))

    @property
    def rows(self) -> int:
        """Rows of NICs."""
        return -(-len(self.nics) // self.columns)


@dataclass
class Frame:
    """Groups near the same CPU. ``numa`` is empty where no input tells the node; ``placed`` where nothing tells any."""

    groups: list[Group]
    numa: tuple[int, ...] = ()
    cpus: str = ""
    placed: bool = True


class _Union:
    """Sets that grow together."""

    def __init__(self) -> None:
        self.parent: dict[Hashable, Hashable] = {}

    def find(self, item: Hashable) -> Hashable:
        while (above := self.parent.setdefault(item, item)) != item:
            item = above
        return item

    def join(self, a: Hashable, b: Hashable) -> None:
        self.parent[self.find(a)] = self.find(b)


def find_frames(machine: Machine, ghosts: Sequence[Gpu] = (), notable: Collection[str] = ()) -> list[Frame]:
    """Frames of a machine, those with the first GPUs first; what has no place that is told comes last, in one frame.

    Args:
        machine: the machine.
        ghosts: GPUs that are not in it and should be.
        notable: bus ids of bridges to show even above a single device.
    """
    view = View(machine)
    devices: list[Device] = [*view.gpus, *view.nics]
    groups = _groups(machine, view, devices)
    for group in groups:
        group.switched = len(group.devices) > 1 or any(b in notable for b in group.bridges)
    frames = _frames(view, groups)
    if ghosts:
        if not frames or frames[-1].placed:
            frames.append(Frame([], placed=False))
        frames[-1].groups += [Group([g]) for g in ghosts]
    rows = max([2, *(g.rows for g in groups if g.gpus)])
    for frame in frames:
        frame.groups = _gather(frame.groups, rows)
    return frames


def _kind(view: View, a: Device, b: Device) -> int | None:
    path = view.path(a.label, b.label)
    return None if path is None or path.kind == "NV" else KIND_RANK[path.kind]


def _pairs(devices: Sequence[Device]) -> Iterable[tuple[Device, Device]]:
    return ((a, b) for i, a in enumerate(devices) for b in devices[i + 1 :])


def _groups(machine: Machine, view: View, devices: Sequence[Device]) -> list[Group]:
    sets = _Union()
    for device in devices:
        if device.parent is not None:
            sets.join(device.label, ("bridge", device.parent))
    for a, b in _pairs(devices):
        rank = _kind(view, a, b)
        if rank is not None and KIND_RANK["PIX"] <= rank <= LOCAL_RANK:
            sets.join(a.label, b.label)
    above = {d.bus_id: d.parent for d in machine.pci}
    found: dict[Hashable, Group] = {}
    for device in devices:
        group = found.setdefault(sets.find(device.label), Group())
        if isinstance(device, Gpu):
            group.gpus.append(device)
        else:
            group.nics.append(device)
        bridge, steps = device.parent, 0
        while bridge is not None and steps < 16:
            if bridge not in group.bridges:
                group.bridges.append(bridge)
            bridge, steps = above.get(bridge), steps + 1
    return list(found.values())


def _frames(view: View, groups: list[Group]) -> list[Frame]:
    sets = _Union()
    for i, group in enumerate(groups):
        for node in (n for d in group.devices for n in d.numa or ()):
            sets.join(i, ("numa", node))
    for i, group in enumerate(groups):
        for j, other in enumerate(groups[:i]):
            if any(_near(_kind(view, a, b)) for a in group.devices for b in other.devices):
                sets.join(i, j)
    members: dict[Hashable, list[int]] = {}
    for i in range(len(groups)):
        members.setdefault(sets.find(i), []).append(i)
    frames = [_frame([groups[i] for i in indices]) for indices in members.values()]
    lost = [f for f in frames if not f.placed]
    placed = [f for f in frames if f.placed]
    placed.sort(key=lambda f: min((g.index for group in f.groups for g in group.gpus), default=1 << 30))
    return placed + ([Frame([g for f in lost for g in f.groups], placed=False)] if lost else [])


def _near(rank: int | None) -> bool:
    return rank is not None and rank <= KIND_RANK["NODE"]


def _frame(groups: list[Group]) -> Frame:
    devices = [d for g in groups for d in g.devices]
    numa = tuple(sorted({n for d in devices for n in d.numa or ()}))
    cpus = next((d.cpus for d in devices if isinstance(d, Gpu) and d.cpus), "")
    # A group alone whose node is not told may stand anywhere; several, or a switch, stand together.
    return Frame(groups, numa, cpus, placed=bool(numa) or len(groups) > 1 or len(devices) > 1)


def _gather(groups: list[Group], most_rows: int) -> list[Group]:
    """Groups with GPUs, then all NICs without one in a single group."""
    with_gpus = [g for g in groups if g.gpus]
    loose = [g for g in groups if not g.gpus]
    if not loose:
        return with_gpus
    nics = [n for g in loose for n in g.nics]
    bridges = list(dict.fromkeys(b for g in loose for b in g.bridges))
    return [*with_gpus, Group([], nics, bridges, len(loose) == 1 and loose[0].switched, most_rows)]
