"""Command line manners: data on stdout, everything else on stderr, errors as one line and a hint."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
from rich.console import Console

from wsync.errors import ConfigError, FormatVersionError, TransportError, WsyncError
from wsync.spec.files import check_file, write_file

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_TRANSPORT = 3
EXIT_INTERRUPTED = 130

_PLAIN_WIDTH = 150


def stdout_console(min_width: int = 0) -> Console:
    """For data. A pipe gets plain text wide enough for the tables; a terminal keeps its width, ``NO_COLOR`` counts.

    Args:
        min_width: columns that the data needs: a narrower terminal wraps whole lines, which keeps every figure.
    """
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    return console if console.width >= min_width else Console(width=min_width)


def stderr_console() -> Console:
    """For logs and progress."""
    return Console(stderr=True)


def print_error(error: WsyncError) -> None:
    """``error: ...`` and ``hint: ...`` on stderr."""
    console = stderr_console()
    console.print(f"error: {error.message}", style="red", markup=False, highlight=False, soft_wrap=True)
    if error.hint:
        console.print(f"hint: {error.hint}", markup=False, highlight=False, soft_wrap=True)


def exit_status(error: WsyncError) -> int:
    """The documented exit status of an error."""
    if isinstance(error, (ConfigError, FormatVersionError)):
        return EXIT_USAGE
    if isinstance(error, TransportError):
        return EXIT_TRANSPORT
    return EXIT_FAILED


def write_json(value: Any, target: str) -> None:
    """Write JSON to the file ``target``, or to stdout for ``-``.

    Raises:
        ConfigError: the file cannot be written.
    """
    write_data(target, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def write_data(target: str, data: bytes, mode: int | None = None) -> None:
    """Write to a file as `write_file` does, or to stdout for ``-``.

    Raises:
        ConfigError: the file cannot be written.
    """
    if target == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
        return
    write_file(target, data, mode)


def check_writable(target: str | None, option: str) -> None:
    """Refuse early what would fail after a long run.

    Raises:
        ConfigError: as `check_file`.
    """
    if target and target != "-":
        check_file(target, f"{option} {target}")
