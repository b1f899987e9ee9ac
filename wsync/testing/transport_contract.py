"""What every transport must do, as one suite that its author runs:

    class TestMyTransport(TransportContract):
        transport = "mine"
        source_factory = "my_package.transport:open_source"     # called with the name above
        sink_factory = "my_package.transport:open_sink"

Ends run in processes of their own, or in threads of one process where ``in_process`` is true. Needs pytest.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator, Sequence
from typing import ClassVar

import msgspec
import pytest

from wsync.testing.transport_actors import CANCELLED, ActorPool, Answer, Command
from wsync.testing.transport_checks import check, check_fine, check_raised, check_stopped
from wsync.testing.transport_crew import Crew, HandPlan, ask_all, hand_plan
from wsync.testing.transport_sickness import SicknessContract

NAMED_LOSS = ("PeerLostError", "DeadlineError")
"""What a lost peer may be reported as."""


def shared_names() -> set[str]:
    """Segments of wsync in /dev/shm."""
    return {name for name in os.listdir("/dev/shm") if name.startswith("wsync-stage-")}


_processes = ActorPool(in_process=False)


class TransportContract(SicknessContract):
    """The suite; see the module."""

    transport: ClassVar[str]
    source_factory: ClassVar[str] = "wsync.transport:open_source"
    sink_factory: ClassVar[str] = "wsync.transport:open_sink"
    in_process: ClassVar[bool] = False

    @pytest.fixture(scope="class")
    @classmethod
    def pool(cls) -> Iterator[ActorPool]:
        """Actors that tests share; processes serve every transport, and end with the test run."""
        if cls.in_process:
            pool = ActorPool(in_process=True)
            yield pool
            pool.stop()
        else:
            yield _processes

    def crew(self, pool: ActorPool, plan: HandPlan) -> Crew:
        """A crew of this transport."""
        return Crew(pool, self.transport, plan, self.source_factory, self.sink_factory)

    def check_arrived(self, crew: Crew, version: int, answers: Sequence[Answer]) -> None:
        """Every sink found every bucket of ``version`` exactly once, bit for bit."""
        check_fine(answers)
        for sink, answer in enumerate(answers[len(crew.sources) :]):
            found = [(a.bucket_pos, a.digest, a.sha1) for a in answer.arrivals]
            check(len(found) == len(set(found)), "a bucket arrived twice at sink", sink)
            check(set(found) == crew.expected(sink, version), "sink", sink, "got other bytes or digests")

    # ---- what moves

    def test_bytes_and_digests_arrive_exactly_at_sinks_that_share_buckets(self, pool: ActorPool) -> None:
        with self.crew(pool, hand_plan(num_sources=2, num_sinks=2, buckets_per_source=6)) as crew:
            self.check_arrived(crew, 1, crew.sync(1))

    def test_buckets_are_relayed_along_their_hops(self, pool: ActorPool) -> None:
        with self.crew(pool, hand_plan(num_sources=1, num_sinks=3, buckets_per_source=7, chain=True)) as crew:
            for version in (1, 2, 3):
                self.check_arrived(crew, version, crew.sync(version))

    def test_a_message_may_be_shorter_than_its_bucket_and_is_relayed_so(self, pool: ActorPool) -> None:
        for chain in (False, True):
            plan = hand_plan(num_sources=2, num_sinks=2, buckets_per_source=5, chain=chain)
            with self.crew(pool, plan) as crew:
                for version, shares in enumerate([(0.3, 1.0), (0.0, 0.01), (1.0, 1.0), (0.999, 0.5)], 1):
                    answers = crew.sync(version, shares=shares)
                    check_fine(answers)
                    for sink, answer in enumerate(answers[2:]):
                        found = [(a.bucket_pos, a.digest, a.sha1) for a in answer.arrivals]
                        check(len(found) == len(set(found)), "a bucket arrived twice at sink", sink)
                        check(set(found) == crew.expected(sink, version, shares), "sink", sink, "got other bytes")

    def test_a_rank_without_buckets_and_a_sink_without_buckets_take_part(self, pool: ActorPool) -> None:
        plan = hand_plan(num_sources=2, num_sinks=2, buckets_per_source=3)
        idle_source = msgspec.structs.replace(plan.sources[1], buckets=())
        idle_sink = msgspec.structs.replace(plan.sinks[1], buckets=())
        only = [msgspec.structs.replace(b, sinks=(0,), hops=((-1, 0),)) for b in plan.sources[0].buckets]
        busy_source = msgspec.structs.replace(plan.sources[0], buckets=tuple(only))
        busy_sink = msgspec.structs.replace(plan.sinks[0], buckets=tuple(only))
        with self.crew(pool, HandPlan((busy_source, idle_source), (busy_sink, idle_sink))) as crew:
            self.check_arrived(crew, 1, crew.sync(1))

    def test_many_versions_reuse_the_same_memory(self, pool: ActorPool) -> None:
        plan = hand_plan(num_sources=2, num_sinks=2, buckets_per_source=8, bucket_bytes=1 << 20, amax_elements=1000)
        vectors = [tuple(float(i % 7) for i in range(1000))] * 2
        with self.crew(pool, plan) as crew:
            # Before the first look: making contents leaves memory with the allocator of each thread.
            staged = {a.address for answer in crew.sync(1, vectors)[2:] for a in answer.arrivals}
            for version in (2, 3, 4):
                check_fine(crew.sync(version, vectors, copy_out=True))
            before = [a.number for a in ask_all(crew.actors, Command("resident"))]
            places = [a.number for a in ask_all(crew.sources, Command("addresses"))]
            for version in range(5, 25):
                answers = crew.sync(version, vectors, copy_out=True)
                check_fine(answers)
                found = {a.address for answer in answers[2:] for a in answer.arrivals}
                check(found == staged, "buckets arrived at other addresses")
            after = [a.number for a in ask_all(crew.actors, Command("resident"))]
            check(places == [a.number for a in ask_all(crew.sources, Command("addresses"))], "staging moved")
            # Twenty versions are 160 MiB for each rank; one version is 8 MiB.
            growth = max(b - a for a, b in zip(before, after, strict=True))
            check(growth < 6 << 20, "resident memory grew by", growth, "bytes in 20 versions")

    @pytest.mark.parametrize("num_ranks", [1, 2, 3])
    def test_exchange_gives_every_rank_the_maximum_over_all(self, pool: ActorPool, num_ranks: int) -> None:
        plan = hand_plan(num_sources=num_ranks, num_sinks=1, buckets_per_source=1, amax_elements=5)
        vectors = [(float(rank), -float(rank), 1e-30, math.inf if rank == 0 else 2.0, 0.0) for rank in range(num_ranks)]
        vectors[-1] = (*vectors[-1][:4], math.nan)
        want = tuple(max(v[i] for v in vectors) for i in range(4))
        with self.crew(pool, plan) as crew:
            for version in (1, 2):
                answers = crew.sync(version, vectors)
                self.check_arrived(crew, version, answers)
                for answer in answers[:num_ranks]:
                    close = [math.isclose(a, b, rel_tol=1e-6) for a, b in zip(answer.vector[:4], want, strict=True)]
                    check(all(close) and math.isnan(answer.vector[4]), answer.vector, want)

    def test_a_received_version_is_valid_until_the_next_one_begins(self, pool: ActorPool) -> None:
        with self.crew(pool, hand_plan()) as crew:
            crew.sync(1)
            check(crew.sinks[0].do(Command("still_valid", version=1)).flag, "version 1 was just received")
            check_fine([crew.sinks[0].do(Command("release", version=1))])
            crew.sync(2)
            check(not crew.sinks[0].do(Command("still_valid", version=1)).flag, "version 1 was overwritten")
            check(crew.sinks[0].do(Command("still_valid", version=2)).flag, "version 2 was just received")

    # ---- what fails, and what then holds

    def test_a_retry_after_a_half_sent_version_takes_nothing_of_it(self, pool: ActorPool) -> None:
        for chain in (False, True):
            plan = hand_plan(num_sources=2, num_sinks=2, buckets_per_source=6, chain=chain)
            with self.crew(pool, plan) as crew:
                self.check_arrived(crew, 1, crew.sync(1))
                # Version 2: rank 0 sends half, rank 1 sends nothing, and everybody is told to stop.
                for sink in crew.sinks:
                    sink.ask(Command("receive", version=2, cancel_after_s=0.3))
                crew.sources[0].ask(Command("publish", version=2, only=(0, 2, 1), cancel_after_s=0.3))
                crew.sources[0].answer()
                for sink in crew.sinks:
                    check_stopped(sink.answer())
                self.check_arrived(crew, 3, crew.sync(3))
                # Version 4: sent by rank 1 alone, and no sink ever looks.
                crew.sources[1].do(Command("publish", version=4, cancel_after_s=0.2))
                for version in (5, 6):
                    self.check_arrived(crew, version, crew.sync(version))

    def test_a_retry_after_a_half_done_exchange_takes_nothing_of_it(self, pool: ActorPool) -> None:
        plan = hand_plan(num_sources=3, num_sinks=1, buckets_per_source=1, amax_elements=2)
        with self.crew(pool, plan) as crew:
            alone = crew.sources[0].do(Command("publish", version=1, vector=(99.0, 99.0), cancel_after_s=0.2))
            check_raised(alone, ("CommitError",), CANCELLED)
            vectors = [(1.0, 4.0), (2.0, 2.0), (3.0, 1.0)]
            for version in (2, 3):
                answers = crew.sync(version, vectors)
                self.check_arrived(crew, version, answers)
                check([a.vector for a in answers[:3]] == [(3.0, 4.0)] * 3, [a.vector for a in answers[:3]])

    def test_versions_cut_off_at_any_moment_leave_nothing_behind(self, pool: ActorPool) -> None:
        moments = random.Random(4)
        for chain in (False, True):
            plan = hand_plan(num_sources=2, num_sinks=2, buckets_per_source=9, chain=chain, amax_elements=3)
            with self.crew(pool, plan) as crew:
                for version in range(1, 31, 3):
                    for doomed in (version, version + 1):
                        for actor, verb in zip(crew.actors, ("publish",) * 2 + ("receive",) * 2, strict=True):
                            after = moments.choice((0.0, 0.002, 0.004, 0.008, 0.02))
                            vector = (1e9 * doomed,) * 3 if verb == "publish" else ()
                            actor.ask(Command(verb, version=doomed, vector=vector, cancel_after_s=after))
                        for actor in crew.actors:
                            answer = actor.answer()
                            check(answer.error in ("", "CommitError", "TransportError"), answer.error, answer.message)
                    answers = crew.sync(version + 2, [(1.0, 2.0, float(version)), (2.0, 1.0, 0.0)])
                    self.check_arrived(crew, version + 2, answers)
                    check([a.vector for a in answers[:2]] == [(2.0, 2.0, float(version))] * 2, "wrong maxima")

    def test_the_deadline_holds_when_a_source_never_sends(self, pool: ActorPool) -> None:
        with self.crew(pool, hand_plan()) as crew:
            crew.sources[0].ask(Command("publish", version=1, deadline_s=2.0))
            answer = crew.sinks[0].do(Command("receive", version=1, deadline_s=0.5))
            check_raised(answer, ("DeadlineError",), "sink 0", "rank 1", "version 1")
            check(0.4 < answer.seconds < 1.5, "took", answer.seconds, "s")
            crew.sources[0].answer()

    def test_the_deadline_holds_when_a_rank_never_exchanges(self, pool: ActorPool) -> None:
        with self.crew(pool, hand_plan(amax_elements=4)) as crew:
            answer = crew.sources[0].do(Command("publish", version=1, vector=(1.0,) * 4, deadline_s=0.5))
            check_raised(answer, ("DeadlineError",), "rank 1", "version 1")
            check(0.4 < answer.seconds < 1.5, "took", answer.seconds, "s")

    def test_cancelling_ends_a_wait_at_once(self, pool: ActorPool) -> None:
        with self.crew(pool, hand_plan(amax_elements=4)) as crew:
            crew.sinks[0].ask(Command("receive", version=1, cancel_after_s=0.3))
            crew.sources[0].ask(Command("publish", version=1, vector=(1.0,) * 4, cancel_after_s=0.3))
            for actor in (crew.sinks[0], crew.sources[0]):
                answer = actor.answer()
                check_raised(answer, ("CommitError",), CANCELLED)
                check(answer.seconds < 1.0, "took", answer.seconds, "s")

    def test_a_peer_that_closes_while_it_is_awaited_is_named(self, pool: ActorPool) -> None:
        with self.crew(pool, hand_plan(num_sources=2, num_sinks=1)) as crew:
            crew.sinks[0].ask(Command("receive", version=1, deadline_s=5.0))
            crew.sources[1].do(Command("publish", version=1))
            crew.sources[0].do(Command("close"))
            answer = crew.sinks[0].answer()
            check_raised(answer, NAMED_LOSS, "rank 0")
            check(answer.seconds < 6.0, "took", answer.seconds, "s")

    def test_a_killed_source_is_named_by_sinks_and_ranks_that_wait_for_it(self, pool: ActorPool) -> None:
        if self.in_process:
            pytest.skip("threads cannot be killed")
        with self.crew(pool, hand_plan(amax_elements=4)) as crew:
            crew.sinks[0].ask(Command("receive", version=1, deadline_s=5.0))
            crew.sources[1].ask(Command("publish", version=1, vector=(1.0,) * 4, deadline_s=5.0))
            crew.sources[0].kill()
            for actor in (crew.sinks[0], crew.sources[1]):
                answer = actor.answer()
                check_raised(answer, NAMED_LOSS, "rank 0")
                check(answer.seconds < 6.0, "took", answer.seconds, "s")
            for actor in (crew.sinks[0], crew.sinks[1], crew.sources[1]):
                closed = actor.do(Command("close"))
                check_fine([closed])
                check(closed.seconds < 5.0, "close took", closed.seconds, "s")

    # ---- what is refused

    def test_ends_of_different_plans_refuse_each_other(self, pool: ActorPool) -> None:
        ours, theirs = hand_plan(digest="plan-a"), hand_plan(digest="plan-b")
        crew = self.crew(pool, HandPlan(ours.sources, theirs.sinks))
        try:
            check_fine(crew.prepare())
            for actor in crew.actors:
                check_raised(actor.do(crew.connect_command(2.0)), ("PlanMismatchError",), "plan-a", "plan-b")
        finally:
            crew.close()

    def test_a_bucket_that_no_source_offers_is_refused(self, pool: ActorPool) -> None:
        plan = hand_plan(num_sinks=1)
        short = tuple(msgspec.structs.replace(s, buckets=s.buckets[:-1]) for s in plan.sources)
        crew = self.crew(pool, HandPlan(short, plan.sinks))
        try:
            check_fine(crew.prepare())
            missing = plan.sources[0].buckets[-1].bucket_idx
            answer = crew.sinks[0].do(crew.connect_command(2.0))
            check_raised(answer, ("PlanMismatchError", "ConfigError"), f"bucket {missing}", "rank 0")
        finally:
            crew.close()

    def test_offers_that_are_garbage_or_swapped_are_refused(self, pool: ActorPool) -> None:
        crew = self.crew(pool, hand_plan())
        try:
            check_fine(crew.prepare())
            good = crew.connect_command(2.0)
            wrong = [
                msgspec.structs.replace(good, source_offers=(b"\xc1garbage", good.source_offers[1])),
                msgspec.structs.replace(good, source_offers=good.source_offers[::-1]),
                msgspec.structs.replace(good, sink_offers=good.source_offers),
            ]
            for command in wrong:
                for actor in (crew.sources[0], crew.sinks[0]):
                    check_raised(actor.do(command), ("ConfigError", "PlanMismatchError", "FormatVersionError"))
        finally:
            crew.close()

    def test_a_slice_that_no_plan_makes_is_refused(self, pool: ActorPool) -> None:
        plan = hand_plan()
        crooked = msgspec.structs.replace(plan.sources[0], buckets=plan.sources[1].buckets)
        stray = msgspec.structs.replace(plan.sinks[0], sink_idx=7)
        crew = self.crew(pool, HandPlan((crooked, plan.sources[1]), (stray, plan.sinks[1])))
        try:
            answers = crew.prepare()
            check_raised(answers[0], ("ConfigError",), "rank 0", "rank 1")
            check_raised(answers[2], ("ConfigError",), "sink 7")
        finally:
            crew.close()

    def test_calls_out_of_order_are_refused(self, pool: ActorPool) -> None:
        crew = self.crew(pool, hand_plan(num_sources=1, num_sinks=1, buckets_per_source=2))
        try:
            check_fine(crew.prepare())
            check_raised(crew.sources[0].do(Command("publish", version=1)), ("StateError",))
            check_raised(crew.sinks[0].do(Command("receive", version=1)), ("StateError",))
            check_fine(crew.connect())
            check_raised(crew.sources[0].do(crew.connect_command(1.0)), ("StateError",), "twice")
            check_fine(crew.sync(5))
            for version in (5, 4):
                command = Command("publish", version=version)
                check_raised(crew.sources[0].do(command), ("StateError",), f"version {version}", "version 5")
                command = Command("receive", version=version)
                check_raised(crew.sinks[0].do(command), ("StateError",), f"version {version}", "version 5")
            repeated = Command("publish", version=6, only=(0, 0), cancel_after_s=0.5)
            check_raised(crew.sources[0].do(repeated), ("StateError",), "twice")
            outside = Command("publish", version=7, only=(2,), cancel_after_s=0.5)
            check(bool(crew.sources[0].do(outside).error), "a bucket that does not exist was accepted")
        finally:
            crew.close()

    # ---- what is left

    def test_close_may_be_called_any_time_and_twice(self, pool: ActorPool) -> None:
        before = shared_names()
        crew = self.crew(pool, hand_plan())
        try:
            check_fine(crew.prepare())
            check_fine(ask_all(crew.actors, Command("close")))
            check_fine(ask_all(crew.actors, Command("close")))
            check_raised(crew.sinks[0].do(Command("receive", version=1)), ("StateError",))
            check_raised(crew.sources[0].do(crew.connect_command(1.0)), ("StateError",))
        finally:
            crew.close()
        check(shared_names() <= before, "left in /dev/shm:", shared_names() - before)

    def test_nothing_is_left_in_dev_shm_once_all_ends_connected(self, pool: ActorPool) -> None:
        before = shared_names()
        with self.crew(pool, hand_plan(amax_elements=4)) as crew:
            check(shared_names() <= before, "left in /dev/shm:", shared_names() - before)
            check_fine(crew.sync(1, [(1.0,) * 4] * 2))
        check(shared_names() <= before, "left in /dev/shm:", shared_names() - before)
