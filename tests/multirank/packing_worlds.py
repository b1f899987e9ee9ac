"""A trainer rank and packing engines in one process."""

from __future__ import annotations

import threading
import time

import torch
from packing_engine import SHAPE, PackingEngine

import wsync
from wsync.plan.types import PlanOptions

NAMES = tuple("abcdef")


def make_weights(seed):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randint(-(2**15), 2**15, SHAPE, generator=g).to(torch.int16) for n in NAMES}


def change(weights, seed):
    for name, new in make_weights(seed).items():
        weights[name].copy_(new)


def simple(**args):
    """``a`` and ``b`` live, ``c`` and ``d`` repacked together, ``e`` and ``f`` each by itself."""
    return PackingEngine(list(NAMES), [[2, 3], [4], [5]], **args)


class World:
    """A trainer rank and engines in this process, each committing on a thread of its own."""

    def __init__(self, key_file, engines, *, transport="shm", bucket_bytes=4 << 20):
        self.weights = make_weights(0)
        self.source = wsync.Source(
            self.weights,
            store="tcp://127.0.0.1:0",
            key_file=key_file,
            transport=transport,
            options=PlanOptions(bucket_bytes),
        )
        self.engines = engines
        self.sinks = {}
        for name, engine in engines.items():
            self.sinks[name] = wsync.Sink(engine, store=self.source.store, key_file=key_file, replica=name)
        self.version = 0

    def publish(self, **args):
        self.version += 1
        return self.source.publish(self.version, deadline_s=20, **args)

    def sync(self):
        errors = []

        def engine(sink):
            try:
                sink.commit(sink.prepare(20))
            except wsync.WsyncError as e:
                errors.append(e)

        threads = [threading.Thread(target=engine, args=(s,), name="engine") for s in self.sinks.values()]
        for thread in threads:
            thread.start()
        try:
            return self.publish().wait_committed()
        finally:
            for thread in threads:
                thread.join()
            self.errors = errors

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for sink in self.sinks.values():
            sink.close()
        self.source.close()


def one(key_file, engine, **args):
    return World(key_file, {"engine-0": engine}, **args)


class Pair:
    """Two engine ranks of one replica, rank 1 with the brakes on."""

    def __init__(self, world, key_file, engines):
        self.sinks = [
            wsync.Sink(e, store=world.source.store, key_file=key_file, replica="pair", rank=i, world_size=2)
            for i, e in enumerate(engines)
        ]
        for sink in self.sinks:
            sink.start()

    def commit(self, version):
        errors = []

        def commit(sink):
            try:
                sink.commit(sink.wait(version, 20))
            except wsync.WsyncError as e:
                errors.append(e)

        threads = [threading.Thread(target=commit, args=(sink,)) for sink in self.sinks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return errors

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for sink in self.sinks:
            sink.close()


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
