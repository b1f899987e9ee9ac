"""The process that makes engine processes: it imports vLLM once, which takes longer than starting a tiny engine.

``python -m vllm_cpu.engine_child SOCKET`` listens on a Unix socket and forks for each connection; the fork starts one
engine in its own process and serves the commands of the connection, a JSON object per line. It ends with the
connection, and the listener ends with its standard input. Worker processes of a tensor parallel engine are forks too:
vLLM's own way, to spawn them, would import vLLM once more in each (a `Server` of the harness does it that way).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import select
import signal
import socket
import sys
import time
import traceback
from typing import Any


def main() -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    # One connection that waits while vLLM is imported must not be refused.
    listener.listen(16)
    import vllm.entrypoints.llm
    import vllm.v1.worker.cpu_worker  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            os._exit(0)  # there is nothing to tear down, and the interpreter would take seconds for it
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            _engine_process(connection)
        connection.close()


def _engine_process(connection: socket.socket) -> None:
    """Serve one connection, then end without the tear-down that an orderly exit of the interpreter would run."""
    code = 1
    try:
        # A process group of its own, so that whoever kills an engine kills its workers too.
        os.setpgid(0, 0)
        _fork_workers(connection)
        _serve(connection)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _fork_workers(connection: socket.socket) -> None:
    """Make vLLM fork its workers, and keep the connection from them: its end tells that the engine ended."""
    import vllm.v1.executor.multiproc_executor as executor

    executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    nothing, fd = os.open(os.devnull, os.O_RDWR), connection.fileno()
    os.register_at_fork(after_in_child=lambda: os.dup2(nothing, fd))


def _serve(connection: socket.socket) -> None:
    with connection.makefile("rw", encoding="utf-8") as stream:
        commands: Commands | None = None
        for line in stream:
            request = json.loads(line)
            began = time.perf_counter()
            try:
                if commands is None:
                    commands = Commands(**request)
                    value: Any = os.getpid()
                else:
                    value = getattr(commands, request.pop("command"))(**request)
                reply = {"value": value}
            except Exception as e:
                traceback.print_exc()
                reply = {"error": type(e).__name__, "message": str(e), "traceback": traceback.format_exc()}
            reply["seconds"] = time.perf_counter() - began
            stream.write(json.dumps(reply) + "\n")
            stream.flush()
        if commands is not None:
            commands.shutdown()


class Commands:
    """One engine and what a test asks of it."""

    def __init__(self, *, log: str, env: dict[str, str], llm: dict[str, Any], backend: str | None) -> None:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(env)
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        if backend is not None:
            llm["weight_transfer_config"] = WeightTransferConfig(backend=backend)
        self._llm = LLM(**llm)

    def generate(
        self, prompts: list[str | list[int]], max_tokens: int, temperature: float = 0.0
    ) -> list[dict[str, Any]]:
        """Tokens and log-probabilities, of the prompt's tokens as well."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=temperature, max_tokens=max_tokens, ignore_eos=True, logprobs=1, prompt_logprobs=1
        )
        inputs = [p if isinstance(p, str) else {"prompt_token_ids": p} for p in prompts]
        found = []
        for request in self._llm.generate(inputs, params, use_tqdm=False):
            output = request.outputs[0]
            found.append(
                {
                    "token_ids": list(output.token_ids),
                    "logprobs": [
                        at[token].logprob for token, at in zip(output.token_ids, output.logprobs, strict=True)
                    ],
                    "top": [_top(at) for at in output.logprobs],
                    "prompt_top": [_top(at) for at in request.prompt_logprobs if at is not None],
                }
            )
        return found

    def dump(self, folder: str) -> None:
        """`EngineProbe.wsync_test_dump` of every rank."""
        self._llm.collective_rpc("wsync_test_dump", args=(folder,))

    def pointers(self) -> list[dict[str, int]]:
        """`EngineProbe.wsync_test_pointers` of every rank."""
        return list(self._llm.collective_rpc("wsync_test_pointers"))

    def kernel_libraries(self) -> list[list[str]]:
        """`EngineProbe.wsync_test_kernel_libraries` of every rank."""
        return list(self._llm.collective_rpc("wsync_test_kernel_libraries"))

    def call(self, method: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Any method of `vllm.LLM`; what is not JSON comes back as text."""
        value = getattr(self._llm, method)(*args, **kwargs)
        try:
            json.dumps(value)
        except TypeError:
            return repr(value)
        return value

    def shutdown(self) -> None:
        """Stop the workers."""
        self._llm.llm_engine.engine_core.shutdown()


def _top(at: dict[int, Any]) -> list[Any]:
    """The most likely token and its log-probability."""
    token, best = min(at.items(), key=lambda item: (item[1].rank, item[0]))
    return [token, best.logprob]


if __name__ == "__main__":
    main()
