"""Runs the live reading over fakes: in this process, where many machines are to be read, or in real child processes."""

from __future__ import annotations

from pathlib import Path

import fake_nvml as fake
import fake_sysfs
import machines as m
import msgspec

from wsync.topo.findings import SEVERITY_RANK
from wsync.topo.live import LiveOptions, nvml, sysfs
from wsync.topo.live.assemble import assemble
from wsync.topo.live.records import Answer, Done, Failure, Refusal, Request, decode, encode
from wsync.topo.live.supervise import Outcome
from wsync.topo.model import Machine, Topology
from wsync.topo.report import Report, check_topology


def told_by(probe, request: Request) -> Outcome:
    """What a probe tells, through the encoding of the pipe."""
    outcome = Outcome()

    def send(record) -> None:
        record = decode(encode(record))
        if isinstance(record, Answer | Refusal):
            outcome.told.append(record)
        elif isinstance(record, Failure):
            outcome.failure = record

    probe(request, send)
    send(Done())
    outcome.end = "done"
    return outcome


def read_board(board: fake.Board, root: Path, faults: fake.Faults | None = None) -> Machine:
    """The machine with this board and this ``/sys``."""
    fake.install(fake.FakeLib(board, faults))
    try:
        nvml_outcome = told_by(nvml.probe, Request(""))
    finally:
        fake.install(None)
    return assemble([nvml_outcome], told_by(sysfs.probe, Request("", root=str(root))), None)


def sysfs_of(box: m.Box, root: Path) -> Path:
    """A ``/sys`` for a hand-made machine."""
    return fake_sysfs.write_sysfs(root, fake_sysfs.devices_of_box(box), fake_sysfs.nodes_of_box(box))


def read_box(box: m.Box, root: Path, faults: fake.Faults | None = None) -> Machine:
    """The live reading of a hand-made machine."""
    return read_board(fake.of_box(box), sysfs_of(box, root), faults)


def judge(machine: Machine, platform: str | None = None) -> Report:
    return check_topology(Topology((machine,)), platform)


def alarms(report: Report) -> dict[str, tuple[str, ...]]:
    """Findings above INFO: id to devices."""
    return {f.id: f.subject.devices for f in report.all_findings() if SEVERITY_RANK[f.severity]}


def options(board: fake.Board, root: Path, faults: fake.Faults | None = None, timeout_s: float = 30.0) -> LiveOptions:
    """For the real children: NVML from the fake, ``/sys`` from a folder."""
    argument = msgspec.json.encode(fake.Argument(board, faults or fake.Faults())).decode()
    return LiveOptions(timeout_s, str(root), nvml="fake_nvml:probe", argument=argument)
