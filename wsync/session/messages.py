"""Every message of the control plane: typed, strictly decoded, bounded in size. No tensor data travels here.

Clients (trainer ranks and engine ranks) talk to the coordinator, which lives in trainer rank 0. One message is one
ZeroMQ frame of MessagePack with a ``type`` tag. `docs/wire_format.md` lists them.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from wsync.errors import WireError, WsyncError, error_from_wire
from wsync.spec.manifest import RankInfo, SinkRankManifest, SourceRankManifest, TensorSpec

MAX_MESSAGE_BYTES = 256 << 20
"""A longer frame is refused before it is decoded (an estimate for the manifest of a 70 000-tensor model: 20 MB)."""


class _Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages; the tag is the class name."""


class Stamp(msgspec.Struct, frozen=True, array_like=True):
    """One timed phase on one rank; ``begin_s`` and ``end_s`` are that host's monotonic clock."""

    phase: str
    begin_s: float
    end_s: float


class Fault(msgspec.Struct, frozen=True, array_like=True):
    """An error as it travels: the class name of a `WsyncError`, its message and its hint."""

    name: str
    message: str
    hint: str = ""

    @classmethod
    def of(cls, error: BaseException) -> Fault:
        """Wrap an error; one that is not of wsync keeps its class name in the message."""
        if isinstance(error, WsyncError):
            return cls(type(error).__name__, error.message, error.hint)
        return cls("WsyncError", f"{type(error).__name__}: {error}")

    def to_error(self) -> WsyncError:
        """The error to raise here."""
        return error_from_wire(self.name, self.message, self.hint)


# ---- client to coordinator


class SourceJoin(_Message, frozen=True):
    """A trainer rank describes itself."""

    format_version: int
    transport: str
    manifest: SourceRankManifest
    delta: bool = False


class SinkJoin(_Message, frozen=True):
    """An engine rank asks for the name table."""

    format_version: int
    replica: str
    rank: int
    world_size: int
    info: RankInfo


class SinkDescribed(_Message, frozen=True):
    """What the engine rank recorded against the name table of that digest."""

    names_digest: str
    manifest: SinkRankManifest


class Offer(_Message, frozen=True):
    """This rank compiled its slice and allocated staging; ``offer`` tells the other ends how to reach it."""

    epoch: int
    plan_digest: str
    offer: bytes


class Ready(_Message, frozen=True):
    """This rank reached every end that it needs."""

    epoch: int
    plan_digest: str


class PublishRequest(_Message, frozen=True):
    """This trainer rank entered `Source.publish` for the ``seq``-th time; all ranks count alike."""

    seq: int
    version: int
    min_replicas: int
    deadline_s: float


class Sent(msgspec.Struct, frozen=True, array_like=True):
    """What trainer ranks sent of a publish, where deltas are on; all zero where they are off.

    Attributes:
        dense_buckets, delta_buckets: that travelled as they are, and as codes.
        dense_bytes, delta_bytes: of these.
        changed_elements, compared_elements: codes or words that differ from the base, of all that have one.
    """

    dense_buckets: int = 0
    delta_buckets: int = 0
    dense_bytes: int = 0
    delta_bytes: int = 0
    changed_elements: int = 0
    compared_elements: int = 0

    def __add__(self, other: Sent) -> Sent:
        mine, theirs = msgspec.structs.astuple(self), msgspec.structs.astuple(other)
        return Sent(*(a + b for a, b in zip(mine, theirs, strict=True)))

    @property
    def density(self) -> float:
        """Share of the elements that changed; 0 where nothing was compared."""
        return self.changed_elements / max(self.compared_elements, 1)


class Packed(_Message, frozen=True):
    """This trainer rank's memory was read; its optimizer may write. ``sent``: what its buckets became."""

    seq: int
    stamps: tuple[Stamp, ...]
    sent: Sent = Sent()


class Flushed(_Message, frozen=True):
    """Nothing of this trainer rank is on its way any more; ``lost`` names sinks that it could not reach, and why."""

    seq: int
    stamps: tuple[Stamp, ...]
    lost: dict[int, str] = {}


class Voted(_Message, frozen=True):
    """This engine rank holds the whole version, verified. It now waits for the decision."""

    seq: int
    stamps: tuple[Stamp, ...]


class Installed(_Message, frozen=True):
    """This engine rank's live memory is the version."""

    seq: int
    stamps: tuple[Stamp, ...]


class Waiting(_Message, frozen=True):
    """This engine rank entered `Sink.prepare`: it answers what it is sent."""


class Failed(_Message, frozen=True):
    """This rank cannot go on with ``seq``, or with setting up ``epoch`` (seq 0), or with joining (both 0)."""

    seq: int
    epoch: int
    fault: Fault


class Ping(_Message, frozen=True):
    """Sign of life; answered by `Pong`."""


class Leave(_Message, frozen=True):
    """This rank goes on purpose."""


# ---- coordinator to client


class Accepted(_Message, frozen=True):
    """The rank is a member."""

    incarnation: int


class NameTable(_Message, frozen=True):
    """The trainer's tensors, for the engine's recorder."""

    incarnation: int
    names_digest: str
    tensors: tuple[TensorSpec, ...]


class Rejoin(_Message, frozen=True):
    """The coordinator does not know this rank (it restarted): join again."""

    incarnation: int


class Setup(_Message, frozen=True):
    """A new epoch: compile this slice (an encoded `CompactSlice`) and offer staging.

    ``delta``: keep the wire bytes of each version, for deltas against it.
    """

    epoch: int
    plan_digest: str
    transport: str
    num_sources: int
    deadline_s: float
    slice_: bytes
    delta: bool = False


class Connect(_Message, frozen=True):
    """All offers of the epoch, in order of trainer rank and sink index."""

    epoch: int
    deadline_s: float
    source_offers: tuple[bytes, ...]
    sink_offers: tuple[bytes, ...]


class Begin(_Message, frozen=True):
    """Publish ``version`` now, as ``seq``. A trainer rank is told the ``replicas`` that take part.

    ``base_seq``: the publish that the buckets may be deltas against; 0 means that they come whole.
    """

    seq: int
    version: int
    epoch: int
    plan_digest: str
    deadline_s: float
    replicas: tuple[str, ...] = ()
    base_seq: int = 0


class Decide(_Message, frozen=True):
    """All ranks of the replica voted: install."""

    seq: int


class ReplicaCommitted(_Message, frozen=True):
    """All ranks of the replica installed: serve."""

    seq: int


class Progress(_Message, frozen=True):
    """To the trainer ranks, at once: how far a replica is with ``seq``. ``fault``: why it was dropped."""

    seq: int
    replica: str
    outcome: Literal["prepared", "committed", "dropped"]
    fault: Fault | None = None


class Aborted(_Message, frozen=True):
    """``seq`` is over for this rank. ``superseded``: a newer publish replaces it, which is no error."""

    seq: int
    fault: Fault
    superseded: bool = False


class Totals(msgspec.Struct, frozen=True, array_like=True):
    """Bytes of one publish, the same for every publish of an epoch: see `PublishReport`."""

    logical_bytes: int = 0
    wire_bytes: int = 0
    sink_bytes: int = 0
    staging_bytes: int = 0


class RankStamps(msgspec.Struct, frozen=True, array_like=True):
    """The phases of one rank: ``name`` is ``trainer/0`` or ``replica/rank``."""

    name: str
    stamps: tuple[Stamp, ...]


class Finished(_Message, frozen=True):
    """``seq`` is over for everybody."""

    seq: int
    committed: tuple[str, ...]
    dropped: dict[str, Fault]
    replicas: dict[str, str]
    fault: Fault | None
    totals: Totals
    ranks: tuple[RankStamps, ...]
    sent: Sent = Sent()
    is_delta: bool = False


class Refused(_Message, frozen=True):
    """The coordinator will not work with this rank."""

    fault: Fault


class Pong(_Message, frozen=True):
    """Answer to `Ping`."""


ToCoordinator: TypeAlias = (
    SourceJoin
    | SinkJoin
    | SinkDescribed
    | Offer
    | Ready
    | PublishRequest
    | Packed
    | Flushed
    | Voted
    | Installed
    | Waiting
    | Failed
    | Ping
    | Leave
)
ToClient: TypeAlias = (
    Accepted
    | NameTable
    | Rejoin
    | Setup
    | Connect
    | Begin
    | Decide
    | ReplicaCommitted
    | Aborted
    | Progress
    | Finished
    | Refused
    | Pong
)

_encoder = msgspec.msgpack.Encoder()
_to_coordinator = msgspec.msgpack.Decoder(ToCoordinator)
_to_client = msgspec.msgpack.Decoder(ToClient)


def encode_message(message: ToCoordinator | ToClient) -> bytes:
    """One frame."""
    return _encoder.encode(message)


def _checked(frame: bytes, decoder: msgspec.msgpack.Decoder) -> object:  # type: ignore[type-arg]
    if len(frame) > MAX_MESSAGE_BYTES:
        raise WireError(f"a message of {len(frame)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as e:
        raise WireError(f"a frame of {len(frame)} bytes is no wsync message: {e}") from e


def decode_to_coordinator(frame: bytes) -> ToCoordinator:
    """Decode what a client sent.

    Raises:
        WireError: too long, or not one of these messages.
    """
    return _checked(frame, _to_coordinator)  # type: ignore[return-value]


def decode_to_client(frame: bytes) -> ToClient:
    """Decode what the coordinator sent.

    Raises:
        WireError: too long, or not one of these messages.
    """
    return _checked(frame, _to_client)  # type: ignore[return-value]
