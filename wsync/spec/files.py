"""Files that commands read and write: reads have a limit, a written file appears whole, what is no file stays."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from wsync.errors import ConfigError


def read_file(path: str | Path, max_bytes: int, what: str = "") -> bytes:
    """A file's bytes. Reads no more than it must to see that there are too many: a size alone says nothing of devices.

    Args:
        path: to read.
        max_bytes: allowed.
        what: it is, for messages.

    Raises:
        ConfigError: it cannot be read, or has more bytes.
    """
    name = f"{what} {str(path)!r}" if what else str(path)
    try:
        with Path(path).open("rb") as file:
            data = file.read(max_bytes + 1)
            size = os.fstat(file.fileno()).st_size
    except OSError as e:
        raise ConfigError(f"{name} cannot be read: {e.strerror}") from e
    if len(data) > max_bytes:
        raise ConfigError(f"{name} has {max(size, len(data))} bytes or more, allowed are {max_bytes}")
    return data


def write_file(path: str | Path, data: bytes, mode: int | None = None) -> None:
    """Write a file whole or not at all: what was there stays until the new one is complete.

    A symlink stays, and what it points to is replaced. A device or a named pipe is written to.

    Args:
        path: to write.
        data: all of it.
        mode: permissions; by default those of the file that is replaced, or of any new file.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        found = _stat(path)
        if found is None or stat.S_ISREG(found.st_mode):
            _replace(Path(os.path.realpath(path)), data, found.st_mode & 0o777 if found and mode is None else mode)
        else:
            with open(path, "wb", buffering=0, opener=_open_existing) as file:
                _write_all(file.fileno(), data)
    except OSError as e:
        raise ConfigError(f"{path} cannot be written: {e.strerror}") from e


def check_file(path: str | Path, name: str) -> None:
    """Refuse early what `write_file` could not write. Neither waits nor changes anything.

    Args:
        path: to be written.
        name: of it, for messages.

    Raises:
        ConfigError: it is a folder or a socket, its folder does not exist, or it may not be written.
    """
    target = Path(os.path.realpath(path))
    try:
        found = _stat(path)
        if found is None and not target.parent.is_dir():
            raise ConfigError(f"{name}: the folder {target.parent} does not exist")
        if found is not None and (stat.S_ISDIR(found.st_mode) or stat.S_ISSOCK(found.st_mode)):
            what = "folder" if stat.S_ISDIR(found.st_mode) else "socket"
            raise ConfigError(f"{name} cannot be written: it is a {what}")
        if found is not None and not os.access(path, os.W_OK):
            raise ConfigError(f"{name} cannot be written: Permission denied")
        if found is None or stat.S_ISREG(found.st_mode):
            handle, part = _new_neighbour(target)
            os.close(handle)
            part.unlink()
    except OSError as e:
        raise ConfigError(f"{name} cannot be written: {e.strerror}") from e


def _stat(path: str | Path) -> os.stat_result | None:
    """Of what a path leads to; None for nothing."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _open_existing(path: str, flags: int) -> int:
    return os.open(path, flags & ~(os.O_CREAT | os.O_TRUNC))


def _write_all(handle: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def _new_neighbour(path: Path) -> tuple[int, Path]:
    """An empty file in the same folder, whose name no collector takes for one of its own."""
    part = path.parent / f".wsync-{secrets.token_hex(8)}.tmp"
    return os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), part


def _replace(path: Path, data: bytes, mode: int | None) -> None:
    handle, part = _new_neighbour(path)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
