"""Command line manners: data on stdout, everything else on stderr, errors as one line and a hint."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.segment import Segment

from wsync.errors import ConfigError, FormatVersionError, TransportError, WsyncError
from wsync.spec.files import check_file, write_file
from wsync.spec.json_text import encode_json

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_TRANSPORT = 3
EXIT_INTERRUPTED = 130

_PLAIN_WIDTH = 150


class PrintableConsole(Console):
    """Shows what names and messages have of control characters, instead of sending it to the terminal.

    Names of hosts, GPUs and files come from outside: an escape code in one could rewrite what the report says.
    """

    def render_lines(self, *args: Any, **kwargs: Any) -> Any:
        """As rich's, printable."""
        return [list(map(_printable_segment, line)) for line in super().render_lines(*args, **kwargs)]

    def render(self, *args: Any, **kwargs: Any) -> Any:
        """As rich's, printable."""
        return map(_printable_segment, super().render(*args, **kwargs))

    def print(self, *args: Any, **kwargs: Any) -> None:
        """As rich's, but data that cannot be written are a named error; a reader that has gone is for `main`."""
        with nullcontext() if self.stderr else _named_errors():
            super().print(*args, **kwargs)

    def on_broken_pipe(self) -> None:
        """Rich would end the process with status 1 here."""
        raise BrokenPipeError


@contextmanager
def _named_errors() -> Iterator[None]:
    """Errors of stdout as a `ConfigError`; closes it then, so that nothing is tried again at exit."""
    if sys.stdout is None or sys.stdout.closed:
        raise ConfigError("stdout is closed: there is nothing to write to")
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as e:
        with suppress(OSError):
            sys.stdout.close()
        raise ConfigError(f"stdout cannot be written: {e.strerror}") from e


def _printable_segment(segment: Segment) -> Segment:
    if segment.control or segment.text.isprintable():
        return segment
    return segment._replace(text=printable(segment.text, keep="\n"))


def printable(text: str, keep: str = "") -> str:
    """Control characters and what turns the direction of writing, spelt as Python does; the others as they are."""
    return "".join(c if c in keep or c.isprintable() else ascii(c)[1:-1] for c in text)


def stdout_console(min_width: int = 0) -> Console:
    """For data. A pipe gets plain text wide enough for the tables; a terminal keeps its width, ``NO_COLOR`` counts.

    Args:
        min_width: columns that the data needs: a narrower terminal wraps whole lines, which keeps every figure.
    """
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    console = PrintableConsole(width=None if is_terminal else _PLAIN_WIDTH)
    return console if console.width >= min_width else PrintableConsole(width=min_width)


def stderr_console() -> Console:
    """For logs and progress."""
    return PrintableConsole(stderr=True)


def print_error(error: WsyncError) -> None:
    """``error: ...`` and ``hint: ...`` on stderr."""
    console = stderr_console()
    console.print(f"error: {printable(error.message)}", style="red", markup=False, highlight=False, soft_wrap=True)
    if error.hint:
        console.print(f"hint: {printable(error.hint)}", markup=False, highlight=False, soft_wrap=True)


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
    write_data(target, encode_json(value))


def write_data(target: str, data: bytes, mode: int | None = None) -> None:
    """Write to a file as `write_file` does, or to stdout for ``-``.

    Raises:
        ConfigError: the file cannot be written.
    """
    if target == "-":
        with _named_errors():
            sys.stdout.buffer.write(data)
            sys.stdout.flush()
        return
    write_file(target, data, mode)


def check_writable(target: str | None, option: str) -> None:
    """Refuse early what would fail after a long run.

    Raises:
        ConfigError: as `check_file`.
    """
    if target == "":
        raise ConfigError(f"{option} needs the name of a file, got an empty one")
    if target is not None and target != "-":
        check_file(target, f"{option} {target}")


def check_apart(outputs: Mapping[str, str | None], inputs: Mapping[str, str | None] | None = None) -> None:
    """Refuse two results in one file, and a result in a file that is read.

    Args:
        outputs: file of each option that writes one; None where it is not given, ``-`` for stdout.
        inputs: file of each argument that names one to read.

    Raises:
        ConfigError: two are one file; both are named.
    """
    seen: dict[Path, str] = {}
    for name, target in (inputs or {}).items():
        if target and os.path.isfile(target):
            seen[Path(target).resolve()] = f"{name} is read from"
    for option, target in outputs.items():
        if not target or target == "-":
            continue
        path = Path(target).resolve()
        if path in seen and (path.is_file() or not path.exists()):
            raise ConfigError(f"{option} is to be written to {target}, but {seen[path]} that file")
        seen[path] = f"{option} is written to"
