"""A real vLLM server in processes of its own, started as a user starts one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_cpu.harness import COMMAND_TIMEOUT_S, Dump, EngineError, engine_environment, read_dump, tail
from wsync.testing.processes import free_port

SERVER_START_TIMEOUT_S = 240.0
MODEL_NAME = "tiny"


class Server:
    """``python -m vllm.entrypoints.openai.api_server`` with its development routes. A context manager.

    Several can start at the same time: make them with ``wait=False``, then `wait_healthy` each.

    Args:
        model_dir: of the checkpoint; requests name the model "tiny".
        tp, dp: tensor and data parallel size.
        backend: of weight transfer, or None.
        cpu: "native" or "avx2".
        options: further arguments of the command line.
        env: further variables, such as ``WSYNC_KEY``.
        wait: whether to wait until it answers.

    Raises:
        EngineError: it ended or was not healthy in time; the message has the end of its log.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        tp: int = 1,
        dp: int = 1,
        backend: str | None = None,
        cpu: str = "native",
        options: tuple[str, ...] = (),
        env: dict[str, str] | None = None,
        wait: bool = True,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="wsync-server-")
        self._log = Path(self._folder.name) / "server.log"
        self._num_dumps = 0
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        environment = engine_environment(cpu) | {"VLLM_SERVER_DEV_MODE": "1"} | (env or {})
        # A server has its engine in a process of its own.
        del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                _command_line(model_dir, self.port, tp, dp, backend, options),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        if wait:
            try:
                self.wait_healthy()
            except BaseException:
                self.close()
                raise

    @property
    def pid(self) -> int:
        """Of the API server."""
        return self._process.pid

    def wait_healthy(self, timeout_s: float = SERVER_START_TIMEOUT_S) -> None:
        """Wait until ``/health`` answers.

        Raises:
            EngineError: the server ended, or it took too long.
        """
        deadline = time.monotonic() + timeout_s
        while not self.is_healthy():
            if self._process.poll() is not None:
                raise EngineError("Ended", f"the server ended with {self._process.returncode}", self.log_tail())
            if time.monotonic() > deadline:
                raise EngineError("Timeout", f"the server is not healthy after {timeout_s:g} s", self.log_tail())
            time.sleep(0.2)

    def is_healthy(self) -> bool:
        """Whether ``/health`` answers now."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def request(self, route: str, body: Any = None, timeout_s: float = COMMAND_TIMEOUT_S) -> Any:
        """GET a route, or POST JSON to it; returns the JSON of the answer, None where it is empty.

        Raises:
            EngineError: the server answered an error (`kind` is its status), or is gone.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + route, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                raw = answer.read()
        except urllib.error.HTTPError as e:
            said = e.read().decode(errors="replace")
            raise EngineError(str(e.code), f"{route}: {said}", self.log_tail()) from e
        except OSError as e:
            raise EngineError("Ended", f"{route}: {e}", self.log_tail()) from e
        return json.loads(raw) if raw else None

    def complete(self, prompt: str, max_tokens: int, **parameters: Any) -> dict[str, Any]:
        """Greedy completion: the first choice, with log-probabilities of its tokens."""
        body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "logprobs": 1}
        choice: dict[str, Any] = self.request("/v1/completions", body | {"ignore_eos": True} | parameters)["choices"][0]
        return choice

    def dump(self) -> Dump:
        """Everything that every rank computes with, as `Engine.dump`; ranks of data-parallel engines count on."""
        self._num_dumps += 1
        folder = Path(self._folder.name) / f"dump{self._num_dumps}"
        folder.mkdir()
        self.request("/collective_rpc", {"method": "wsync_test_dump", "args": [str(folder)]})
        return read_dump(folder)

    def log_tail(self) -> str:
        """The last lines of the log, for messages."""
        return tail(self._log)

    def log(self) -> str:
        """What all processes of the server wrote."""
        return self._log.read_text(errors="replace")

    def kill(self, sig: int = signal.SIGKILL) -> None:
        """Send a signal to every process of the server: with SIGKILL, what a machine's death looks like."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, sig)

    def close(self) -> None:
        """End the server, and whatever of it does not end by itself. May be called twice."""
        if self._process.poll() is None:
            self.kill(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        self.kill()
        self._process.wait(10)
        self._folder.cleanup()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _command_line(
    model_dir: Path, port: int, tp: int, dp: int, backend: str | None, options: tuple[str, ...]
) -> list[str]:
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    line += ["--model", str(model_dir), "--served-model-name", MODEL_NAME]
    line += ["--host", "127.0.0.1", "--port", str(port)]
    line += ["--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "256", "--seed", "0"]
    line += ["--kv-cache-memory-bytes", str(64 << 20), "--worker-extension-cls", "vllm_cpu.extension.EngineProbe"]
    line += ["--tensor-parallel-size", str(tp), "--data-parallel-size", str(dp)]
    if backend is not None:
        line += ["--weight-transfer-config", json.dumps({"backend": backend})]
    return [*line, *options]
