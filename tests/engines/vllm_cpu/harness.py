"""Real vLLM engines in processes of their own, for tests: start, generate, dump what they hold, compare dumps."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

HERE = Path(__file__).parent
START_TIMEOUT_S = 120.0
COMMAND_TIMEOUT_S = 60.0
LOG_TAIL_LINES = 40

PROMPTS = ["hello world, this is", "a tiny tokenizer that a test makes", "x"]
MAX_TOKENS = 8

CPU_FLAVOURS = ("native", "avx2")


@functools.cache
def missing() -> str | None:
    """Why no engine can run here, or None."""
    for name in ("vllm", "transformers", "safetensors"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            return f"{name} is not installed"
    return None


def engine_environment(cpu: str = "native") -> dict[str, str]:
    """Variables of an engine's process: no network, a small cache, and the CPU that it shall see."""
    folders = [str(HERE.parent)]
    seen_cpu = {}
    if cpu == "avx2":
        folders.append(str(HERE / "avx2_only"))
        # oneDNN asks the CPU itself.
        seen_cpu = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    if before := os.environ.get("PYTHONPATH"):
        folders.append(before)
    return {
        **os.environ,
        **seen_cpu,
        "PYTHONPATH": os.pathsep.join(folders),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }


class EngineError(Exception):
    """A command failed in the engine's process.

    Attributes:
        kind: class name of what it raised; "Ended" where the process is gone, "Timeout" where it gave no answer.
    """

    def __init__(self, kind: str, message: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {message}\n{detail}".rstrip())
        self.kind = kind


def tail(log: Path) -> str:
    """The last lines of a log, for messages."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join([f"--- {log.name}:", *lines[-LOG_TAIL_LINES:]])


class EngineHost:
    """A process that has imported vLLM and makes engine processes, see `engine_child`. A context manager.

    Args:
        cpu: "native", or "avx2": engines take the CPU for one without AVX-512.
    """

    def __init__(self, cpu: str = "native") -> None:
        self.cpu = cpu
        self._folder = tempfile.TemporaryDirectory(prefix="wsync-vllm-")
        self._socket = Path(self._folder.name) / "socket"
        self._log = Path(self._folder.name) / "host.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm_cpu.engine_child", str(self._socket)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=engine_environment(cpu),
            )

    def connect(self) -> socket.socket:
        """A connection to a new engine process.

        Raises:
            EngineError: the host ended or does not answer.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(self._socket))
                return connection
            except OSError as e:
                connection.close()
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise EngineError("Ended", f"no engine host: {e}", tail(self._log)) from e
                time.sleep(0.05)

    def close(self) -> None:
        """End the host. Engines end with their connections."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def __enter__(self) -> EngineHost:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Held:
    """One tensor of an engine.

    Attributes:
        kind: "parameter", "buffer", "attribute" (any other tensor that a layer refers to) or "packed" (what a linear
            kernel holds in a form of its own, read back as `[N, K]`).
        dtype: such as "torch.bfloat16".
        shape, stride: of the tensor.
        data: its bytes in the order of memory.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    data: np.ndarray[Any, np.dtype[np.uint8]]

    @property
    def layout(self) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        return self.dtype, self.shape, self.stride


Dump = dict[str, Held]


def read_dump(folder: Path) -> Dump:
    """What every rank wrote, under ``rank<r>/<name>``."""
    from safetensors.numpy import load_file

    found: Dump = {}
    for path in sorted(folder.glob("rank*.safetensors")):
        for name, data in load_file(path).items():
            kind, dtype, shape, stride = json.loads(_metadata(path)[name])
            found[f"{path.stem}/{name}"] = Held(kind, dtype, tuple(shape), tuple(stride), data)
    return found


@functools.lru_cache(maxsize=8)
def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return dict(file.metadata() or {})


@dataclass(frozen=True)
class Difference:
    """A tensor that two dumps do not hold alike: ``differing_bytes`` of ``num_bytes``, or another layout."""

    name: str
    differing_bytes: int
    num_bytes: int
    layouts: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.differing_bytes} of {self.num_bytes} bytes{self.layouts}"


def compare_dumps(a: Dump, b: Dump) -> list[Difference]:
    """Every tensor that differs in a byte, in its layout, or is in one dump alone."""
    found = []
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            only = a.get(name) or b[name]
            found.append(Difference(name, only.data.size, only.data.size, ", in one dump alone"))
        elif a[name].layout != b[name].layout:
            size = max(a[name].data.size, b[name].data.size)
            found.append(Difference(name, size, size, f", {a[name].layout} and {b[name].layout}"))
        elif num_differing := int(np.count_nonzero(a[name].data != b[name].data)):
            found.append(Difference(name, num_differing, a[name].data.size))
    return found


class Engine:
    """One vLLM engine in a process of its own. A context manager.

    Args:
        host: where it is made; decides the CPU flavour.
        model_dir: of the checkpoint.
        tp: tensor parallel size; above 1 the workers are processes of their own.
        backend: of weight transfer, or None.
        extra: further arguments of `vllm.LLM`.

    Raises:
        EngineError: it did not start; the message has the end of its log.
    """

    def __init__(
        self,
        host: EngineHost,
        model_dir: Path,
        *,
        tp: int = 1,
        backend: str | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="wsync-engine-")
        self._log = Path(self._folder.name) / "engine.log"
        self._num_dumps = 0
        # An engine that is alone in its process has nothing to leave behind, and takes a second to go.
        self._leaves_orderly = tp > 1 or backend is not None
        self.pid: int | None = None
        self.seconds = 0.0
        self._connection = host.connect()
        self._stream = self._connection.makefile("rw", encoding="utf-8")
        try:
            self.send(log=str(self._log), env={}, llm=_llm_arguments(model_dir, tp, extra or {}), backend=backend)
            self.pid = self.receive(START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def send(self, **request: Any) -> None:
        """Send a command without waiting: `receive` gives its answer."""
        try:
            self._stream.write(json.dumps(request) + "\n")
            self._stream.flush()
        except OSError as e:
            raise EngineError("Ended", f"the engine takes no command: {e}", tail(self._log)) from e

    def receive(self, timeout_s: float = COMMAND_TIMEOUT_S) -> Any:
        """The answer to the oldest command that has none. `seconds` is how long the engine took for it.

        Raises:
            EngineError: the command raised, the process is gone, or nothing came in time (then the engine is lost).
        """
        self._connection.settimeout(timeout_s)
        try:
            line = self._stream.readline()
        except TimeoutError as e:
            raise EngineError("Timeout", f"no answer within {timeout_s:g} s", tail(self._log)) from e
        except OSError as e:
            raise EngineError("Ended", f"the engine's process ended: {e}", tail(self._log)) from e
        if not line:
            raise EngineError("Ended", "the engine's process ended", tail(self._log))
        reply = json.loads(line)
        self.seconds = reply["seconds"]
        if "error" in reply:
            raise EngineError(reply["error"], reply["message"], reply["traceback"] + tail(self._log))
        return reply["value"]

    def request(self, command: str, timeout_s: float = COMMAND_TIMEOUT_S, **arguments: Any) -> Any:
        """Send a command of `engine_child.Commands` and wait for its answer."""
        self.send(command=command, **arguments)
        return self.receive(timeout_s)

    def generate(
        self, prompts: list[Any] | None = None, max_tokens: int = MAX_TOKENS, timeout_s: float = COMMAND_TIMEOUT_S
    ) -> list[dict[str, Any]]:
        """Greedy tokens with log-probabilities."""
        return self.request("generate", timeout_s, prompts=prompts or PROMPTS, max_tokens=max_tokens)

    def dump(self) -> Dump:
        """Everything that every rank computes with."""
        self._num_dumps += 1
        folder = Path(self._folder.name) / f"dump{self._num_dumps}"
        folder.mkdir()
        self.request("dump", folder=str(folder))
        return read_dump(folder)

    def pointers(self) -> list[dict[str, int]]:
        """For each rank, the address of every live tensor."""
        return self.request("pointers")

    def kernel_libraries(self) -> list[list[str]]:
        """For each rank, the file names of vLLM's kernel libraries in its process."""
        return self.request("kernel_libraries")

    def call(self, method: str, *args: Any, timeout_s: float = COMMAND_TIMEOUT_S, **kwargs: Any) -> Any:
        """Call a method of `vllm.LLM`."""
        return self.request("call", timeout_s, method=method, args=list(args), kwargs=kwargs)

    def kill(self, sig: int = signal.SIGKILL) -> None:
        """Send a signal to the engine's process."""
        if self.pid is not None:
            os.kill(self.pid, sig)

    def log(self) -> str:
        """What the engine wrote."""
        return self._log.read_text(errors="replace")

    def close(self) -> None:
        """End the engine and its workers. May be called twice."""
        if self._stream.closed:
            return
        if self._leaves_orderly:
            self._hang_up()
        self._end_group()
        self._stream.close()
        self._connection.close()
        self._folder.cleanup()

    def _hang_up(self) -> None:
        """Let the engine shut down, and wait for it."""
        self._connection.settimeout(COMMAND_TIMEOUT_S)
        try:
            self._connection.shutdown(socket.SHUT_WR)
            while self._connection.recv(4096):
                pass
        except OSError:
            pass

    def _end_group(self) -> None:
        """Whatever is left of the engine's process group."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _llm_arguments(model_dir: Path, tp: int, extra: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": str(model_dir),
        "dtype": "bfloat16",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 4,
        "seed": 0,
        "kv_cache_memory_bytes": 64 << 20,
        # Keys and values of an old version must not meet the weights of a new one; who publishes resets the cache.
        "enable_prefix_caching": False,
        "tensor_parallel_size": tp,
        "worker_extension_cls": "vllm_cpu.extension.EngineProbe",
        **extra,
    }
