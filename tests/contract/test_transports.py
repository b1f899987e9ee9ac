"""The contract suite on the transports that ship."""

import os
import signal
import time

import pytest

from wsync.testing.transport_actors import CANCELLED, Command
from wsync.testing.transport_checks import check_fine, check_raised
from wsync.testing.transport_contract import TransportContract
from wsync.testing.transport_crew import hand_plan


class TestLoopback(TransportContract):
    transport = "loopback"
    in_process = True


@pytest.mark.multiproc
class TestShm(TransportContract):
    transport = "shm"


@pytest.mark.multiproc
class TestGloo(TransportContract):
    transport = "gloo"

    def test_a_dead_sink_is_reported_as_lost(self, pool):
        with self.crew(pool, hand_plan(num_sinks=2, bucket_bytes=1 << 20)) as crew:
            self.check_arrived(crew, 1, crew.sync(1))
            assert crew.sources[0].do(Command("lost_sinks")).lost == {}
            crew.sinks[1].kill()
            for version in (2, 3):
                check_fine(self.sync_without(crew, 1, version))
            for rank, source in enumerate(crew.sources):
                lost = source.do(Command("lost_sinks")).lost
                assert set(lost) == {1}
                assert f"rank {rank}" in lost[1]
                assert "sink 1" in lost[1]

    @pytest.mark.parametrize("chain", [False, True])
    def test_a_sink_that_dies_with_bytes_on_their_way_to_it_is_noticed_at_once(self, pool, chain):
        plan = hand_plan(num_sources=1, num_sinks=2, buckets_per_source=8, bucket_bytes=8 << 20, chain=chain)
        with self.crew(pool, plan) as crew:
            self.check_arrived(crew, 1, crew.sync(1))
            feeder = crew.sinks[0] if chain else crew.sources[0]
            crew.sinks[1].ask(Command("receive", version=2))
            time.sleep(0.5)
            os.kill(crew.sinks[1].pid, signal.SIGSTOP)  # its receives are posted, and the network fills up
            crew.sinks[0].ask(Command("receive", version=2))
            crew.sources[0].ask(Command("publish", version=2, cancel_after_s=8.0))
            time.sleep(1.0)
            crew.sinks[1].kill()
            check_fine([crew.sinks[0].answer()])
            answer = crew.sources[0].answer()
            check_fine([answer])
            assert answer.seconds < 4.0
            check_fine(self.sync_without(crew, 1, 3))
            assert set(crew.sources[0].do(Command("lost_sinks")).lost) == {1}
            assert feeder.do(Command("close")).seconds < 3.0

    def test_a_sink_that_takes_nothing_is_given_up_by_the_next_version(self, pool):
        with self.crew(pool, hand_plan(num_sources=1, num_sinks=2, bucket_bytes=1 << 20)) as crew:
            answer = self.sync_without(crew, 1, 1, cancel_after_s=0.5)[0]
            assert (answer.error, answer.message) == ("CommitError", CANCELLED)
            assert crew.sources[0].do(Command("lost_sinks")).lost == {}
            check_fine(self.sync_without(crew, 1, 2))
            assert set(crew.sources[0].do(Command("lost_sinks")).lost) == {1}
            check_fine(self.sync_without(crew, 1, 3))

    def test_children_of_a_relay_that_gave_up_learn_it_at_once_and_by_name(self, pool):
        plan = hand_plan(num_sources=1, num_sinks=3, buckets_per_source=7, chain=True)
        with self.crew(pool, plan) as crew:
            self.check_arrived(crew, 1, crew.sync(1))
            for version in (2, 4):
                crew.sinks[0].ask(Command("receive", version=version, cancel_after_s=0.3))
                for sink in crew.sinks[1:]:
                    sink.ask(Command("receive", version=version, deadline_s=15.0))
                crew.sources[0].do(Command("publish", version=version, only=(0, 1), deadline_s=5.0))
                assert crew.sinks[0].answer().error == "CommitError"
                for relay, child in ((0, crew.sinks[1]), (1, crew.sinks[2])):
                    answer = child.answer()
                    check_raised(answer, ("TransportError",), f"sink {relay} on", f"gave up version {version}")
                    assert answer.seconds < 3.0
                self.check_arrived(crew, version + 1, crew.sync(version + 1))


class TestShmBetweenThreads(TransportContract):
    """Trainer and engine in one process share a mapping instead of opening the segment twice."""

    transport = "shm"
    in_process = True
