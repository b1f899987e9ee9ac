"""The pieces that transports share: names, offers, slices, the exchange's steps, waiting."""

import time

import msgspec
import numpy as np
import pytest

from wsync.errors import ConfigError, ConnectError, DeadlineError, FormatVersionError, PeerLostError, StateError
from wsync.plan.types import SOURCE
from wsync.testing.transport_actors import ActorPool
from wsync.testing.transport_crew import Crew, hand_plan
from wsync.transport import TRANSPORTS, choose_transport, host_identity, open_sink, open_source
from wsync.transport.checks import check_hops, check_source_slice
from wsync.transport.gloo_connect import own_address
from wsync.transport.gloo_exchange import partners
from wsync.transport.offers import OFFER_FORMAT, Offer, decode_offer, encode_offer
from wsync.transport.waiting import Patience


@pytest.mark.parametrize("opener", [open_source, open_sink])
def test_an_unknown_transport_is_refused_and_the_known_ones_are_listed(opener):
    with pytest.raises(ConfigError, match=r"'carrier-pigeon'; known: loopback, shm, gloo"):
        opener("carrier-pigeon")


@pytest.mark.parametrize("name", TRANSPORTS)
def test_every_listed_transport_opens_and_closes_unprepared(name):
    for end in (open_source(name), open_sink(name)):
        end.close()
        end.close()


def test_one_host_gets_shared_memory_and_several_get_gloo():
    assert choose_transport(["a", "a", "a"]) == "shm"
    assert choose_transport(["a", "b", "a"]) == "gloo"
    assert choose_transport([host_identity()]) == "shm"
    with pytest.raises(ConfigError):
        choose_transport([])


def make_offer(**changes: object) -> Offer:
    fields = {
        "format_version": OFFER_FORMAT,
        "transport": "shm",
        "side": "source",
        "rank": 1,
        "plan_digest": "d",
        "host": "h",
        "bucket_bytes": 256,
    }
    return Offer(**{**fields, **changes})


def test_an_offer_survives_the_trip_and_a_newer_one_is_named():
    offer = make_offer(buckets=(3, 1), addresses=(("10.0.0.1", 7),), segment="s", num_openers=2)
    assert decode_offer(encode_offer(offer), "shm", "source", 1) == offer
    with pytest.raises(FormatVersionError, match=f"format {OFFER_FORMAT + 1} .* reads {OFFER_FORMAT}"):
        decode_offer(encode_offer(make_offer(format_version=OFFER_FORMAT + 1)), "shm", "source", 1)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "cannot be decoded"),
        (b"\x80", "cannot be decoded"),
        (msgspec.msgpack.encode({"format_version": OFFER_FORMAT, "exploit": 1}), "cannot be decoded"),
        (encode_offer(make_offer(rank=2)), "rank 2"),
        (encode_offer(make_offer(transport="gloo")), "'gloo' and this end uses 'shm'"),
        (b"\0" * ((16 << 20) + 1), "at most"),
    ],
)
def test_an_offer_that_does_not_belong_here_is_refused(raw, words):
    with pytest.raises(ConfigError, match=words):
        decode_offer(raw, "shm", "source", 1)


@pytest.mark.parametrize("num_ranks", range(1, 18))
def test_recursive_doubling_brings_every_maximum_to_every_rank(num_ranks):
    """Runs the steps on plain sets: each rank must end up with what every rank began with."""
    known = [{rank} for rank in range(num_ranks)]
    todo = [list(partners(rank, num_ranks)) for rank in range(num_ranks)]
    sent: dict[tuple[int, int], list[set[int]]] = {}
    posted = [False] * num_ranks
    for _ in range(40 * num_ranks):
        for rank in range(num_ranks):
            if not todo[rank]:
                continue
            other, way = todo[rank][0]
            if way != "receive" and not posted[rank]:
                sent.setdefault((rank, other), []).append(set(known[rank]))
                posted[rank] = True
            if way != "send":
                queue = sent.get((other, rank), [])
                if not queue:
                    continue
                known[rank] |= queue.pop(0)
            todo[rank].pop(0)
            posted[rank] = False
    assert all(not steps for steps in todo)
    assert all(found == set(range(num_ranks)) for found in known)
    assert max(len(partners(rank, num_ranks)) for rank in range(num_ranks)) <= num_ranks.bit_length() + 1


@pytest.mark.parametrize(
    "hops", [(), ((SOURCE, 0),), ((0, 1), (SOURCE, 0)), ((SOURCE, 0), (SOURCE, 1), (0, 1)), ((SOURCE, 0), (0, 2))]
)
def test_a_delivery_tree_that_misses_or_repeats_a_sink_is_refused(hops):
    bucket = msgspec.structs.replace(hand_plan().sources[0].buckets[0], hops=hops)
    assert bucket.sinks == (0, 1)
    with pytest.raises(ConfigError, match="bucket 0"):
        check_hops(bucket)


@pytest.mark.parametrize("changes", [{"bucket_bytes": 100}, {"bucket_bytes": 0}, {"bucket_bytes": 256}, {"rank": 2}])
def test_a_source_slice_that_does_not_add_up_is_refused(changes):
    with pytest.raises(ConfigError):
        check_source_slice(msgspec.structs.replace(hand_plan().sources[0], **changes), 2)


def test_patience_calls_cancelled_about_every_ten_milliseconds_and_ends_at_its_deadline():
    calls = []
    began = time.monotonic()
    patience = Patience(began + 0.2, lambda: calls.append(time.monotonic()))

    def wait_for_nothing() -> None:
        while True:
            patience.check(lambda: "the test waited")
            time.sleep(patience.slice_s / 5)

    with pytest.raises(DeadlineError, match=r"the test waited, gave up after 0\.2"):
        wait_for_nothing()
    assert 0.19 < time.monotonic() - began < 0.5
    assert 5 <= len(calls) <= 21


def test_exchanging_a_vector_of_another_shape_is_refused():
    source = open_source("loopback")
    offer = source.prepare(hand_plan(num_sources=1, num_sinks=1, amax_elements=4).sources[0], 1)
    sink = open_sink("loopback")
    sink_offer = sink.prepare(hand_plan(num_sources=1, num_sinks=1).sinks[0])
    source.connect([offer], [sink_offer], time.monotonic() + 5)
    source.begin(1, time.monotonic() + 5, lambda: None)
    for wrong in (np.zeros(3, np.float32), np.zeros(4, np.float64), np.zeros(8, np.float32)[::2]):
        with pytest.raises(ConfigError, match=r"float32 \[4\]"):
            source.exchange_max(wrong, time.monotonic() + 5, lambda: None)
    source.exchange_max(np.zeros(4, np.float32), time.monotonic() + 5, lambda: None)
    with pytest.raises(StateError, match="twice"):
        source.exchange_max(np.zeros(4, np.float32), time.monotonic() + 5, lambda: None)
    source.close()
    sink.close()


def test_loopback_staging_of_another_process_is_refused():
    plan = hand_plan(num_sources=1, num_sinks=1)
    sink = open_sink("loopback")
    mine = sink.prepare(plan.sinks[0])
    foreign = make_offer(
        transport="loopback",
        rank=0,
        plan_digest="plan-a",
        bucket_bytes=plan.sinks[0].bucket_bytes,
        buckets=tuple(b.bucket_idx for b in plan.sources[0].buckets),
        host=host_identity(),
        segment="elsewhere",
    )
    with pytest.raises(ConnectError, match="not in this process"):
        sink.connect([encode_offer(foreign)], [mine], time.monotonic() + 1)
    sink.close()


def test_shm_between_different_hosts_is_refused_with_a_hint():
    pytest.importorskip("wsync._C")
    plan = hand_plan(num_sources=1, num_sinks=1)
    sink = open_sink("shm")
    mine = sink.prepare(plan.sinks[0])
    foreign = make_offer(
        rank=0,
        plan_digest="plan-a",
        bucket_bytes=plan.sinks[0].bucket_bytes,
        buckets=tuple(b.bucket_idx for b in plan.sources[0].buckets),
        host="far-away",
    )
    with pytest.raises(ConfigError, match="far-away") as raised:
        sink.connect([encode_offer(foreign)], [mine], time.monotonic() + 1)
    assert "gloo" in raised.value.hint
    sink.close()


def test_gloo_reports_within_the_deadline_that_not_everybody_came():
    source = open_source("gloo")
    plan = hand_plan(num_sources=1, num_sinks=1)
    offer = source.prepare(plan.sources[0], 1)
    sink = open_sink("gloo")
    sink_offer = sink.prepare(plan.sinks[0])
    began = time.monotonic()
    with pytest.raises(PeerLostError, match=r"rank 0 .* 1 other ends .* sink 0 .* did not come"):
        source.connect([offer], [sink_offer], began + 1.0)
    assert time.monotonic() - began < 4.0
    source.close()
    with pytest.raises((DeadlineError, PeerLostError), match=r"sink 0 .* tried to reach"):
        sink.connect([offer], [sink_offer], time.monotonic() + 1.0)
    sink.close()


def test_gloo_connects_over_the_hosts_own_address_when_hosts_differ(monkeypatch):
    names = iter(("host-a", "host-b"))
    monkeypatch.setattr("wsync.transport.gloo.host_identity", lambda: next(names))
    address = own_address()
    if address.startswith("127."):
        pytest.skip("this machine has no other address")
    pool = ActorPool(in_process=True)
    plan = hand_plan(num_sources=1, num_sinks=1)
    with Crew(pool, "gloo", plan) as crew:
        for version in (1, 2):
            answers = crew.sync(version)
            assert {(a.bucket_pos, a.digest, a.sha1) for a in answers[1].arrivals} == crew.expected(0, version)
        assert address.encode() in crew.source_offers[0]
    pool.stop()


def test_an_interface_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    with pytest.raises(ConnectError, match="'nosuch0'"):
        own_address()


def test_an_address_of_another_host_cannot_be_bound():
    source = open_source("gloo", address="203.0.113.7")
    with pytest.raises(ConnectError, match=r"203\.0\.113\.7"):
        source.prepare(hand_plan(num_sources=1, num_sinks=1).sources[0], 1)
    source.close()
