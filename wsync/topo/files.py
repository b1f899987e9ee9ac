"""Files that a check may read: regular ones. A named pipe or a terminal may never answer, and a check must not wait."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from wsync.errors import ConfigError


def read_regular(path: str | Path, max_bytes: int = -1) -> bytes:
    """The first ``max_bytes`` bytes of a regular file; all of them for -1.

    Raises:
        ConfigError: it cannot be read, or is a folder, a device or a named pipe.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            data = file.read(max_bytes) if regular else b""
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise ConfigError(f"{path} cannot be read: {getattr(e, 'strerror', None) or e}") from e
    if not regular:
        raise ConfigError(f"{path} is no regular file", hint="write it to a file; where - is allowed, pipe it in")
    return data
