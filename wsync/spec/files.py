"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from wsync.errors import ConfigError


def write_whole(path: Path, data: bytes, mode: int | None = None) -> None:
    """Replace a file as a whole, so that a reader, or a crash, meets the old or the new one.

    Args:
        path: of the file; what is unfinished lies beside it, hidden, and ends in ``.tmp``.
        data: its content.
        mode: who may read it; by default whom the process's umask lets.

    Raises:
        ConfigError: it cannot be written; an old file is as it was.
    """
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(handle, _default_mode() if mode is None else mode)
                os.fsync(handle)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as e:
        raise ConfigError(f"{path} cannot be written: {e.strerror}") from e


def _default_mode() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask
