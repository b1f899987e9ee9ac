"""One machine of what NVML and ``/sys`` told; what did not end well becomes something that checks can judge."""

from __future__ import annotations

import re
from collections.abc import Iterator

from msgspec.structs import replace

from wsync.topo.live.devices import SOURCE as SYSFS
from wsync.topo.live.devices import Host, read_machine
from wsync.topo.live.gpus import SOURCE as NVML
from wsync.topo.live.gpus import Board
from wsync.topo.live.records import Doing
from wsync.topo.live.supervise import Outcome
from wsync.topo.model import Gap, Gpu, Machine, Oddity, Path

KINDS = {"hang": "probe-hang", "late": "probe-late", "crash": "probe-crash", "garbled": "probe-garbled"}


def assemble(nvml: list[Outcome], sysfs: Outcome, host_name: str | None) -> Machine:
    """Put together what the probes told.

    Args:
        nvml: one outcome, or several where asking a GPU did not end well and the others were asked again.
        sysfs: that of the other probe.
        host_name: of this machine.
    """
    board = Board([record for outcome in nvml for record in outcome.told])
    host = Host(sysfs.told)
    devices = read_machine(host)
    gpus = tuple(_placed(gpu, host) for gpu in board.gpus)
    ended = [o for outcome in nvml for o in _ends(outcome, NVML, board)]
    return replace(
        devices,
        host=host_name,
        gpus=gpus,
        paths=(*board.paths(), *_paths(host, gpus, devices)),
        p2p=tuple(board.p2p()),
        oddities=(
            *ended,
            *_ends(sysfs, SYSFS, board),
            *board.oddities(),
            *devices.oddities,
            *_unseen(host, gpus, nvml, sysfs),
        ),
        gaps=tuple(_gaps(gpus, nvml[-1], sysfs)),
        sources=(NVML, SYSFS),
    )


def _gaps(gpus: tuple[Gpu, ...], nvml: Outcome, sysfs: Outcome) -> Iterator[Gap]:
    for gpu in gpus:
        if not gpu.shown and not gpu.lost:
            yield Gap(f"answers of {gpu.label}", NVML)
    if nvml.end != "done" and (nvml.doing is None or nvml.doing.gpu < 0):
        yield Gap("the rest of the answers", NVML)
    if sysfs.end != "done":
        yield Gap("the rest of /sys", SYSFS)


def _placed(gpu: Gpu, host: Host) -> Gpu:
    """A GPU with what only ``/sys`` knows: the bridge above it, and what NVML did not tell."""
    if gpu.bus_id is None:
        return gpu
    return replace(
        gpu,
        parent=next(iter(host.tree.parents(gpu.bus_id)), None),
        device_id=gpu.device_id or host.device_id(gpu.bus_id),
        pcie=gpu.pcie or host.pcie(gpu.bus_id),
        numa=gpu.numa if gpu.numa is not None else host.numa(gpu.bus_id),
    )


def _paths(host: Host, gpus: tuple[Gpu, ...], devices: Machine) -> Iterator[Path]:
    """From GPUs to NICs and back, and between NICs; NVML knows of none."""
    ends = [(g.label, g.bus_id, True) for g in gpus] + [(n.label, n.bus_id, False) for n in devices.nics]
    for i, (a, bus_a, is_gpu) in enumerate(ends):
        for b, bus_b, also_gpu in ends[i + 1 :]:
            if (is_gpu and also_gpu) or bus_a is None or bus_b is None:
                continue
            kind = "PIX" if bus_a == bus_b else host.distance(bus_a, bus_b)
            if kind is not None:
                yield Path(a, b, kind, 0, SYSFS)
                yield Path(b, a, kind, 0, SYSFS)


def _ends(outcome: Outcome, source: str, board: Board) -> Iterator[Oddity]:
    """What a probe that did not reach its end died of."""
    if outcome.end == "done":
        return
    yield Oddity(KINDS[outcome.end], _subject(outcome.doing, board), f"{outcome.where}: {outcome.detail}", source)


def _subject(doing: Doing | None, board: Board) -> str:
    if doing is None:
        return "host"
    if doing.gpu < 0:
        # The device of a path of /sys: the last bus id or name of a NIC in it.
        found = re.findall(r"/(?:devices|infiniband|net)/([^/]+)", doing.call)
        return found[-1] if found else "host"
    return board.bus_of.get(doing.gpu) or f"GPU{doing.gpu}"


def _unseen(host: Host, gpus: tuple[Gpu, ...], nvml: list[Outcome], sysfs: Outcome) -> Iterator[Oddity]:
    """GPUs that one of the two sources has and the other has not."""
    if nvml[-1].end == "done" and not gpus:
        yield Oddity("no-gpu", "host", "NVML lists no GPU", NVML)
    if sysfs.end != "done" or nvml[-1].end != "done":
        return
    on_bus = host.gpus()
    listed = {g.bus_id for g in gpus}
    if gpus and not listed & set(on_bus):
        yield Oddity("sysfs-hidden", "host", f"/sys shows none of {len(gpus)} GPUs", SYSFS)
        return
    for bus in on_bus:
        driver = (host.attribute(bus, "driver") or "").rpartition("/")[2]
        if bus not in listed:
            kind = "gpu-not-listed" if driver else "gpu-without-driver"
            yield Oddity(kind, bus, f"driver {driver or 'none'}", SYSFS)
