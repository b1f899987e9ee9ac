"""The part of the contract suite on peers that die, idle or leave at a bad moment; see `transport_contract`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from wsync.testing.transport_actors import CANCELLED, Actor, ActorPool, Answer, Command
from wsync.testing.transport_checks import check, check_fine, check_raised
from wsync.testing.transport_crew import Crew, HandPlan, hand_plan


class SicknessContract:
    """Mixed into `TransportContract`, which makes the crews."""

    in_process: ClassVar[bool]

    def crew(self, pool: ActorPool, plan: HandPlan) -> Crew:
        """A crew of this transport."""
        raise NotImplementedError

    def check_arrived(self, crew: Crew, version: int, answers: Sequence[Answer]) -> None:
        """Every sink found every bucket of ``version`` exactly once, bit for bit."""
        raise NotImplementedError

    def end(self, actor: Actor) -> None:
        """Kill it, or close its end where it is a thread."""
        if self.in_process:
            check_fine([actor.do(Command("close"))])
        else:
            actor.kill()

    def sync_without(self, crew: Crew, absent: int, version: int, cancel_after_s: float = -1.0) -> list[Answer]:
        """A version that one sink does not receive; checks what the others got, returns the sources' answers."""
        present = [idx for idx in range(len(crew.sinks)) if idx != absent]
        for idx in present:
            crew.sinks[idx].ask(Command("receive", version=version, deadline_s=8.0))
        for source in crew.sources:
            source.ask(Command("publish", version=version, deadline_s=8.0, cancel_after_s=cancel_after_s))
        for idx in present:
            answer = crew.sinks[idx].answer()
            check_fine([answer])
            found = {(a.bucket_pos, a.digest, a.sha1) for a in answer.arrivals}
            check(found == crew.expected(idx, version), "sink", idx, "got other bytes or digests")
        return [source.answer() for source in crew.sources]

    # ---- a sick sink costs its own replica

    def test_a_dead_sink_costs_neither_a_source_nor_another_sink_a_version(self, pool: ActorPool) -> None:
        with self.crew(pool, hand_plan(num_sinks=3, bucket_bytes=1 << 20)) as crew:
            self.check_arrived(crew, 1, crew.sync(1))
            self.end(crew.sinks[1])
            for version in (2, 3):
                for answer in self.sync_without(crew, 1, version):
                    check_fine([answer])
                    check(answer.seconds < 3.0, "took", answer.seconds, "s")
            for source in crew.sources:
                lost = source.do(Command("lost_sinks")).lost
                check(set(lost) <= {1} and all("sink 1" in why for why in lost.values()), lost)

    def test_a_sink_that_dies_in_the_middle_of_a_version_costs_nobody_else_the_version(self, pool: ActorPool) -> None:
        with self.crew(pool, hand_plan(num_sinks=2, bucket_bytes=4 << 20)) as crew:
            self.check_arrived(crew, 1, crew.sync(1))
            crew.sinks[1].ask(Command("receive", version=2, deadline_s=8.0))
            crew.sinks[0].ask(Command("receive", version=2, deadline_s=8.0))
            crew.sources[0].ask(Command("publish", version=2, deadline_s=8.0))
            if self.in_process:
                crew.sources[0].answer()
            else:
                crew.sinks[1].kill()
                check_fine([crew.sources[0].answer()])
            crew.sources[1].ask(Command("publish", version=2, deadline_s=8.0))
            check_fine([crew.sinks[0].answer(), crew.sources[1].answer()])
            if self.in_process:
                crew.sinks[1].answer()

    def test_sources_that_lost_all_their_sinks_go_on(self, pool: ActorPool) -> None:
        with self.crew(pool, hand_plan(num_sinks=1, amax_elements=2)) as crew:
            self.end(crew.sinks[0])
            for version in (1, 2, 3):
                for source in crew.sources:
                    source.ask(Command("publish", version=version, vector=(1.0, 2.0), deadline_s=5.0))
                check_fine([source.answer() for source in crew.sources])

    def test_a_sink_that_does_not_receive_for_a_while_joins_again_and_then_is_left_behind(
        self, pool: ActorPool
    ) -> None:
        with self.crew(pool, hand_plan(num_sinks=2, bucket_bytes=1 << 20)) as crew:
            for version in (1, 4, 5):
                for answer in self.sync_without(crew, 1, version, cancel_after_s=3.5):
                    check(answer.error in ("", "CommitError"), answer.error, answer.message)
                if version == 1:
                    for later in (2, 3):
                        self.check_arrived(crew, later, crew.sync(later))
            for source in crew.sources:
                lost = source.do(Command("lost_sinks")).lost
                check(set(lost) <= {1} and all("version 4" in why for why in lost.values()), lost)

    # ---- connecting

    def test_cancelling_ends_a_connect_that_waits_for_somebody(self, pool: ActorPool) -> None:
        crew = self.crew(pool, hand_plan())
        try:
            check_fine(crew.prepare())
            waiting = [*crew.sources, crew.sinks[0]]
            for actor in waiting:
                actor.ask(crew.connect_command(20.0, cancel_after_s=0.3))
            for actor in waiting:
                answer = actor.answer()
                check(not answer.error or CANCELLED in answer.message, answer.error, answer.message)
                check(answer.seconds < 1.5, "took", answer.seconds, "s")
        finally:
            crew.close()

    def test_connecting_names_a_sink_that_died_after_it_prepared(self, pool: ActorPool) -> None:
        crew = self.crew(pool, hand_plan())
        try:
            check_fine(crew.prepare())
            self.end(crew.sinks[1])
            for source in crew.sources:
                source.ask(crew.connect_command(1.5))
            crew.sinks[0].ask(crew.connect_command(1.5))
            for source in crew.sources:
                answer = source.answer()
                check_raised(answer, ("PeerLostError",), "sink 1")
                check(answer.seconds < 4.0, "took", answer.seconds, "s")
            check(crew.sinks[0].answer().seconds < 4.0, "the other sink hung")
        finally:
            crew.close()

    # ---- closing from another thread

    def test_closing_from_another_thread_ends_what_waits(self, pool: ActorPool) -> None:
        with self.crew(pool, hand_plan(amax_elements=4)) as crew:
            crew.sinks[0].ask(Command("receive", version=1, close_after_s=0.3))
            crew.sources[0].ask(Command("publish", version=1, vector=(1.0,) * 4, close_after_s=0.3))
            for actor in (crew.sinks[0], crew.sources[0]):
                answer = actor.answer()
                check_raised(answer, ("StateError", "PeerLostError"))
                check(answer.seconds < 3.0, "took", answer.seconds, "s")
                check_fine([actor.do(Command("close"))])

    def test_staging_outlives_a_close_by_another_thread_while_it_is_written(self, pool: ActorPool) -> None:
        with self.crew(pool, hand_plan(bucket_bytes=4 << 20)) as crew:
            answer = crew.sources[0].do(Command("write_while_another_thread_closes", version=1))
            check_raised(answer, ("StateError",), "closed")

    def test_staging_outlives_a_close_by_another_thread_while_it_is_read(self, pool: ActorPool) -> None:
        with self.crew(pool, hand_plan(bucket_bytes=4 << 20)) as crew:
            crew.sinks[0].ask(Command("read_while_another_thread_closes", version=1))
            crew.sinks[1].ask(Command("receive", version=1))
            for source in crew.sources:
                source.ask(Command("publish", version=1))
            self.check_arrived(crew, 1, [actor.answer() for actor in crew.actors])
