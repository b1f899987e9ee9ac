"""A publish in the steady state replays a program: no metadata per tensor, no memory that grows with publishes."""

from __future__ import annotations

import threading
import tracemalloc

import pytest
import torch

import wsync
from wsync.session import channel as channel_module
from wsync.session import coordinator as coordinator_module


@pytest.fixture
def key_file(tmp_path):
    return wsync.new_key_file(tmp_path / "wsync.key")


class Running:
    """A Source and a Sink in one process."""

    def __init__(self, num_tensors, key_file):
        self.trainer = {f"layer{i}.weight": torch.randn(64, 32).to(torch.bfloat16) for i in range(num_tensors)}
        self.engine = {n: torch.zeros_like(t) for n, t in self.trainer.items()}
        self.source = wsync.Source(self.trainer, store="tcp://127.0.0.1:0", key_file=key_file)
        self.sink = wsync.Sink(self.engine, store=self.source.store, key_file=key_file)
        self.version = 0

    def sync(self):
        self.version += 1
        engine = threading.Thread(target=lambda: self.sink.commit(self.sink.prepare(20)))
        engine.start()
        report = self.source.publish(self.version, deadline_s=20).wait_committed()
        engine.join()
        return report

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sink.close()
        self.source.close()


def bytes_of_one_publish(monkeypatch, num_tensors, key_file):
    """Bytes of every control message of a publish, pings left out, times rounded away."""
    sizes = []

    def counted(message, encode):
        frame = encode(message)
        if type(message).__name__ not in ("Ping", "Pong"):
            sizes.append((type(message).__name__, len(frame)))
        return frame

    with Running(num_tensors, key_file) as running:
        running.sync()
        for module in (channel_module, coordinator_module):
            encode = module.encode_message
            monkeypatch.setattr(module, "encode_message", lambda m, e=encode: counted(m, e))
        running.sync()
        monkeypatch.undo()
    return sorted(sizes)


def test_control_messages_do_not_grow_with_the_model(monkeypatch, key_file):
    small = bytes_of_one_publish(monkeypatch, 2, key_file)
    large = bytes_of_one_publish(monkeypatch, 500, key_file)
    assert [name for name, _ in small] == [name for name, _ in large]
    assert sum(size for _, size in small) < 2000
    # The report carries byte counts, whose encoding is a few bytes longer for larger numbers.
    assert abs(sum(size for _, size in large) - sum(size for _, size in small)) < 64
    assert not {"Setup", "Connect", "NameTable", "SinkDescribed"} & {name for name, _ in large}


def test_python_memory_does_not_grow_with_publishes(key_file):
    with Running(200, key_file) as running:
        for _ in range(3):
            running.sync()
        tracemalloc.start()
        try:
            running.sync()
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(10):
                running.sync()
            after, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert after - before < 64 << 10
    # 200 tensors of 4 KiB: a copy of the model would be 800 KiB.
    assert peak - before < 400 << 10


def test_staging_stays_where_it_is(key_file):
    with Running(10, key_file) as running:
        running.sync()
        end = running.source._session._end
        addresses = [end.address(i) for i in range(len(running.source._session._slice.buckets))]
        for _ in range(3):
            running.sync()
        assert running.source._session._end is end
        assert addresses == [end.address(i) for i in range(len(addresses))]
