"""The coordinator: a thread in trainer rank 0 that owns the store's socket and drives one `Round` after another.

It plans, tells every rank its slice, and is the only place that decides. It moves no tensor data.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from wsync.errors import ConnectError, ManifestError, PeerLostError, StateError, WireError
from wsync.plan import Planner
from wsync.plan.types import PlanOptions
from wsync.session.auth import CurveKeys
from wsync.session.channel import PEER_TIMEOUT_S
from wsync.session.clock import local_info, process_is_gone
from wsync.session.epoch import Epoch
from wsync.session.membership import Client, Membership, ReplicaStatus
from wsync.session.messages import (
    MAX_MESSAGE_BYTES,
    Accepted,
    Failed,
    Fault,
    Finished,
    Flushed,
    Installed,
    Leave,
    NameTable,
    Offer,
    Packed,
    Ping,
    Pong,
    PublishRequest,
    Ready,
    Refused,
    Rejoin,
    SinkDescribed,
    SinkJoin,
    SourceJoin,
    ToClient,
    ToCoordinator,
    Voted,
    decode_to_coordinator,
    encode_message,
)
from wsync.session.round import Round
from wsync.spec.cluster import Cluster
from wsync.spec.serde import check_format

_TICK_S = 0.05
_LIVENESS_S = 0.5

_HANDSHAKE_FAILURES = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class _OneKey:
    """ZAP credentials: only the job's own client key is let in."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes | str) -> bool:
        return (key.encode() if isinstance(key, str) else key) == self._public


class Coordinator:
    """Binds the store and serves it until `close`.

    Args:
        store: ``tcp://host:port`` to bind; port 0 picks a free one.
        keys: the job's keys.
        num_sources: trainer ranks.
        transport: name of the transport, or ``"auto"``.
        anchor_every: see `Round`.

    Raises:
        ConnectError: the address cannot be bound.
    """

    def __init__(
        self,
        store: str,
        keys: CurveKeys,
        num_sources: int,
        *,
        transport: str,
        choose_transport: Callable[[list[str]], str],
        cluster: Cluster | None = None,
        options: PlanOptions | None = None,
        peer_timeout_s: float = PEER_TIMEOUT_S,
        anchor_every: int = 0,
    ) -> None:
        self._anchor_every = anchor_every
        self.incarnation = time.time_ns()
        self._members = Membership(num_sources)
        self._transport = transport
        self._choose_transport = choose_transport
        self._cluster = cluster
        self._options = options
        self._planner: Planner | None = None
        self._peer_timeout_s = peer_timeout_s
        self._own = local_info()
        self._rounds: dict[int, Round] = {}
        self._over: collections.deque[Finished] = collections.deque(maxlen=16)
        self._epoch: Epoch | None = None
        self._broken: Fault | None = None
        self._refused: dict[bytes, Fault] = {}
        self._stopping = threading.Event()
        self._next_check = time.monotonic() + _LIVENESS_S
        self._tables = threading.Lock()
        self._context = zmq.Context()
        self._auth = ThreadAuthenticator(self._context)
        self._socket = self._bind(store, keys)
        self.store = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._thread = threading.Thread(target=self._run, name="wsync-coordinator", daemon=True)
        self._thread.start()

    def _bind(self, store: str, keys: CurveKeys) -> zmq.Socket[bytes]:
        self._auth.start()
        self._auth.configure_curve_callback(domain="*", credentials_provider=_OneKey(keys.client_public))
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 500)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        socket.curve_server = True
        socket.curve_secretkey = keys.server_secret
        socket.curve_publickey = keys.server_public
        self._monitor = socket.get_monitor_socket(_HANDSHAKE_FAILURES)
        try:
            socket.bind(store)
        except zmq.ZMQError as e:
            socket.disable_monitor()
            socket.close(linger=0)
            self._auth.stop()
            self._context.destroy(linger=0)
            raise ConnectError(
                f"the store cannot be bound to {store}: {e}", hint="is another trainer using this port?"
            ) from e
        return socket

    def close(self) -> None:
        """Stop serving. May be called twice."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._thread.join(timeout=5)
        self._auth.stop()
        self._context.destroy(linger=500)

    def replicas(self) -> dict[str, ReplicaStatus]:
        """Which replicas are there now, by name. Any thread; waits while the coordinator plans."""
        with self._tables:
            return self._members.status()

    # ---- the loop

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        try:
            while not self._stopping.is_set():
                events = dict(poller.poll(int(_TICK_S * 1000)))
                try:
                    with self._tables:
                        self._turn(events)
                except Exception as e:  # every rank waits on this thread: whatever it is, they must learn of it
                    with self._tables, contextlib.suppress(Exception):
                        self._break(Fault.of(e))
                    self._rounds.clear()
        finally:
            self._socket.disable_monitor()
            self._socket.close()

    def _turn(self, events: dict[Any, int]) -> None:
        if self._monitor in events:
            self._monitor.recv_multipart()
            self._members.handshake_failures += 1
        if self._socket in events:
            self._receive_all()
        now = time.monotonic()
        if now >= self._next_check:
            self._check_liveness(now)
            self._next_check = now + _LIVENESS_S
        self._advance(now)

    def _receive_all(self) -> None:
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            uid = frames[0]
            try:
                if len(frames) != 2:
                    raise WireError(f"a message has {len(frames) - 1} frames, 1 is expected")
                self._dispatch(uid, decode_to_coordinator(frames[1]))
            except Exception as e:  # what one rank sent must not end the others
                self._refuse(uid, Fault.of(e))

    def _send_uid(self, uid: bytes, message: ToClient) -> None:
        self._socket.send_multipart([uid, encode_message(message)])

    def _send(self, client: Client, message: ToClient) -> None:
        self._send_uid(client.uid, message)

    def _refuse(self, uid: bytes, fault: Fault) -> None:
        self._refused[uid] = fault
        self._send_uid(uid, Refused(fault))
        client = self._members.clients.pop(uid, None)
        if client is not None and client.role == "sink":
            self._members.refusals[client.name] = fault

    # ---- messages

    def _dispatch(self, uid: bytes, message: ToCoordinator) -> None:
        if uid in self._refused:
            if not isinstance(message, Leave):
                self._send_uid(uid, Refused(self._refused[uid]))
            return
        client = self._members.clients.get(uid)
        if isinstance(message, SourceJoin):
            self._join_source(uid, message)
        elif isinstance(message, SinkJoin):
            self._join_sink(uid, message)
        elif isinstance(message, Ping):
            # A rank that is not known here joined an earlier incarnation, or its join is still on its way.
            self._send_uid(uid, Pong() if client is not None else Rejoin(self.incarnation))
            if client is not None:
                client.last_heard = time.monotonic()
        elif isinstance(message, Leave):
            if client is not None:
                self._remove(client, "left")
        elif client is None:
            self._send_uid(uid, Rejoin(self.incarnation))
        else:
            client.last_heard = time.monotonic()
            self._from_member(client, message)

    def _from_member(self, client: Client, message: ToCoordinator) -> None:
        if isinstance(message, SinkDescribed):
            self._described(client, message)
        elif isinstance(message, PublishRequest):
            self._requested(client, message)
        elif isinstance(message, Failed) and client.role == "sink" and client.manifest is None:
            self._members.refusals[client.name] = message.fault
            self._members.clients.pop(client.uid, None)
        else:
            # Any other word from a rank says that it is there.
            client.asleep = False
            if self._round is not None:
                self._in_round(self._round, client, message)

    def _in_round(self, current: Round, client: Client, message: ToCoordinator) -> None:
        if isinstance(message, Offer):
            current.offered(client, message)
        elif isinstance(message, Ready):
            current.became_ready(client, message)
        elif isinstance(message, (Packed, Flushed, Voted, Installed)):
            current.progressed(client, message)
        elif isinstance(message, Failed) and message.seq in (0, current.seq):
            current.failed(client, message)

    @property
    def _round(self) -> Round | None:
        """The round that is under way: the oldest one."""
        return self._rounds[min(self._rounds)] if self._rounds else None

    def _join_source(self, uid: bytes, message: SourceJoin) -> None:
        check_format(message.format_version, f"trainer rank {message.manifest.rank}")
        if self._broken is not None:
            raise self._broken.to_error()
        if message.transport != self._transport:
            raise StateError(
                f"trainer rank {message.manifest.rank} wants transport {message.transport!r}, "
                f"rank 0 wants {self._transport!r}"
            )
        if message.delta != (self._anchor_every > 0):
            raise StateError(
                f"trainer rank {message.manifest.rank} says delta={message.delta}, "
                f"rank 0 says delta={self._anchor_every > 0}"
            )
        try:
            self._members.add_source(uid, message.manifest)
            source = self._members.merge_sources()
        except ManifestError as e:
            self._break(Fault.of(e))
            raise
        if source is not None:
            for client in self._members.sources.values():
                self._send(client, Accepted(self.incarnation))
            for client in self._members.sinks():
                self._send_names(client)

    def _join_sink(self, uid: bytes, message: SinkJoin) -> None:
        check_format(message.format_version, f"{message.replica}/{message.rank}")
        now = time.monotonic()
        name = f"{message.replica}/{message.rank}"
        client = Client(uid, name, "sink", message.rank, message.replica, message.world_size, message.info, now)
        replaced = self._members.add_sink(client)
        if replaced is not None and replaced.uid != uid:
            error = StateError(
                f"{name} was joined by pid {message.info.pid} on {message.info.host}; "
                f"pid {replaced.info.pid} on {replaced.info.host} is out",
                hint="if both are meant to serve, give each engine a replica name of its own",
            )
            if self._round is not None:
                self._round.lost(replaced, "was replaced")
            self._refused[replaced.uid] = Fault.of(error)
            self._send_uid(replaced.uid, Refused(Fault.of(error)))
        if self._members.source is not None:
            self._send_names(client)

    def _send_names(self, client: Client) -> None:
        source = self._members.source
        if source is not None:
            self._send(client, NameTable(self.incarnation, self._members.names_digest, source.tensors))

    def _described(self, client: Client, message: SinkDescribed) -> None:
        if message.names_digest != self._members.names_digest:
            self._send_names(client)
            return
        # Planned alone, so that one engine with another model is refused by name and the others go on.
        planner = self._plans()
        live = [c.manifest for c in self._members.sinks() if c.manifest is not None]
        client.manifest = message.manifest if planner is None else planner.accept(message.manifest, live)
        self._send(client, Accepted(self.incarnation))
        if self._round is not None:
            self._round.returned(client.replica)

    def _requested(self, client: Client, message: PublishRequest) -> None:
        if self._broken is not None:
            self._send(client, Refused(self._broken))
            return
        for finished in self._over:
            if finished.seq == message.seq:  # this rank came too late
                self._send(client, finished)
                return
        now = time.monotonic()
        if message.seq not in self._rounds:
            self._rounds[message.seq] = self._new_round(message.seq, now)
        target = self._rounds[message.seq]
        target.request(client.rank, message, now)
        if target.all_requested and self._round is not None and target is not self._round:
            self._round.supersede(message.version)

    def _plans(self) -> Planner | None:
        """The planner of this trainer, once it is complete: it keeps what does not change with the replicas."""
        source = self._members.source
        if self._planner is None and source is not None:
            self._planner = Planner(source, self._cluster, self._options)
        return self._planner

    def _new_round(self, seq: int, now: float) -> Round:
        return Round(
            seq,
            self._members,
            self._epoch,
            self._send,
            choose_transport=self._transport_for,
            planner=self._plans,
            now=now,
            anchor_every=self._anchor_every,
        )

    def _transport_for(self, hosts: list[str]) -> str:
        return self._choose_transport(hosts) if self._transport == "auto" else self._transport

    # ---- time

    def _advance(self, now: float) -> None:
        while (current := self._round) is not None:
            current.advance(now)
            if current.state != "over":
                return
            self._epoch = current.epoch
            del self._rounds[current.seq]
            if current.finished is not None:
                self._over.append(current.finished)
            if self._round is not None:
                self._round.epoch = self._epoch

    def _check_liveness(self, now: float) -> None:
        for client in list(self._members.clients.values()):
            silent = now - client.last_heard
            if process_is_gone(client.info, self._own):
                self._remove(client, "died")
            elif silent > self._peer_timeout_s:
                self._remove(client, f"went silent for {silent:.1f} s (limit {self._peer_timeout_s:g} s)")

    def _remove(self, client: Client, why: str) -> None:
        self._members.clients.pop(client.uid, None)
        if self._round is not None:
            self._round.lost(client, why)
        if client.role == "source":
            fault = Fault.of(PeerLostError(f"{client.name} (pid {client.info.pid} on {client.info.host}) {why}"))
            self._break(fault)

    def _break(self, fault: Fault) -> None:
        """The trainer side cannot go on: every trainer rank is told, engines keep what they serve."""
        self._broken = self._broken or fault
        error = fault.to_error()
        for waiting in list(self._rounds.values()):
            waiting.fail(error)
        for client in list(self._members.sources.values()):
            self._refuse(client.uid, fault)
