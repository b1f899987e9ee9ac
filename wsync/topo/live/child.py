"""The child process: one probe, its records on a pipe of its own.

What libraries print goes to the parent's log of the child and cannot be taken for a record.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys

import msgspec

from wsync.topo.live.records import Done, Probe, Record, Request, encode

BOOT = "import sys; sys.path[:] = sys.argv[2:]; from wsync.topo.live.child import main; main(int(sys.argv[1]))"
"""What the child's interpreter runs: modules come from where the parent's do, not from the folder it was started in."""


def main(pipe: int) -> None:
    """Read the request from stdin, run its probe, write records to the file descriptor ``pipe``."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    # The default action ends a process also inside a library that does not return; Python's would wait for it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if request.give_up_s:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(request.give_up_s)

    def send(record: Record) -> None:
        line = memoryview(encode(record) + b"\n")
        while line:
            line = line[os.write(pipe, line) :]

    find_probe(request.probe)(request, send)
    send(Done())


def find_probe(name: str) -> Probe:
    """The function of ``module:function``."""
    module, _, function = name.partition(":")
    probe: Probe = getattr(importlib.import_module(module), function)
    return probe
