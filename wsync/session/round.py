"""One publish, as the coordinator drives it: gather, set up an epoch where needed, run, decide per replica, finish.

    gather -> offers -> ready -> running -> over
      ^________|__________|   (a rank that is lost or too slow before anything moved: plan without its replica)

Pure state: it is told what happened and says what to send through `Outbox`; the coordinator owns sockets and time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import msgspec

from wsync.errors import ConfigError, DeadlineError, PeerLostError, TransportError, WsyncError
from wsync.plan import Planner
from wsync.session.epoch import Epoch, Outbox, new_epoch
from wsync.session.explain import below_minimum, late_message
from wsync.session.membership import Client, Membership
from wsync.session.messages import (
    Aborted,
    Begin,
    Decide,
    Failed,
    Fault,
    Finished,
    Flushed,
    Installed,
    Offer,
    Packed,
    Progress,
    PublishRequest,
    RankStamps,
    Ready,
    ReplicaCommitted,
    Sent,
    Stamp,
    Totals,
    Voted,
)

COMMITTED = "committed"
OLD_VERSION = "old version serving"
POISONED = "poisoned"


@dataclasses.dataclass
class ReplicaState:
    """How far one replica is with the version."""

    voted: set[int] = dataclasses.field(default_factory=set)
    installed: set[int] = dataclasses.field(default_factory=set)
    decided: bool = False
    outcome: str = ""
    fault: Fault | None = None


class Round:
    """The state of one publish.

    Args:
        seq: number of the round, never used twice.
        members: who is there.
        epoch: the one of the last round, or None.
        send: queues a message for a client.
        planner: gives the planner of the trainer once that is complete.
        now: the monotonic time.
        anchor_every: every so many publishes one is whole and the others may be deltas; 0: all are whole.
    """

    def __init__(
        self,
        seq: int,
        members: Membership,
        epoch: Epoch | None,
        send: Outbox,
        *,
        choose_transport: Callable[[list[str]], str],
        planner: Callable[[], Planner | None],
        now: float,
        anchor_every: int = 0,
    ) -> None:
        self.seq = seq
        self.members = members
        self.epoch = epoch
        self.state = "gather"
        self._choose_transport = choose_transport
        self._planner = planner
        self._anchor_every = anchor_every
        self._base_seq = 0
        self._sent = Sent()
        self._spoiled = False
        self._send = send
        self.began = now
        self.deadline = float("inf")
        self._phase_began = now
        self._was_set_up = False
        self.finished: Finished | None = None
        self.requests: dict[int, PublishRequest] = {}
        self.replicas: dict[str, ReplicaState] = {}
        self.packed: set[int] = set()
        self.flushed: set[int] = set()
        self.stamps: dict[str, list[Stamp]] = {}
        self.excluded: dict[str, Fault] = {}
        self.fault: Fault | None = None

    # ---- what is known of the request

    @property
    def version(self) -> int:
        return next(iter(self.requests.values())).version if self.requests else 0

    @property
    def needed(self) -> int:
        return max([1, *(r.min_replicas for r in self.requests.values())])

    def request(self, rank: int, request: PublishRequest, now: float) -> None:
        """A trainer rank entered publish."""
        self.requests[rank] = request
        self.deadline = min(self.deadline, now + request.deadline_s)
        versions = {r: q.version for r, q in sorted(self.requests.items())}
        if len(set(versions.values())) > 1:
            self.fail(ConfigError(f"trainer ranks publish different versions: {versions} (rank: version)"))

    @property
    def all_requested(self) -> bool:
        return len(self.requests) == self.members.num_sources

    # ---- progress

    def advance(self, now: float) -> None:
        """Do whatever can be done now."""
        if self.state in ("gather", "offers", "ready") and now > self.deadline:
            self.fail(self._refusal() or DeadlineError(late_message(self)))
        if self.state == "gather":
            self._gather(now)
        if self.state == "offers":
            self._collect_offers(now)
        if self.state == "ready":
            self._collect_ready(now)
        if self.state == "running":
            self._decide()
            if now > self.deadline:
                self._expire()
            self._finish_if_over()

    def ranks_of(self, replica: str) -> list[Client]:
        """The ranks of a replica of this epoch."""
        return self.epoch.replicas.get(replica, []) if self.epoch else []

    def candidates(self) -> dict[str, list[Client]]:
        """Replicas that can take part."""
        return {n: r for n, r in self.members.complete_replicas().items() if n not in self.excluded}

    def _gather(self, now: float) -> None:
        if not self.all_requested:
            return
        replicas = self.candidates()
        if len(replicas) < self.needed:
            return
        if self.epoch is not None and self.epoch.is_of(replicas):
            self._begin(now)
            return
        try:
            number = self.epoch.number + 1 if self.epoch else 1
            self.epoch = new_epoch(number, self.members, replicas, self._planner())
            transport = self._choose_transport([c.info.host for c in self.epoch.clients])
        except WsyncError as e:
            self.fail(e)
            return
        self.epoch.send_setup(self._send, transport, self.deadline - now, delta=self._anchor_every > 0)
        self._was_set_up = True
        self._enter("offers", now)

    def _enter(self, state: str, now: float) -> None:
        self.state = state
        self._phase_began = now

    def _refusal(self) -> WsyncError | None:
        """Why an engine was turned away, where that left too few: the first one, by its own class. Each counts once."""
        if self.state != "gather" or not self.all_requested or not self.members.refusals:
            return None
        refusals, self.members.refusals = self.members.refusals, {}
        name, fault = next(iter(sorted(refusals.items())))
        seconds = f"{self.deadline - self.began:.1f} s"
        message = f"{name} does not fit: {fault.message} (and no other replica came within {seconds})"
        return Fault(fault.name, message, fault.hint).to_error()

    def _collect_offers(self, now: float) -> None:
        epoch = self.epoch
        if epoch is not None and self._all_answered(epoch, set(epoch.offers), now):
            epoch.send_connect(self._send, self.deadline - now)
            self._enter("ready", now)

    def _collect_ready(self, now: float) -> None:
        epoch = self.epoch
        if epoch is not None and self._all_answered(epoch, epoch.ready, now):
            self._begin(now)

    def _all_answered(self, epoch: Epoch, answered: set[bytes], now: float) -> bool:
        """Whether all did; past half the time, go on without the replicas that did not, where enough are left."""
        waiting = [c for c in epoch.clients if c.uid not in answered]
        if not waiting:
            return True
        late = {c.replica for c in waiting if c.role == "sink"}
        past_half = now > self._phase_began + (self.deadline - self._phase_began) / 2
        if past_half and len(late) == len({c.replica or c.name for c in waiting}):
            left = set(self.candidates()) - late
            if len(left) >= self.needed:
                for client in waiting:
                    client.asleep = True
                for name in sorted(late):
                    error = DeadlineError(f"replica {name!r} did not set up in time (is it in Sink.prepare?)")
                    self.exclude(name, error)
        return False

    def _begin(self, now: float) -> None:
        epoch = self.epoch
        if epoch is None:
            return
        self.replicas = {name: ReplicaState() for name in epoch.replicas}
        for name, fault in self.excluded.items():
            self._tell(name, "dropped", fault)
        self._base_seq = epoch.next_base(self._anchor_every)
        left_s = max(self.deadline - now, 0.0)
        begin = Begin(self.seq, self.version, epoch.number, epoch.digest, left_s, base_seq=self._base_seq)
        for client in epoch.sources:
            self._send(client, msgspec.structs.replace(begin, replicas=tuple(epoch.replicas)))
        for client in epoch.sinks:
            self._send(client, begin)
        self._enter("running", now)

    def _tell(
        self, replica: str, outcome: Literal["prepared", "committed", "dropped"], fault: Fault | None = None
    ) -> None:
        """The trainer hears at once how far a replica is: it pauses each engine for its own commit only."""
        for client in self.members.sources.values():
            if client.rank in self.requests:
                self._send(client, Progress(self.seq, replica, outcome, fault))

    def exclude(self, replica: str, error: WsyncError) -> None:
        """Go on without a replica: before anything moved this means a new plan, later that it is dropped."""
        if self.state == "running":
            self.drop(replica, Fault.of(error))
            return
        self.excluded[replica] = Fault.of(error)
        for client in self.ranks_of(replica) if self._was_set_up else []:
            self._send(client, Aborted(self.seq, Fault.of(error)))
        self.state = "gather"

    # ---- events

    def offered(self, client: Client, message: Offer) -> None:
        """A rank compiled its slice."""
        if self.epoch and message.epoch == self.epoch.number:
            self.epoch.offers[client.uid] = message.offer

    def became_ready(self, client: Client, message: Ready) -> None:
        """A rank reached all ends."""
        if self.epoch and message.epoch == self.epoch.number:
            self.epoch.ready.add(client.uid)

    def record(self, client: Client, stamps: tuple[Stamp, ...]) -> None:
        """Keep a rank's phases for the report."""
        self.stamps.setdefault(client.name, []).extend(stamps)

    def sinks_lost(self, client: Client, message: Flushed) -> None:
        """A trainer rank could not reach these sinks: their replicas do not get the version."""
        for idx, why in message.lost.items():
            sinks = self.epoch.sinks if self.epoch else []
            if 0 <= idx < len(sinks):
                self._distrust(sinks[idx])
                self.drop(sinks[idx].replica, Fault.of(PeerLostError(f"{client.name} lost {sinks[idx].name}: {why}")))

    def _distrust(self, client: Client) -> None:
        """Connections to this rank are in doubt: the next round sets up a new epoch."""
        if self.epoch is not None:
            self.epoch.ready.discard(client.uid)

    def progressed(self, client: Client, message: Packed | Flushed | Voted | Installed) -> None:
        """A rank got further with the version."""
        if message.seq != self.seq or self.state != "running":
            return
        self.record(client, message.stamps)
        if isinstance(message, Packed):
            self.packed.add(client.rank)
            self._sent += message.sent
        elif isinstance(message, Flushed):
            self.flushed.add(client.rank)
            self.sinks_lost(client, message)
        else:
            state = self.replicas.get(client.replica)
            if state is None or state.outcome:
                return
            (state.voted if isinstance(message, Voted) else state.installed).add(client.rank)
            self._confirm(client.replica, state)

    def _confirm(self, replica: str, state: ReplicaState) -> None:
        ranks = self.ranks_of(replica)
        if len(state.installed) == len(ranks):
            state.outcome = COMMITTED
            for client in ranks:
                client.poisoned = False
                self._send(client, ReplicaCommitted(self.seq))
            self._tell(replica, "committed")

    def failed(self, client: Client, message: Failed) -> None:
        """A rank reported an error."""
        error = message.fault.to_error()
        if message.seq == 0 and (self.state == "running" or not self.epoch or message.epoch != self.epoch.number):
            return  # of an epoch that was given up since
        self._spoiled = True
        if isinstance(error, TransportError) and not isinstance(error, DeadlineError):
            self._distrust(client)
        if client.role == "source":
            self.fail(error)
        else:
            self.exclude(client.replica, error)

    def lost(self, client: Client, why: str) -> None:
        """A rank died or went silent."""
        error = PeerLostError(
            f"{client.name} (pid {client.info.pid} on {client.info.host}) {why} in phase {self.state!r}"
        )
        if client.role == "source":
            self.fail(error)
        elif self.state != "gather" and client in self.ranks_of(client.replica):
            self.exclude(client.replica, error)

    def returned(self, replica: str) -> None:
        """A rank of this replica joined again: it may take part if nothing moved yet."""
        if self.state == "gather":
            self.excluded.pop(replica, None)

    def supersede(self, version: int) -> None:
        """A newer publish came: replicas that are not decided keep what they have."""
        fault = Fault("CommitError", f"version {self.version} was superseded by version {version}")
        for name, state in self.replicas.items():
            if not state.decided and not state.outcome:
                self.drop(name, fault, superseded=True)
        self._finish_if_over()

    # ---- ends

    def drop(self, replica: str, fault: Fault, *, superseded: bool = False) -> None:
        """One replica does not get the version. Poisoned if it may have begun to install."""
        state = self.replicas.get(replica)
        if state is None or state.outcome:
            return
        ranks = self.ranks_of(replica)
        for client in ranks:
            client.poisoned |= state.decided
        state.outcome = POISONED if any(c.poisoned for c in ranks) else OLD_VERSION
        state.fault = fault
        for client in ranks:
            self._send(client, Aborted(self.seq, fault, superseded))
        self._tell(replica, "dropped", fault)

    def fail(self, error: WsyncError) -> None:
        """The publish is over for everybody but the replicas that are decided."""
        if self.state == "over":
            return
        self.fault = self.fault or Fault.of(error)
        if self.state == "running":
            for name, state in self.replicas.items():
                if not state.decided:
                    self.drop(name, self.fault)
            self._finish_if_over()
        else:
            for client in self.epoch.sinks if self.epoch and self._was_set_up else []:
                self._send(client, Aborted(self.seq, self.fault))
            self._finish()

    def _decide(self) -> None:
        if len(self.packed) < self.members.num_sources or self.fault is not None:
            return
        for name, state in self.replicas.items():
            ranks = self.ranks_of(name)
            if not state.decided and not state.outcome and len(state.voted) == len(ranks):
                state.decided = True
                for client in ranks:
                    self._send(client, Decide(self.seq))
                self._tell(name, "prepared")

    def _expire(self) -> None:
        late = DeadlineError(late_message(self))
        for name, state in self.replicas.items():
            if not state.outcome:
                for client in self.ranks_of(name):
                    client.asleep |= client.rank not in state.voted
                self.drop(name, Fault.of(late))
        if len(self.flushed) < self.members.num_sources and self.fault is None:
            self.fault = Fault.of(late)

    def _finish_if_over(self) -> None:
        if self.state != "running" or not all(s.outcome for s in self.replicas.values()):
            return
        if self.fault is None and len(self.flushed) < self.members.num_sources:
            return
        self._finish()

    def _all_hold(self) -> bool:
        """Whether every rank of the epoch holds this version's wire bytes, whole and verified."""
        if self._spoiled or self.fault is not None or len(self.packed) < self.members.num_sources:
            return False
        return all(
            len(state.voted) == len(self.ranks_of(name)) and state.outcome != POISONED
            for name, state in self.replicas.items()
        )

    def _finish(self) -> None:
        if self.state == "running" and self.epoch is not None and self._anchor_every and self._all_hold():
            self.epoch.held_seq = self.seq
        self.state = "over"
        committed = tuple(n for n, s in self.replicas.items() if s.outcome == COMMITTED)
        dropped = {
            n: s.fault or Fault("CommitError", "dropped") for n, s in self.replicas.items() if s.outcome != COMMITTED
        }
        outcomes = {n: s.outcome for n, s in self.replicas.items()} | dict.fromkeys(self.excluded, OLD_VERSION)
        dropped |= self.excluded
        fault = self.fault
        if fault is None and len(committed) < self.needed:
            fault = below_minimum(self, committed, dropped)
        totals = self.epoch.totals if self.epoch else Totals()
        ranks = tuple(RankStamps(name, tuple(stamps)) for name, stamps in sorted(self.stamps.items()))
        finished = Finished(
            self.seq, committed, dropped, outcomes, fault, totals, ranks, self._sent, self._base_seq > 0
        )
        self.finished = finished
        for client in self.members.sources.values():
            if client.rank in self.requests:
                self._send(client, finished)
