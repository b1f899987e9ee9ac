"""Single operations of the transports: one version from a source process to one or two sink processes, against memcpy.

An operation copies 64 MiB into staging bucket by bucket, publishes each, and copies every bucket out at each sink; its
bytes are what the source published. `memcpy` is the same copy inside one process, out of and into the same amount of
memory. Run with ``pytest bench/test_transports.py``; compare within one run only.
"""

import itertools

import msgspec
import numpy as np
import pytest

from wsync.plan.types import SOURCE
from wsync.testing.transport_actors import ActorPool
from wsync.testing.transport_crew import Crew, HandPlan, hand_plan

BUCKET_BYTES = 4 << 20
NUM_BUCKETS = 16
ROUNDS = 8


@pytest.fixture(scope="module")
def processes():
    pool = ActorPool(in_process=False)
    yield pool
    pool.stop()


def shared_plan(num_sinks: int, chain: bool) -> HandPlan:
    """One source whose full buckets all go to every sink."""
    plan = hand_plan(1, num_sinks, NUM_BUCKETS, BUCKET_BYTES)
    sinks = tuple(range(num_sinks))
    senders = (SOURCE, *sinks[:-1]) if chain else (SOURCE,) * num_sinks
    hops = tuple(zip(senders, sinks, strict=True))
    buckets = tuple(
        msgspec.structs.replace(bucket, sinks=sinks, hops=hops, used_bytes=BUCKET_BYTES)
        for bucket in plan.sources[0].buckets
    )
    return HandPlan(
        (msgspec.structs.replace(plan.sources[0], buckets=buckets),),
        tuple(msgspec.structs.replace(sink, buckets=buckets) for sink in plan.sinks),
    )


def report(benchmark, num_sinks: int) -> None:
    """Adds GB/s of the median, counted once for each byte that a sink got."""
    num_bytes = NUM_BUCKETS * BUCKET_BYTES
    benchmark.extra_info["num_bytes"] = num_bytes
    benchmark.extra_info["gbps_published"] = round(num_bytes / benchmark.stats.stats.median / 1e9, 3)
    benchmark.extra_info["gbps_delivered"] = round(num_sinks * num_bytes / benchmark.stats.stats.median / 1e9, 3)


@pytest.mark.benchmark(group="one version of 64 MiB")
@pytest.mark.parametrize(
    ("transport", "num_sinks", "chain"),
    [("shm", 1, False), ("shm", 2, False), ("gloo", 1, False), ("gloo", 2, False), ("gloo", 2, True)],
)
def test_a_version_between_processes(benchmark, processes, transport, num_sinks, chain):
    versions = itertools.count(1)
    with Crew(processes, transport, shared_plan(num_sinks, chain)) as crew:

        def sync() -> None:
            answers = crew.sync(next(versions), copy_out=True)
            assert not any(answer.error for answer in answers)

        benchmark.pedantic(sync, rounds=ROUNDS, warmup_rounds=2)
    report(benchmark, num_sinks)


@pytest.mark.benchmark(group="one version of 64 MiB")
def test_memcpy_in_one_process(benchmark):
    own = np.ones(BUCKET_BYTES, dtype=np.uint8)
    staging = np.ones((NUM_BUCKETS, BUCKET_BYTES), dtype=np.uint8)

    def copy() -> None:
        for bucket in staging:
            bucket[:] = own
            own[:] = bucket

    benchmark.pedantic(copy, rounds=ROUNDS, warmup_rounds=2)
    report(benchmark, 1)


@pytest.mark.benchmark(group="latency")
@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_a_version_of_one_small_bucket(benchmark, processes, transport):
    versions = itertools.count(1)
    with Crew(processes, transport, hand_plan(1, 1, 1, 256)) as crew:

        def sync() -> None:
            assert not any(answer.error for answer in crew.sync(next(versions), copy_out=True))

        benchmark.pedantic(sync, rounds=50, warmup_rounds=5)


@pytest.mark.benchmark(group="exchange")
@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_exchanging_maxima_of_two_ranks(benchmark, processes, transport):
    versions = itertools.count(1)
    vector = tuple(float(i) for i in range(10_000))
    with Crew(processes, transport, hand_plan(2, 1, 1, 256, amax_elements=len(vector))) as crew:

        def sync() -> None:
            assert not any(answer.error for answer in crew.sync(next(versions), [vector] * 2, copy_out=True))

        benchmark.pedantic(sync, rounds=10, warmup_rounds=2)
