"""One process of the benchmark: a trainer or an engine rank. Started by `wsync.bench.launch`, never by hand.

All ranks walk through the same steps: for each recipe the references, then for each row a warm-up and the timed
repeats. What they measure goes to the command over a pipe.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

import msgspec

from wsync.bench.cleanup import die_with
from wsync.bench.events import Began, Done, EventWriter, Failed
from wsync.bench.options import BenchOptions
from wsync.errors import DeadlineError, PeerLostError, WsyncError


def main(argv: list[str] | None = None) -> int:
    """Run one rank; its errors go to the command as well."""
    parser = argparse.ArgumentParser(prog="python -m wsync.bench.worker")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--options", required=True)
    parser.add_argument("--events-fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    args = parser.parse_args(argv)
    die_with(args.parent)
    options = msgspec.json.decode(Path(args.options).read_bytes(), type=BenchOptions)
    events = _LastStep(args.events_fd)
    try:
        from wsync.bench.job import run_rank

        run_rank(options, args.rank, events)
        events.send(Done())
        return 0
    except Exception as e:  # whatever it is, the command must hear of it
        events.send(_failure(e, f"{options.rank_name(args.rank)} ({events.where})"))
        return 1


class _LastStep(EventWriter):
    """An `EventWriter` that remembers what began last."""

    where = "start"

    def send(self, event: object) -> None:
        if isinstance(event, Began):
            self.where = str(event.step)
        super().send(event)  # type: ignore[arg-type]


def _failure(error: Exception, who: str) -> Failed:
    trace = traceback.format_exc()
    if isinstance(error, WsyncError):
        return Failed(type(error).__name__, f"{who}: {error.message}", error.hint, trace)
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "imed out" in text or "timeout" in text.lower():
        return Failed(DeadlineError.__name__, f"{who}: {text}", "", trace)
    if "onnection" in text or "peer" in text:
        return Failed(PeerLostError.__name__, f"{who}: {text}", "", trace)
    return Failed(WsyncError.__name__, f"{who}: {type(error).__name__}: {text}", "", trace)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # gloo's threads may hang in their destructors when a peer has died
