"""Files: symlinks and devices stay what they are, a check never waits, reads have a limit."""

from __future__ import annotations

import os
import stat
import threading

import pytest

from wsync.cli.output import check_writable, write_json
from wsync.errors import ConfigError
from wsync.spec.files import check_file, read_file, write_file


def test_a_symlink_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to("folder/target")
    before = target.stat().st_ino
    check_file(link, "link")
    write_file(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert target.stat().st_ino != before
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["target"]


def test_a_symlink_to_nothing_makes_its_target(tmp_path):
    (tmp_path / "link").symlink_to("target")
    check_file(tmp_path / "link", "link")
    write_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


def test_a_device_is_written_to_and_stays_one(tmp_path):
    (tmp_path / "null").symlink_to("/dev/null")
    for path in ("/dev/null", tmp_path / "null"):
        check_file(path, "it")
        write_file(path, b"data", 0o644)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert (tmp_path / "null").is_symlink()
    with pytest.raises(ConfigError, match="/dev/full cannot be written: No space left on device"):
        write_file("/dev/full", b"data")


def test_a_named_pipe_is_checked_without_waiting_and_gets_all_bytes(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable(str(pipe), "--json")  # with nobody at its other end this would wait for ever
    received = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_json({"a": "x" * 200_000}, str(pipe))
    reader.join(30)
    assert len(received[0]) > 200_000
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_check_changes_nothing(tmp_path):
    (tmp_path / "file").write_text("old")
    check_file(tmp_path / "file", "file")
    check_file(tmp_path / "new", "new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file": "old"}


def test_what_cannot_be_written_is_named(tmp_path):
    for path, said in (
        (tmp_path, "it is a folder"),
        (tmp_path / "no" / "file", f"the folder {tmp_path / 'no'} does not exist"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_file(path, f"--json {path}")
        with pytest.raises(ConfigError, match="cannot be written"):
            write_file(path, b"data")
    assert list(tmp_path.iterdir()) == []


def test_reading_stops_at_the_limit_of_what_has_no_end(tmp_path):
    with pytest.raises(ConfigError, match="list '/dev/zero' has 1001 bytes or more, allowed are 1000"):
        read_file("/dev/zero", 1000, "list")
    (tmp_path / "file").write_bytes(b"x" * 1000)
    assert read_file(tmp_path / "file", 1000) == b"x" * 1000
    with pytest.raises(ConfigError, match="has 1000 bytes or more, allowed are 999"):
        read_file(tmp_path / "file", 999)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_file(tmp_path, 1)


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
            write_file(path, b"new")
    # What is unfinished has another ending: collectors read folders by it.
    assert [name.endswith(".tmp") for name in seen] == [True, False]
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.prom"]
    write_file(path, b"new")
    assert path.read_bytes() == b"new"


def test_who_may_read_it_is_said_or_left_to_the_umask(tmp_path):
    path = tmp_path / "file"
    before = os.umask(0o077)
    try:
        write_file(path, b"")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        write_file(path, b"", 0o644)
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(before)
