"""A real vLLM server in processes of its own: start it, ask it, end it."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from wsync.bench.vllm_options import MODES
from wsync.errors import ConnectError, DeadlineError, PeerLostError, TransportError
from wsync.testing.processes import free_port

HOST = "127.0.0.1"
MODEL_NAME = "bench"
MAX_MODEL_LEN = 512

_CACHE_BYTES = 512 << 20
"""For keys and values: of eight requests of a model with the shape of Qwen3-0.6B."""

_POLL_S = 0.2
_START_S = 300.0
"""Imports and a first step take long on a busy machine: a shorter deadline does not count for the start."""
_TERM_S = 10.0
_LOG_TAIL = 4000

_ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONUNBUFFERED": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # there are more processes than cores: idle threads must not spin
}


class VLLMServer:
    """One server. A context manager: it starts when the block begins (`await_ready`), and is gone when the block ends.

    Args:
        mode: one of `MODES`.
        model: folder of the checkpoint.
        num_requests: that it must be able to serve at the same time.
        run_dir: for its log and whatever its libraries leave behind.
        deadline_s: of every call, and of its start if it is longer than five minutes.

    Attributes:
        port: where it listens.
        start_s: seconds until it answered.
    """

    def __init__(self, mode: str, model: Path, num_requests: int, run_dir: Path, deadline_s: float) -> None:
        self._mode = mode
        self._model = model
        self._num_requests = num_requests
        self._run_dir = run_dir
        self._deadline_s = deadline_s
        self._log = run_dir / f"server-{mode}-{model.name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self.start_s = 0.0
        self._began = 0.0

    @property
    def url(self) -> str:
        """``http://host:port``."""
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> VLLMServer:
        self._began = time.monotonic()
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "wsync.bench.vllm_serve", str(os.getpid()), *self._arguments()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, TransportError):
            self._explain(error)
        self._end()

    def _arguments(self) -> list[str]:
        return [
            *("--model", str(self._model), "--served-model-name", MODEL_NAME),
            *("--host", HOST, "--port", str(self.port), "--uvicorn-log-level", "warning"),
            *("--dtype", "bfloat16", "--max-model-len", str(MAX_MODEL_LEN), "--seed", "0"),
            *("--max-num-seqs", str(self._num_requests), "--enforce-eager"),
            *("--kv-cache-memory-bytes", str(_CACHE_BYTES)),
            # A hit in the prefix cache changes the shapes that are computed with, and so the last bits of a logit.
            "--no-enable-prefix-caching",
            *("--weight-transfer-config", '{"backend": "wsync"}'),
            *("--worker-extension-cls", "wsync.bench.vllm_peer.BenchExtension"),
        ]

    def _environment(self) -> dict[str, str]:
        environment = {**os.environ, **_ENVIRONMENT, **MODES[self._mode]}
        environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would come before --kv-cache-memory-bytes
        environment["TMPDIR"] = str(self._run_dir)
        environment["VLLM_RPC_BASE_PATH"] = str(self._model.parent)  # the name of a socket has to be short
        return environment

    def await_ready(self) -> None:
        """Wait until it answers.

        Raises:
            PeerLostError: its process ended.
            DeadlineError: it did not come up in time.
        """
        while True:
            try:
                self._exchange("GET", "/health", None, timeout_s=5.0)
                self.start_s = time.monotonic() - self._began
                return
            except (OSError, http.client.HTTPException):
                self.check_alive()
            start_s = max(self._deadline_s, _START_S)
            if time.monotonic() > self._began + start_s:
                raise DeadlineError(
                    f"the vLLM server ({self._mode}) did not answer within {start_s:g} s", hint=self._words()
                )
            time.sleep(_POLL_S)

    def check_alive(self) -> None:
        """Raise if its process has ended.

        Raises:
            PeerLostError: with how it ended and the last line of its log.
        """
        status = self._process.poll() if self._process is not None else 0
        if status is not None:
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            error = PeerLostError(f"the vLLM server ({self._mode}) {how}", hint=self._words())
            error.__notes__ = [self._log_tail()]
            raise error

    def _explain(self, error: TransportError) -> None:
        """Say of a failed call what the server's log says."""
        error.__notes__ = [*getattr(error, "__notes__", []), self._log_tail()]
        error.hint = error.hint or self._words()

    def _words(self) -> str:
        lines = [line for line in self._log_tail().splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line and "WARNING" not in line]
        return f"its last words: {(errors or lines)[-1].strip()}" if lines else ""

    def _log_tail(self) -> str:
        with suppress(OSError):
            return self._log.read_text(errors="replace")[-_LOG_TAIL:]
        return ""

    def _end(self) -> None:
        """End it and all of its children."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_TERM_S)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # its session, and so its engine, which may outlive it
        process.wait()

    def kill(self) -> None:
        """End it at once, as a failure would."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)

    # ---- calls

    def call(self, route: str, body: Any = None) -> Any:
        """POST ``body`` (GET without one) and return the JSON of the answer.

        Raises:
            ConnectError: nobody answers.
            TransportError: the server said no.
        """
        try:
            status, raw = self._exchange("GET" if body is None else "POST", route, body, self._deadline_s)
        except TimeoutError as e:
            raise DeadlineError(f"{self.url}{route} did not answer within {self._deadline_s:g} s") from e
        except (OSError, http.client.HTTPException) as e:
            self.check_alive()
            raise ConnectError(f"{self.url}{route} cannot be reached: {type(e).__name__}: {e}") from e
        if status >= 400:
            raise TransportError(f"{self.url}{route} answered {status}: {raw.decode(errors='replace')[:500]}")
        return msgspec.json.decode(raw) if raw else None

    def on_worker(self, method: str, **kwargs: Any) -> Any:
        """Call a method of the worker, and return what it returned: a dict, a list, or anything else as text."""
        answer = self.call("/collective_rpc", {"method": method, "kwargs": kwargs, "timeout": self._deadline_s})
        return answer["results"][0]

    def metric(self, name: str) -> float:
        """The sum of a gauge or counter of ``/metrics`` over its labels."""
        _, raw = self._exchange("GET", "/metrics", None, self._deadline_s)
        lines = [line for line in raw.decode().splitlines() if line.startswith((f"{name}{{", f"{name} "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def _exchange(self, method: str, route: str, body: Any, timeout_s: float) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout_s)
        try:
            data = None if body is None else msgspec.json.encode(body)
            connection.request(method, route, body=data, headers={"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()
