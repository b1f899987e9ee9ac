"""A file is written whole or not at all."""

from __future__ import annotations

import os
import stat

import pytest

from wsync.errors import ConfigError
from wsync.spec.files import write_whole


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "file.prom"
    path.write_bytes(b"old")
    seen = []

    def fail(number):
        seen.extend(sorted(p.name for p in tmp_path.iterdir()))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
            write_whole(path, b"new")
    # What is unfinished has another ending: collectors read folders by it.
    assert [name.endswith(".tmp") for name in seen] == [True, False]
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.prom"]
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"


def test_who_may_read_it_is_said_or_left_to_the_umask(tmp_path):
    path = tmp_path / "file"
    before = os.umask(0o077)
    try:
        write_whole(path, b"")
        assert mode_of(path) == 0o600
        write_whole(path, b"", 0o644)
        assert mode_of(path) == 0o644
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(before)


def test_a_folder_is_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "missing" / "file"):
        with pytest.raises(ConfigError, match="cannot be written"):
            write_whole(path, b"")
