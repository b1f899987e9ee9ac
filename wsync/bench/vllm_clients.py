"""Clients that generate all the time: plain HTTP, one thread each, every token with the moment when it came."""

from __future__ import annotations

import http.client
import itertools
import random
import socket
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

import msgspec

from wsync.bench.vllm_server import HOST, MAX_MODEL_LEN, MODEL_NAME
from wsync.errors import DeadlineError, TransportError

_PROMPT_TOKENS = 16
_POLL_S = 0.005
_JOIN_S = 10.0


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None


class _Piece(msgspec.Struct):
    choices: list[_Choice] = []
    error: Any = None


class _Client:
    """One thread that sends a request when the last one has ended."""

    def __init__(self, number: int, port: int, vocabulary: int, timeout_s: float) -> None:
        self.stamps: list[tuple[float, int]] = []
        self.error = ""
        self._number = number
        self._random = random.Random(number)
        self._port = port
        self._vocabulary = vocabulary
        self._timeout_s = timeout_s
        self._stopped = False
        self._socket: socket.socket | None = None
        self.thread = threading.Thread(target=self._run, name=f"wsync-bench-client-{number}", daemon=True)

    def stop(self) -> None:
        """Hang up, which ends the request on the server."""
        self._stopped = True
        with suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._generate()
        except Exception as e:  # the main thread must hear of it
            if not self._stopped:
                self.error = f"client {self._number}: {type(e).__name__}: {e}"

    def _generate(self) -> None:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=self._timeout_s)
        connection.connect()
        self._socket = connection.sock
        try:
            if self._stopped:  # it came between two connections
                return
            body = msgspec.json.encode(self._request())
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise TransportError(f"the server answered {response.status}: {response.read(500)!r}")
            for line in response:
                if line.startswith(b"data: {"):
                    self._take(line[6:])
        finally:
            connection.close()

    def _request(self) -> dict[str, Any]:
        return {
            "model": MODEL_NAME,
            "prompt": [self._random.randrange(self._vocabulary) for _ in range(_PROMPT_TOKENS)],
            "max_tokens": MAX_MODEL_LEN - _PROMPT_TOKENS - 1,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }

    def _take(self, data: bytes) -> None:
        piece = msgspec.json.decode(data, type=_Piece)
        if piece.error is not None:
            raise TransportError(f"the server ended a request: {piece.error}")
        count = sum(len(choice.token_ids or ()) for choice in piece.choices)
        if count:
            self.stamps.append((time.monotonic(), count))


class Clients:
    """Clients of one server. A context manager: they generate while the block runs.

    Args:
        port: of the server.
        num_clients: threads.
        vocabulary: tokens that prompts are made of.
        deadline_s: for a token to come.
    """

    def __init__(self, port: int, num_clients: int, vocabulary: int, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._clients = [_Client(number, port, vocabulary, deadline_s) for number in range(num_clients)]

    def __enter__(self) -> Clients:
        for client in self._clients:
            client.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = time.monotonic() + _JOIN_S
        while any(client.thread.is_alive() for client in self._clients) and time.monotonic() < end:
            for client in self._clients:
                client.stop()
                client.thread.join(_POLL_S)

    def await_tokens(self, count: int) -> None:
        """Wait until every client has got ``count`` more tokens.

        Raises:
            TransportError: a client failed.
            DeadlineError: one got too few in time.
        """
        goals = [(client, _count(client) + count) for client in self._clients]
        end = time.monotonic() + self._deadline_s
        while any(_count(client) < goal for client, goal in goals):
            self.check()
            if time.monotonic() > end:
                raise DeadlineError(f"not every client got {count} tokens within {self._deadline_s:g} s")
            time.sleep(_POLL_S)

    def check(self) -> None:
        """Raise if a client failed.

        Raises:
            TransportError: with what it met.
        """
        for client in self._clients:
            if client.error:
                raise TransportError(client.error)

    def rate(self, begin: float, end: float) -> float:
        """Tokens per second of all clients together in that time (`time.monotonic`)."""
        stamps = itertools.chain.from_iterable(client.stamps for client in self._clients)
        return sum(count for when, count in stamps if begin <= when < end) / (end - begin)

    def longest_wait(self, begin: float, end: float) -> float:
        """The longest time that any client waited for its next token, among the waits that touch that time."""
        return max(_longest_wait([when for when, _ in client.stamps], begin, end) for client in self._clients)


def _longest_wait(stamps: list[float], begin: float, end: float) -> float:
    waits = (last - first for first, last in itertools.pairwise(stamps) if last > begin and first < end)
    return max(waits, default=0.0)


def _count(client: _Client) -> int:
    return sum(count for _, count in list(client.stamps))
