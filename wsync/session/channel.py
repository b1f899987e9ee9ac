"""A client's connection to the coordinator: one I/O thread owns the socket, callers send and wait with deadlines.

Threads: any thread may `send`; one thread at a time may `recv`. The I/O thread pings the coordinator every
``PING_S`` seconds, so that a rank whose main thread computes for long still counts as alive.
"""

from __future__ import annotations

import collections
import contextlib
import secrets
import threading
import time

import zmq

from wsync.errors import ConfigError, ConnectError, DeadlineError, PeerLostError, StateError, WireError, WsyncError
from wsync.session.auth import CurveKeys
from wsync.session.messages import (
    MAX_MESSAGE_BYTES,
    Leave,
    Ping,
    Pong,
    Refused,
    ToClient,
    ToCoordinator,
    decode_to_client,
    encode_message,
)

PING_S = 0.5
PEER_TIMEOUT_S = 10.0
"""Silence after which a peer counts as lost. A dead process of the same host is noticed within a second."""

_HANDSHAKE_FAILURES = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class Channel:
    """A DEALER socket with CURVE, a receive queue and a heartbeat.

    Args:
        store: ``tcp://host:port`` of the coordinator.
        keys: the job's keys.
        name: how this rank is called in messages, such as ``engine-0/1``.

    Attributes:
        arrived_s: monotonic time at which the message that was received last had arrived.
    """

    def __init__(self, store: str, keys: CurveKeys, name: str, *, peer_timeout_s: float = PEER_TIMEOUT_S) -> None:
        if peer_timeout_s <= 2 * PING_S:
            raise ConfigError(f"peer_timeout_s must be over {2 * PING_S:g} s, twice the ping, got {peer_timeout_s:g}")
        self.store = store
        self.name = name
        self.peer_timeout_s = peer_timeout_s
        self._keys = keys
        self._context = zmq.Context()
        self._arrived = threading.Condition()
        self._inbox: collections.deque[tuple[float, ToClient]] = collections.deque()
        self.arrived_s = 0.0
        self._error: WsyncError | None = None
        self._last_heard = 0.0
        self._handshake_failures = 0
        self._closed = False
        self._out_lock = threading.Lock()
        address = f"inproc://{secrets.token_hex(8)}"
        self._inner = self._context.socket(zmq.PAIR)
        self._inner.bind(address)
        self._outer = self._context.socket(zmq.PAIR)
        self._outer.connect(address)
        self._thread = threading.Thread(target=self._run, name=f"wsync-channel-{name}", daemon=True)
        self._thread.start()

    # ---- callers

    def send(self, message: ToCoordinator) -> None:
        """Queue a message. Returns at once.

        Raises:
            StateError: the channel is closed.
        """
        with self._out_lock:
            if self._closed:
                raise StateError(f"{self.name} is closed")
            try:
                self._inner.send(encode_message(message), zmq.NOBLOCK)
            except zmq.Again:  # the I/O thread ended
                raise self._error or StateError(f"{self.name} lost its connection to {self.store}") from None

    def poll(self) -> ToClient | None:
        """The next message that is there, or None. Raises as `recv` does when the peer is lost."""
        with self._arrived:
            if self._inbox:
                return self._next()
            self._raise_if_broken(patient=False)
        return None

    def _next(self) -> ToClient:
        self.arrived_s, message = self._inbox.popleft()
        return message

    def unread(self, message: ToClient) -> None:
        """Put a message back: the next `recv` or `poll` returns it."""
        with self._arrived:
            self._inbox.appendleft((self.arrived_s, message))

    def recv(self, deadline: float, what: str, *, patient: bool = False) -> ToClient:
        """The next message.

        Args:
            deadline: on the monotonic clock.
            what: named in the error.
            patient: a silent coordinator is no error before the deadline (it may be restarting).

        Raises:
            DeadlineError: nothing came in time.
            PeerLostError: the coordinator went silent.
            ConnectError: the coordinator was never reached, or refused the key.
            StateError: the channel is closed.
        """
        with self._arrived:
            while True:
                if self._inbox:
                    return self._next()
                self._raise_if_broken(patient)
                left = deadline - time.monotonic()
                if left <= 0:
                    self._raise_if_broken(patient=False)
                    self._raise_if_unreached(deadline)
                    raise DeadlineError(f"{self.name} ran out of time waiting for {what} from {self.store}")
                self._arrived.wait(min(left, 0.2))

    def close(self, *, leave: bool = True) -> None:
        """Say goodbye and stop the I/O thread. May be called twice."""
        with self._out_lock:
            if self._closed:
                return
            self._closed = True
            with contextlib.suppress(zmq.Again):
                if leave:
                    self._inner.send(encode_message(Leave()), zmq.NOBLOCK)
                self._inner.send(b"", zmq.NOBLOCK)
        with self._arrived:
            self._inbox.clear()
            self._error = StateError(f"{self.name} was closed")
            self._arrived.notify_all()
        self._thread.join(timeout=5)
        self._inner.close(linger=0)
        self._context.destroy(linger=0)

    @property
    def is_broken(self) -> bool:
        """Whether the channel is closed, was refused, or cannot connect; silence alone does not break it."""
        return self._error is not None

    # ---- state, under the condition

    def _raise_if_broken(self, patient: bool) -> None:
        if self._error is not None:
            raise self._error
        if patient:
            return
        silent = time.monotonic() - self._last_heard
        if self._last_heard and silent > self.peer_timeout_s:
            raise PeerLostError(
                f"{self.name} has not heard from trainer rank 0 ({self.store}) for {silent:.1f} s, "
                f"the limit is {self.peer_timeout_s:g} s"
            )
        if not self._last_heard and self._handshake_failures >= 3:
            self._raise_if_unreached(time.monotonic())

    def _raise_if_unreached(self, deadline: float) -> None:
        if self._last_heard:
            return
        if self._handshake_failures:
            raise ConnectError(
                f"the store at {self.store} and {self.name} hold different keys "
                f"({self._handshake_failures} handshakes failed)",
                hint="give every rank the same key_file or WSYNC_KEY",
            )
        raise ConnectError(
            f"{self.name} found no store at {self.store} in time",
            hint="is trainer rank 0 running, and is the port open?",
        )

    # ---- the I/O thread

    def _run(self) -> None:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 500)
        # A fixed identity, so that the coordinator knows this rank again after a reconnect.
        socket.setsockopt(zmq.ROUTING_ID, b"c" + secrets.token_bytes(16))
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.RECONNECT_IVL, 50)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        socket.setsockopt(zmq.HANDSHAKE_IVL, 2000)
        socket.curve_serverkey = self._keys.server_public
        socket.curve_publickey = self._keys.client_public
        socket.curve_secretkey = self._keys.client_secret
        monitor = socket.get_monitor_socket(_HANDSHAKE_FAILURES)
        poller = zmq.Poller()
        try:
            socket.connect(self.store)
            for s in (socket, self._outer, monitor):
                poller.register(s, zmq.POLLIN)
            self._loop(socket, monitor, poller)
        except Exception as e:  # callers wait on this thread: they must learn of every error
            self._fail(ConnectError(f"{self.name} cannot connect to {self.store}: {e}"))
        finally:
            socket.disable_monitor()
            socket.close()
            self._outer.close(linger=0)

    def _loop(self, socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes], poller: zmq.Poller) -> None:
        next_ping = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= next_ping:
                socket.send(encode_message(Ping()))
                next_ping = now + PING_S
            events = dict(poller.poll(max(1, int((next_ping - now) * 1000))))
            if monitor in events:
                monitor.recv_multipart()
                with self._arrived:
                    self._handshake_failures += 1
                    self._arrived.notify_all()
            if self._outer in events:
                frame = self._outer.recv()
                if not frame:
                    return
                socket.send(frame)
            if socket in events:
                self._deliver(socket.recv())

    def _deliver(self, frame: bytes) -> None:
        try:
            message = decode_to_client(frame)
        except WireError as e:
            self._fail(e)
            return
        with self._arrived:
            self._last_heard = time.monotonic()
            if isinstance(message, Refused):
                self._error = self._error or message.fault.to_error()
            elif not isinstance(message, Pong) and not self._closed:
                self._inbox.append((self._last_heard, message))
            self._arrived.notify_all()

    def _fail(self, error: WsyncError) -> None:
        with self._arrived:
            self._error = self._error or error
            self._arrived.notify_all()
