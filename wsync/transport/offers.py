"""Offers: what an end tells the others about itself before they connect, and the checks of that."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Sequence

import msgspec

from wsync.errors import ConfigError, FormatVersionError, PlanMismatchError

OFFER_FORMAT = 1
MAX_OFFER_BYTES = 16 << 20
"""Bound on what is decoded: an offer lists four bytes or so per bucket."""


class Offer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An end's offer.

    Attributes:
        format_version: of this struct.
        transport: name of the transport.
        side: ``"source"`` or ``"sink"``.
        rank: trainer rank, or sink index.
        plan_digest: of the plan this end holds.
        host: identity of the host, see `host_identity`.
        bucket_bytes: size of a bucket.
        buckets: ``bucket_idx`` by position in this end's staging.
        exchange_elements: f32 elements of the exchanged vector.
        segment: name of the shared segment; empty where there is none.
        num_openers: ends that open the segment.
        addresses: (address, port) pairs where this end can be reached.
    """

    format_version: int
    transport: str
    side: str
    rank: int
    plan_digest: str
    host: str
    bucket_bytes: int
    buckets: tuple[int, ...] = ()
    exchange_elements: int = 0
    segment: str = ""
    num_openers: int = 0
    addresses: tuple[tuple[str, int], ...] = ()

    @property
    def label(self) -> str:
        """How messages call this end."""
        return f"{'rank' if self.side == 'source' else 'sink'} {self.rank} on {self.host}"

    @property
    def plan_token(self) -> int:
        """64 bits of the plan's digest."""
        return int.from_bytes(hashlib.blake2b(self.plan_digest.encode(), digest_size=8).digest(), "little")


class _Version(msgspec.Struct, frozen=True):
    format_version: int


def host_identity() -> str:
    """Name of this host: its host name and what tells containers with a /dev/shm of their own apart."""
    try:
        shm = os.stat("/dev/shm").st_dev
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot:
            return f"{socket.gethostname()}/{boot.read().strip()[:8]}.{shm:x}"
    except OSError:
        return socket.gethostname()


def encode_offer(offer: Offer) -> bytes:
    """Bytes of an offer (msgpack)."""
    return msgspec.msgpack.encode(offer)


def decode_offer(raw: bytes, transport: str, side: str, rank: int) -> Offer:
    """Decode an offer strictly and check who made it.

    Raises:
        FormatVersionError: it is of another format.
        ConfigError: it cannot be decoded, or another end or another transport made it.
    """
    who = f"the offer of {'rank' if side == 'source' else 'sink'} {rank}"
    if len(raw) > MAX_OFFER_BYTES:
        raise ConfigError(f"{who} has {len(raw)} bytes and at most {MAX_OFFER_BYTES} are accepted")
    try:
        found = msgspec.msgpack.decode(raw, type=_Version).format_version
        if found != OFFER_FORMAT:
            raise FormatVersionError(f"{who} has format {found} and this process reads {OFFER_FORMAT}")
        offer = msgspec.msgpack.decode(raw, type=Offer)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{who} cannot be decoded: {error}") from error
    if offer.transport != transport:
        raise ConfigError(f"{who} is for transport {offer.transport!r} and this end uses {transport!r}")
    if (offer.side, offer.rank) != (side, rank):
        raise ConfigError(f"{who} was made by {offer.label}")
    return offer


def decode_offers(
    own: Offer, source_offers: Sequence[bytes], sink_offers: Sequence[bytes]
) -> tuple[list[Offer], list[Offer]]:
    """Decode everybody's offers and check that all hold the plan that ``own`` holds.

    Raises:
        PlanMismatchError: plans, bucket sizes or exchanged vectors differ.
        ConfigError: an offer is not what its place says.
    """
    sources = [decode_offer(raw, own.transport, "source", i) for i, raw in enumerate(source_offers)]
    sinks = [decode_offer(raw, own.transport, "sink", i) for i, raw in enumerate(sink_offers)]
    for other in (*sources, *sinks):
        if other.plan_digest != own.plan_digest:
            raise PlanMismatchError(f"{other.label} holds plan {other.plan_digest} and {own.label} {own.plan_digest}")
        if other.bucket_bytes != own.bucket_bytes:
            raise PlanMismatchError(
                f"{other.label} has buckets of {other.bucket_bytes} bytes and {own.label} of {own.bucket_bytes}"
            )
        if own.side == other.side == "source" and other.exchange_elements != own.exchange_elements:
            raise PlanMismatchError(
                f"{other.label} exchanges {other.exchange_elements} elements and {own.label} {own.exchange_elements}"
            )
    ends = sources if own.side == "source" else sinks
    if own.rank >= len(ends) or ends[own.rank] != own:
        raise ConfigError(f"the offers do not contain that of {own.label} at position {own.rank} of {len(ends)}")
    return sources, sinks
