"""Files that a check may read: regular ones, and pipes that a shell made for it. A named pipe or a terminal may never
answer, and a check must not wait."""

from __future__ import annotations

import os
import select
import stat
import time
from pathlib import Path

from wsync.errors import ConfigError

_SHELL_PIPES = ("/dev/fd/", "/proc/self/fd/")
"""Where a shell's ``<(command)`` is; its writer is there already."""
_PIPE_S = 10.0
_CHUNK_BYTES = 1 << 16


def read_regular(path: str | Path, max_bytes: int = -1) -> bytes:
    """The first ``max_bytes`` bytes of a regular file or of a shell's ``<(command)``; all of them for -1.

    Raises:
        ConfigError: it cannot be read, is a folder, a device or a named pipe, or the command took over ten seconds.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            mode = os.fstat(file.fileno()).st_mode
            regular = stat.S_ISREG(mode)
            if stat.S_ISFIFO(mode) and str(path).startswith(_SHELL_PIPES):
                return _read_pipe(path, file.fileno(), max_bytes)
            data = file.read(max_bytes) if regular else b""
    except ConfigError:
        raise
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise ConfigError(f"{path} cannot be read: {getattr(e, 'strerror', None) or e}") from e
    if not regular:
        raise ConfigError(f"{path} is no regular file", hint="write it to a file; where - is allowed, pipe it in")
    return data


def _read_pipe(path: str | Path, fd: int, max_bytes: int) -> bytes:
    data = bytearray()
    end = time.monotonic() + _PIPE_S
    while max_bytes < 0 or len(data) < max_bytes:
        left_s = end - time.monotonic()
        if left_s < 0 or not select.select([fd], [], [], left_s)[0]:
            raise ConfigError(f"{path} was not written to its end within {_PIPE_S:g} s")
        chunk = os.read(fd, _CHUNK_BYTES)
        if not chunk:
            break
        data += chunk
    return bytes(data if max_bytes < 0 else data[:max_bytes])
