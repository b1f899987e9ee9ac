"""What a simulation says."""

from __future__ import annotations

import msgspec

RESULT_VERSION = 1


class ReplicaResult(msgspec.Struct, frozen=True):
    """One replica.

    Attributes:
        name: of the replica.
        state: as in `CommitError.replicas`: ``committed``, ``old version serving`` or ``poisoned``.
        staged_s, commit_s: when it had all bytes, and when it served them; None if it never did.
        fault: why it was dropped, or empty.
        dropped_s: when.
    """

    name: str
    state: str
    staged_s: float | None
    commit_s: float | None
    fault: str = ""
    dropped_s: float | None = None

    def received_until(self, horizon_s: float) -> float:
        """When it had everything or was dropped, or else the end."""
        ends = (self.staged_s, self.dropped_s, horizon_s)
        return next(end for end in ends if end is not None)


class ResourceUse(msgspec.Struct, frozen=True):
    """What one direction of one part of the cluster did.

    Attributes:
        name: such as ``trainer-0/nic3 out``.
        kind: ``nic``, ``nvlink``, ``pcie``, ``hbm``, ``host``, ``link``, or ``send`` and ``core`` of one rank.
        rate_gbps: that it has in this simulation.
        nbytes, messages: that it served. Memory of GPUs counts bytes read and written.
        busy_s: in which it did.
        utilisation: share of `SimResult.horizon_s`.
    """

    name: str
    kind: str
    rate_gbps: float
    nbytes: int
    messages: int
    busy_s: float
    utilisation: float


class Event(msgspec.Struct, frozen=True):
    """Something that failed."""

    time_s: float
    what: str


class SimResult(msgspec.Struct, frozen=True):
    """One simulated update.

    Attributes:
        name: of the scenario.
        score: ``simulated_s / lower_bound_s``; None unless all replicas committed, since the bound is that of all.
        no_score: why it is None, or empty.
        simulated_s: from the publish until the last replica that commits has committed; None if none does.
        horizon_s: until nothing moved any more: buckets for replicas that were dropped included.
        plan_s: that the plan predicts.
        lower_bound_s: that no plan can beat.
        binding_cut: where that bound comes from.
        plan_wall_s: that planning took on this machine; None for a plan that was read.
        sim_wall_s: that simulating took on this machine.
        stall_s: until the trainers may change their weights.
        phases: seconds from the publish until each phase (``amax``, ``pack``, ``stage``, ``commit``) has ended
            everywhere; None for one that was not reached.
        replicas: in order.
        resources: the busiest first.
        num_buckets, num_hops, num_events: how much was simulated.
        wire_bytes: packed by trainers.
        delivered_bytes: received by engine ranks, relays included.
        events: what failed.
        resent: buckets that were sent again because of it.
        adopted: hops that got another sender because of it.
        notes: what to know about this run: failures that came too late, GPUs whose memory is too small.
        seed: of the jitter.
        published_s: what a peer has published for this scenario.
        format_version: of this record.
    """

    name: str
    score: float | None
    no_score: str
    simulated_s: float | None
    horizon_s: float
    plan_s: float
    lower_bound_s: float
    binding_cut: str
    plan_wall_s: float | None
    sim_wall_s: float
    stall_s: float
    phases: dict[str, float | None]
    replicas: tuple[ReplicaResult, ...]
    resources: tuple[ResourceUse, ...]
    num_buckets: int
    num_hops: int
    num_events: int
    wire_bytes: int
    delivered_bytes: int
    events: tuple[Event, ...] = ()
    resent: int = 0
    adopted: int = 0
    notes: tuple[str, ...] = ()
    seed: int = 0
    published_s: float | None = None
    format_version: int = RESULT_VERSION

    @property
    def committed(self) -> tuple[str, ...]:
        """Names of the replicas that serve the new version."""
        return tuple(r.name for r in self.replicas if r.commit_s is not None)
