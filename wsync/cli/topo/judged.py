"""What all judging commands share: no verdict is lost, and what cannot be judged at all is UNKNOWN."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

from wsync.cli.output import check_writable, print_error, write_json
from wsync.cli.topo.exits import add_exit_arguments, counted_verdict, exit_of
from wsync.errors import ConfigError, WsyncError
from wsync.topo.findings import Severity, Verdict

R = TypeVar("R")


def add_judging_arguments(parser: argparse.ArgumentParser, what: str = "report") -> None:
    """Add ``--json``, ``--exit-style`` and ``--fail-on``."""
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", help=f"write the {what} as JSON (-: to stdout)")
    add_exit_arguments(parser)


def run_judged(
    args: argparse.Namespace,
    judge: Callable[[], R],
    severities_of: Callable[[R], list[Severity]],
    show: Callable[[R], None],
) -> int:
    """Judge, write or print the report, and return the exit status.

    Args:
        args: with what `add_judging_arguments` added.
        judge: makes the report.
        severities_of: a report's findings.
        show: prints a report.
    """
    report = judge_or_none(args, lambda: _judge_writable(args, judge), print_error)
    if report is None:
        return exit_of("UNKNOWN", args.exit_style)
    done = True
    if args.json != "-":
        done = written(args, lambda: show(report))
    if args.json:
        done &= written(args, lambda: write_json(report, args.json))
    return status_of(args, counted_verdict(severities_of(report), args.exit_style, args.fail_on), done)


def _judge_writable(args: argparse.Namespace, judge: Callable[[], R]) -> R:
    check_writable(args.json, "--json")
    return judge()


def judge_or_none(args: argparse.Namespace, judge: Callable[[], R], tell: Callable[[WsyncError], None]) -> R | None:
    """What ``judge`` returns; None after an error, which ``tell`` says."""
    try:
        return judge()
    except WsyncError as e:
        tell(e)
    except Exception as e:
        if args.debug:
            raise
        tell(_mistake(e))
    return None


def written(args: argparse.Namespace, write: Callable[[], None]) -> bool:
    """Whether ``write`` could; what stopped it is said on stderr. Who closed the pipe has seen enough of it."""
    try:
        write()
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
    except ConfigError as e:
        print_error(e)
    except OSError as e:
        if e.filename is None and sys.stdout is not None:
            # Nor may Python complain at its end of what is left to write.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(e, BrokenPipeError):
            return True
        print_error(ConfigError(f"{e.filename or 'stdout'} cannot be written: {e.strerror}"))
    except Exception as e:
        if args.debug:
            raise
        print_error(_mistake(e))
    else:
        return True
    return False


def _mistake(error: Exception) -> WsyncError:
    """A mistake of ours says nothing of the machine: Python's status 1 would read WARN, and drain it in a prolog."""
    traceback.print_exc()
    return ConfigError(f"wsync failed: {type(error).__name__}: {error}", hint="please report it")


def status_of(args: argparse.Namespace, verdict: Verdict, written: bool) -> int:
    """Exit status of what counts.

    A fault stays one where a file cannot be written; that all is well is not known by who reads the file.
    """
    return exit_of(verdict if written or verdict != "OK" else "UNKNOWN", args.exit_style)
