"""How a trainer talks to a vLLM server: over HTTP with the standard library alone, or to an ``LLM`` in this process.

Both have the four methods of vLLM's ``VLLMWeightSyncClient`` and, beyond those, what pauses a server.
"""

from __future__ import annotations

import collections
import contextlib
import http.client
import json
import select
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from wsync.errors import ConfigError, ConnectError, DeadlineError, TransportError

_IDLE_S = 2.0
"""A connection that was idle for longer is not used again: vLLM's server closes them after 5 s, maybe just now."""

_SHOWN = 2000
"""Characters of a server's answer that an error shows."""


@runtime_checkable
class WeightSyncClient(Protocol):
    """vLLM's ``VLLMWeightSyncClient``: what any client has."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Any) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


@runtime_checkable
class PausableClient(WeightSyncClient, Protocol):
    """A client that can pause its server."""

    def pause(self, mode: str, clear_cache: bool) -> None: ...

    def resume(self) -> None: ...


class HTTPServer:
    """A vLLM server and its development routes (``VLLM_SERVER_DEV_MODE=1``).

    Args:
        base_url: ``http://host:port``.
        timeout_s: seconds that a call may take. `Fleet` shortens it to what is left of a publish (`limited`).
        headers: sent with every request, such as one that a proxy in front of the server asks for.

    Raises:
        ConfigError: ``base_url`` is no such address.

    Errors of all calls: `ConnectError` (nobody listens), `DeadlineError` (no answer in time) and `TransportError` (the
    server said no); messages have the URL, the route, the status and what the server wrote.

    Threads: any number; each call takes a connection of its own from those that are open.
    """

    def __init__(self, base_url: str, timeout_s: float = 300.0, headers: Mapping[str, str] | None = None) -> None:
        parts = urllib.parse.urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"base_url must be http://host:port, got {base_url!r}")
        try:
            port = parts.port
        except ValueError:
            raise ConfigError(f"base_url must be http://host:port, got {base_url!r}") from None
        self.base_url = base_url.rstrip("/")
        self.timeout_s = timeout_s
        self._address = (parts.hostname, port)
        self._prefix = parts.path.rstrip("/")
        self._secure = parts.scheme == "https"
        self._headers = dict(headers or {})
        self._idle: collections.deque[tuple[http.client.HTTPConnection, float]] = collections.deque()
        self._limit = threading.local()

    def __repr__(self) -> str:
        return f"HTTPServer({self.base_url!r})"

    # ---- vLLM's client protocol

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Make every worker of the server join."""
        self._call("POST", "/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """Open an update on every worker."""
        self._call("POST", "/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Hand every worker what it needs for the update (a dict, or one for each rank)."""
        self._call("POST", "/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Close the update on every worker, and label what is generated from now on."""
        body = None if weight_version is None else {"weight_version": weight_version}
        self._call("POST", "/finish_weight_update", body)

    def shutdown_weight_transfer_engine(self) -> None:
        """Make every worker leave the trainer."""
        self._call("POST", "/shutdown_weight_transfer_engine")

    # ---- beyond it

    def pause(self, mode: str = "keep", clear_cache: bool = True) -> None:
        """Stop stepping. ``mode`` and ``clear_cache`` are vLLM's own; see `Fleet` for what they do."""
        query = urllib.parse.urlencode({"mode": mode, "clear_cache": "true" if clear_cache else "false"})
        self._call("POST", f"/pause?{query}")

    def resume(self) -> None:
        """Go on stepping."""
        self._call("POST", "/resume")

    def is_paused(self) -> bool:
        """Whether the engine does not step."""
        return bool(self._call("GET", "/is_paused").get("is_paused"))

    def reset_prefix_cache(self) -> bool:
        """Drop the prefix cache; False where blocks of it are in use."""
        return bool(self._call("POST", "/reset_prefix_cache").get("success", True))

    def weight_info(self) -> dict[str, Any]:
        """What the server says of its weights: ``{"weight_version": "7"}``."""
        return dict(self._call("GET", "/weight_info"))

    def world_size(self, include_dp: bool = True) -> int:
        """Workers of the server, with or without its data-parallel engines."""
        answer = self._call("GET", f"/get_world_size?include_dp={'true' if include_dp else 'false'}")
        return int(answer.get("world_size", 1))

    def metrics(self) -> str:
        """The text of ``/metrics``."""
        return self._exchange("GET", "/metrics", None)[1].decode(errors="replace")

    @contextlib.contextmanager
    def limited(self, timeout_s: float) -> Iterator[None]:
        """Calls of this thread inside of the block end after ``timeout_s`` seconds from now, all together."""
        before = getattr(self._limit, "deadline", None)
        self._limit.deadline = time.monotonic() + timeout_s
        try:
            yield
        finally:
            self._limit.deadline = before

    def close(self) -> None:
        """Close the open connections. The object may be used on."""
        while self._idle:
            self._idle.pop()[0].close()

    # ---- the wire

    def _call(self, method: str, route: str, body: Any = None) -> dict[str, Any]:
        status, raw = self._exchange(method, route, body)
        try:
            answer = json.loads(raw) if raw else {}
        except ValueError:
            answer = {}
        if status >= 400:
            hint = ""
            if status in (404, 405):
                hint = "start the server with VLLM_SERVER_DEV_MODE=1, which opens these routes"
            raise TransportError(f"{self.base_url}{route} answered {status}: {_said(answer, raw)}", hint=hint)
        return answer if isinstance(answer, dict) else {}

    def _exchange(self, method: str, route: str, body: Any) -> tuple[int, bytes]:
        headers = dict(self._headers)
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        timeout_s = self._timeout()
        if timeout_s <= 0:
            raise DeadlineError(f"no time is left to call {self.base_url}{route}")
        connection = self._take(timeout_s)
        try:
            connection.request(method, self._prefix + route, body=data, headers=headers)
            response = connection.getresponse()
            raw = response.read()
        except TimeoutError as e:
            connection.close()
            raise DeadlineError(f"{self.base_url}{route} did not answer within {timeout_s:.3g} s") from e
        except (OSError, http.client.HTTPException) as e:
            connection.close()
            raise ConnectError(f"{self.base_url}{route} cannot be reached: {type(e).__name__}: {e}") from e
        if response.will_close or response.status >= 400:  # vLLM's server hangs up after an error, without saying so
            connection.close()
        else:
            self._idle.append((connection, time.monotonic()))
        return response.status, raw

    def _timeout(self) -> float:
        deadline = getattr(self._limit, "deadline", None)
        return self.timeout_s if deadline is None else min(self.timeout_s, deadline - time.monotonic())

    def _take(self, timeout_s: float) -> http.client.HTTPConnection:
        while self._idle:
            try:
                connection, since = self._idle.pop()
            except IndexError:
                break
            if time.monotonic() - since < _IDLE_S and _is_quiet(connection):
                connection.sock.settimeout(timeout_s)
                return connection
            connection.close()
        host, port = self._address
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        return kind(host, port, timeout=timeout_s)


def _is_quiet(connection: http.client.HTTPConnection) -> bool:
    """Whether the other side has not closed it (a closed one is readable)."""
    if connection.sock is None:
        return False
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return not poll.poll(0)


def _said(answer: Any, raw: bytes) -> str:
    """What a server wrote, without the JSON around it."""
    if isinstance(answer, dict):
        error = answer.get("error", answer.get("detail"))
        if isinstance(error, dict):
            error = error.get("message")
        if error:
            return str(error)[:_SHOWN]
    return raw.decode(errors="replace")[:_SHOWN].strip() or "(nothing)"


class InProcessServer:
    """A ``vllm.LLM`` of this process, as a server.

    Args:
        llm: the ``LLM``. Nobody may call ``generate`` while a publish commits: its calls are for one thread at a time.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def __repr__(self) -> str:
        return f"InProcessServer({type(self._llm).__name__})"

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Make every worker join."""
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        """Open an update on every worker."""
        self._llm.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        """Hand every worker what it needs for the update."""
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Close the update on every worker, and label what is generated from now on."""
        if weight_version is None:
            self._llm.finish_weight_update()
        else:
            self._llm.finish_weight_update(weight_version)

    def shutdown_weight_transfer_engine(self) -> None:
        """Make every worker leave the trainer."""
        self._llm.shutdown_weight_transfer_engine()

    def pause(self, mode: str = "keep", clear_cache: bool = True) -> None:
        """Between two calls of ``generate`` nothing runs: there is only the prefix cache to drop.

        Raises:
            ConfigError: the mode is ``"wait"``, which an engine in the calling process cannot do.
        """
        if mode == "wait":
            raise ConfigError("an LLM in this process cannot be paused with 'wait'; known: 'keep', 'abort'")
        self._core("pause_scheduler", mode, clear_cache)

    def resume(self) -> None:
        """Go on stepping."""
        self._core("resume_scheduler")

    def is_paused(self) -> bool:
        """Whether the engine does not step."""
        return bool(self._core("is_scheduler_paused"))

    def reset_prefix_cache(self) -> bool:
        """Drop the prefix cache; False where blocks of it are in use."""
        return bool(self._llm.reset_prefix_cache())

    def weight_info(self) -> dict[str, Any]:
        """What the engine says of its weights."""
        return {"weight_version": self._llm.get_weight_version()}

    def world_size(self, include_dp: bool = True) -> int:
        """Workers, with or without data-parallel engines."""
        parallel = self._llm.llm_engine.vllm_config.parallel_config
        return int(parallel.world_size_across_dp if include_dp else parallel.world_size)

    def _core(self, method: str, *args: Any) -> Any:
        """Call a method of the engine core, which is in this process or behind a client."""
        client = self._llm.llm_engine.engine_core
        core = getattr(client, "engine_core", None)
        if core is not None:
            return getattr(core, method)(*args)
        return client.call_utility(method, *args)
