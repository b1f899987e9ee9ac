"""What the shared-memory segment promises below the transport's contract."""

import os
import secrets
import signal
import stat
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from wsync.errors import ConfigError, ConnectError, FormatVersionError, PlanMismatchError, StateError
from wsync.testing.transport_actors import Actor, memory_at
from wsync.testing.transport_crew import Crew, hand_plan

_C = pytest.importorskip("wsync._C")


def new_name() -> str:
    return f"wsync-stage-{secrets.token_hex(16)}"


def shape(**changes: int) -> object:
    fields = {
        "rank": 3,
        "num_openers": 2,
        "num_buckets": 2,
        "bucket_bytes": 4096,
        "exchange_elements": 5,
        "plan_token": 77,
    }
    return _C.ShmGeometry(**{**fields, **changes})


@pytest.fixture
def segment():
    name = new_name()
    made = _C.ShmSegment.create(name, shape())
    yield name, made
    made.close()


def in_child(action, meanwhile=lambda: None) -> int:
    """Runs ``action`` in a forked child and returns its exit status; ``meanwhile`` runs in the parent."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = int(action() or 0)
        finally:
            os._exit(status)
    meanwhile()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_new_segment_is_zeroed_private_and_page_aligned(segment):
    name, made = segment
    file = Path("/dev/shm") / name
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert made.address(0) % 4096 == 0
    assert made.address(1) == made.address(0) + 4096
    assert not memory_at(made.address(0), 8192).any()
    assert not made.exchange().any()
    assert made.exchange().shape == (5,)


def test_a_reader_in_another_process_sees_bytes_digest_and_order_of_publication(segment):
    name, made = segment

    def read() -> int:
        reader = _C.ShmSegment.open(name, shape())
        deadline = time.monotonic() + 5
        while reader.take(1, 9) is None and time.monotonic() < deadline:
            reader.wait(reader.bell(), 0.01)
        assert reader.take(0, 9) == (1, 2**64 - 1, 256)
        assert reader.take(1, 9) == (0, 5, 0)
        assert reader.take(1, 8) is None
        assert memory_at(reader.address(1), 4096).tobytes() == b"\x2a" * 4096
        assert reader.alive()
        return 0

    def write() -> None:
        time.sleep(0.2)
        made.begin(9)
        memory_at(made.address(1), 4096)[:] = 0x2A
        made.publish(1, 2**64 - 1, 256)
        made.publish(0, 5, 0)
        made.ring()

    assert in_child(read, meanwhile=write) == 0


def permissions_at(address: int) -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(x, 16) for x in line.split()[0].split("-"))
        if first <= address < last:
            return line.split()[1]
    return ""


def test_buckets_are_read_only_for_readers(segment):
    name, made = segment

    def look() -> int:
        reader = _C.ShmSegment.open(name, shape())
        return 0 if permissions_at(reader.address(0)) == permissions_at(reader.address(1)) == "r--s" else 1

    assert in_child(look) == 0
    assert permissions_at(made.address(0)) == "rw-s"


def test_the_last_end_that_opens_removes_the_name(segment):
    name, made = segment
    first = _C.ShmSegment.open(name, shape())
    assert (Path("/dev/shm") / name).exists()
    second = _C.ShmSegment.open(name, shape())
    assert not (Path("/dev/shm") / name).exists()
    with pytest.raises(ConnectError, match="cannot be opened"):
        _C.ShmSegment.open(new_name(), shape())
    for end in (first, second, made):
        end.close()
        end.close()


def test_beginning_a_version_removes_a_name_that_is_still_there(segment):
    name, made = segment
    made.begin(1)
    assert not (Path("/dev/shm") / name).exists()


def test_a_slot_of_an_overwritten_version_is_not_taken(segment):
    _, made = segment
    made.begin(4)
    made.publish(0, 1, 1)
    assert made.take(0, 4) == (0, 1, 1)
    made.begin(5)
    assert made.take(0, 4) is None
    assert made.take(0, 5) is None
    assert made.current() == 5


@pytest.mark.parametrize(
    ("field", "value"), [("rank", 4), ("bucket_bytes", 4096 - 256), ("plan_token", 78), ("exchange_elements", 6)]
)
def test_a_segment_that_is_not_as_offered_is_refused_with_both_values(segment, field, value):
    name, _ = segment
    with pytest.raises(PlanMismatchError) as raised:
        _C.ShmSegment.open(name, shape(**{field: value}))
    assert str(value) in str(raised.value)


def test_a_file_that_is_too_short_is_refused_before_it_is_mapped():
    name = new_name()
    file = Path("/dev/shm") / name
    file.write_bytes(b"WSYNCSHM")
    try:
        with pytest.raises(PlanMismatchError, match="has 8 bytes"):
            _C.ShmSegment.open(name, shape())
    finally:
        file.unlink()


@pytest.mark.parametrize(("offset", "word"), [(0, "magic"), (8, "format version")])
def test_a_header_of_something_else_is_refused(segment, offset, word):
    name, _ = segment

    def spoil_and_open() -> int:
        with open(f"/dev/shm/{name}", "r+b") as file:
            file.seek(offset)
            file.write(b"\xee\xee")
        with pytest.raises(FormatVersionError, match=word):
            _C.ShmSegment.open(name, shape())
        return 0

    assert in_child(spoil_and_open) == 0


@pytest.mark.parametrize("name", ["", "other", "wsync-stage-../../tmp/x", "wsync-stage-" + "a" * 300])
def test_names_that_are_not_ours_are_refused(name):
    with pytest.raises(ConfigError):
        _C.ShmSegment.open(name, shape())


def test_a_full_dev_shm_is_a_named_error_and_not_a_signal():
    name = new_name()
    with pytest.raises(ConfigError, match="/dev/shm has") as raised:
        _C.ShmSegment.create(name, shape(num_buckets=1 << 28, bucket_bytes=1 << 20))
    assert "--shm-size" in raised.value.hint
    assert not (Path("/dev/shm") / name).exists()


def test_sizes_that_overflow_are_refused():
    with pytest.raises(ConfigError, match="overflows"):
        _C.ShmSegment.create(new_name(), shape(num_buckets=1 << 40, bucket_bytes=1 << 40))


def test_an_existing_name_is_never_reused(segment):
    with pytest.raises(ConnectError, match="File exists"):
        _C.ShmSegment.create(segment[0], shape())


def test_a_closed_segment_refuses_calls_instead_of_crashing(segment):
    _, made = segment
    made.close()
    for call in (made.current, made.bell, made.ring, lambda: made.address(0), lambda: made.publish(0, 0, 0)):
        with pytest.raises(ConfigError, match="closed"):
            call()


def test_memory_stays_mapped_after_close_until_the_object_goes(segment):
    _, made = segment

    def touch() -> int:
        mine = _C.ShmSegment.create(new_name(), shape())
        address, exchanged = mine.address(1), mine.exchange()
        mine.close()
        memory_at(address, 4096)[:] = 1
        exchanged[:] = 2
        del mine
        if not permissions_at(address):  # the array still holds it
            return 2
        del exchanged
        return 3 if permissions_at(address) else 0

    assert in_child(touch) == 0
    assert made.alive()


def test_closing_ends_a_wait_in_another_thread_at_once():
    for owner in (True, False):
        name = new_name()
        made = _C.ShmSegment.create(name, shape())
        end = made if owner else _C.ShmSegment.open(name, shape())
        threading.Timer(0.1, end.close).start()
        began = time.monotonic()
        end.wait(end.bell(), 5.0)
        assert time.monotonic() - began < 2.0
        with pytest.raises(StateError, match="closed"):
            end.wait(0, 0.0)
        made.close()


def test_closing_while_other_threads_wait_never_crashes():
    def race() -> int:
        for _ in range(150):
            made = _C.ShmSegment.create(new_name(), shape())
            started = threading.Barrier(4)

            def spin(made=made, started=started) -> None:
                started.wait()
                try:
                    while True:
                        made.wait(made.bell(), 0.00001)
                except StateError:
                    pass

            threads = [threading.Thread(target=spin) for _ in range(3)]
            for thread in threads:
                thread.start()
            started.wait()
            made.close()
            for thread in threads:
                thread.join()
        return 0

    assert in_child(race) == 0


def test_a_reader_learns_that_the_owner_closed_or_was_killed():
    for kill in (False, True):
        name = new_name()
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            owner = _C.ShmSegment.create(name, shape())
            os.write(write_end, b"x")
            time.sleep(0.5)
            if not kill:
                owner.close()
            time.sleep(30)
            os._exit(0)
        os.read(read_end, 1)
        reader = _C.ShmSegment.open(name, shape())
        assert reader.alive()
        if kill:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        deadline = time.monotonic() + 5
        while reader.alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not reader.alive()
        assert reader.owner_closed == (not kill)
        assert reader.current() == 0  # the memory stays readable
        reader.close()
        if not kill:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        else:
            assert _C.shm_sweep_stale() == 0  # too young: its owner might not have locked it yet
            assert _C.shm_sweep_stale(0.0) == 1
        assert not (Path("/dev/shm") / name).exists()


def test_sweeping_leaves_segments_whose_owner_lives(segment):
    name, _ = segment
    assert in_child(lambda: _C.shm_sweep_stale(0.0)) == 0
    assert _C.shm_sweep_stale(0.0) == 0
    assert (Path("/dev/shm") / name).exists()

    def still_locked() -> int:
        return 0 if _C.ShmSegment.open(name, shape()).alive() else 1

    assert in_child(still_locked) == 0


def test_a_forked_child_that_ends_leaves_the_segment_alone(segment):
    name, made = segment

    def close_copy() -> int:
        made.close()
        return 0

    assert in_child(close_copy) == 0
    assert (Path("/dev/shm") / name).exists()
    assert made.alive()
    assert not made.owner_closed


def test_a_ring_wakes_a_waiter_long_before_its_timeout(segment):
    _, made = segment
    seen = made.bell()
    threading.Timer(0.1, made.ring).start()
    began = time.monotonic()
    assert made.wait(seen, 5.0)
    assert 0.05 < time.monotonic() - began < 2.0
    began = time.monotonic()
    assert not made.wait(made.bell(), 0.05)
    assert 0.04 < time.monotonic() - began < 1.0


def test_the_exchange_area_is_shared_memory_of_floats(segment):
    name, made = segment
    made.exchange()[:] = np.arange(5, dtype=np.float32)
    made.set_exchange_version(6)

    def read() -> int:
        reader = _C.ShmSegment.open(name, shape())
        return 0 if reader.exchange_version() == 6 and reader.exchange().tolist() == [0, 1, 2, 3, 4] else 1

    assert in_child(read) == 0


@pytest.mark.multiproc
def test_an_owner_killed_before_anybody_opened_is_swept_by_the_next_prepare():
    class OnePool:
        def __init__(self) -> None:
            self.actors = [Actor(in_process=False) for _ in range(2)]

        def take(self, count: int) -> list[Actor]:
            return self.actors

        def give_back(self, actors: list[Actor]) -> None:
            for actor in actors:
                actor.stop()

    crew = Crew(OnePool(), "shm", hand_plan(num_sources=1, num_sinks=1))
    assert not any(answer.error for answer in crew.prepare())
    assert sum(name.startswith("wsync-stage-") for name in os.listdir("/dev/shm")) >= 2
    crew.sources[0].kill()
    assert _C.shm_sweep_stale(0.0) >= 1
    crew.close()
