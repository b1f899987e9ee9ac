"""What a publish reports."""

from __future__ import annotations

import msgspec

from wsync.session.messages import Finished, RankStamps, Sent


class PublishReport(msgspec.Struct, frozen=True):
    """What one publish did.

    Attributes:
        version: what was published.
        committed: replicas that serve it now.
        dropped: replicas that do not, and why.
        replicas: for each replica ``"committed"``, ``"old version serving"`` or ``"poisoned"``.
        seconds: by phase, the slowest rank of each (see `docs/measurement.md`): ``total`` (publish called to last
            replica committed, on this rank's clock), ``stall`` (publish called to released, on this rank's clock),
            ``amax``, ``pack``, ``flush`` (trainer ranks), ``receive``, ``verify``, ``repack``, ``decide``, ``install``,
            ``finish`` and ``pause``, which is decide plus install plus finish (engine ranks).
        logical_bytes: bytes of the model as the trainer holds it, each tensor once.
        wire_bytes: encoded bytes that the trainer ranks packed, without padding.
        sink_bytes: encoded bytes that all engine ranks took together.
        staging_bytes: staging memory of the transport.
        ranks: every phase of every rank, on its host's monotonic clock.
        sent: with ``Source(delta=True)``, buckets and bytes sent whole and as deltas, and the density of changes.
        is_delta: whether buckets could be sent as deltas; false for an anchor.
    """

    version: int
    committed: tuple[str, ...]
    dropped: dict[str, str]
    replicas: dict[str, str]
    seconds: dict[str, float]
    logical_bytes: int
    wire_bytes: int
    sink_bytes: int
    staging_bytes: int
    ranks: tuple[RankStamps, ...]
    sent: Sent = Sent()
    is_delta: bool = False

    @property
    def logical_gbps(self) -> float:
        """Model bytes over total seconds, in GB/s (1e9)."""
        return self.logical_bytes / 1e9 / max(self.seconds["total"], 1e-9)

    @property
    def wire_gbps(self) -> float:
        """Wire bytes over total seconds, in GB/s (1e9)."""
        return self.wire_bytes / 1e9 / max(self.seconds["total"], 1e-9)


def build_report(version: int, finished: Finished, total_s: float, stall_s: float) -> PublishReport:
    """Condense the ranks' phases: for each phase the slowest rank."""
    seconds = {"total": total_s, "stall": stall_s}
    for rank in finished.ranks:
        spent: dict[str, float] = {}
        for stamp in rank.stamps:
            spent[stamp.phase] = spent.get(stamp.phase, 0.0) + stamp.end_s - stamp.begin_s
        for phase, value in spent.items():
            seconds[phase] = max(seconds.get(phase, 0.0), value)
        if "install" in spent:
            pause_s = sum(spent.get(phase, 0.0) for phase in ("decide", "install", "finish"))
            seconds["pause"] = max(seconds.get("pause", 0.0), pause_s)
    return PublishReport(
        version=version,
        committed=finished.committed,
        dropped={name: f"{fault.name}: {fault.message}" for name, fault in finished.dropped.items()},
        replicas=finished.replicas,
        seconds=seconds,
        logical_bytes=finished.totals.logical_bytes,
        wire_bytes=finished.totals.wire_bytes,
        sink_bytes=finished.totals.sink_bytes,
        staging_bytes=finished.totals.staging_bytes,
        ranks=finished.ranks,
        sent=finished.sent,
        is_delta=finished.is_delta,
    )
