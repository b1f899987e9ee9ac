"""The three ways to give a running vLLM server the weights that the trainer holds."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch

from wsync import Source, new_key_file
from wsync.bench.options import WSYNC
from wsync.bench.vllm_model import ServedModel
from wsync.bench.vllm_options import BROADCAST, BUCKET_BYTES, RELOAD, SERVER, VLLMOptions
from wsync.bench.vllm_peer import TRAINER, broadcast, join_group, make_buckets, tensor_in
from wsync.bench.vllm_server import VLLMServer
from wsync.errors import CommitError, TransportError
from wsync.integrations.vllm import Fleet, HTTPServer
from wsync.session.channel import PEER_TIMEOUT_S
from wsync.testing.processes import free_port


class Taken(msgspec.Struct, frozen=True):
    """What one way took for one version; times are of `time.monotonic`.

    Attributes:
        begin_s: the trainer begins.
        end_s: the server has resumed with the new weights.
        prepare_s: seconds, of those, before the server is asked for anything: a checkpoint is written.
        stall_s: seconds in which the trainer's weights may not change.
        server_pause_s: from asking the server to pause until it has resumed.
        replica_pause_s: seconds on the engine's thread: decide, install and finish of wsync; None for the others.
        phases_s: further seconds by name.
        engine_bytes: that the engine took; None where nobody counts.
    """

    begin_s: float
    end_s: float
    prepare_s: float
    stall_s: float
    server_pause_s: float
    replica_pause_s: float | None = None
    phases_s: dict[str, float] = msgspec.field(default_factory=dict)
    engine_bytes: int | None = None


class Way(Protocol):
    """One row of the table."""

    def run(self, version: int) -> Taken:
        """Take the trainer's weights to the server."""

    def tidy(self) -> None:
        """After it, outside of what is timed."""


class WsyncWay:
    """`wsync.Source` in this process, and a `Fleet` of one server."""

    def __init__(self, fleet: Fleet, deadline_s: float) -> None:
        self._fleet = fleet
        self._deadline_s = deadline_s

    def run(self, version: int) -> Taken:
        """Publish; the fleet pauses the server when all is staged.

        Raises:
            CommitError: the server did not take it.
        """
        begin = time.monotonic()
        report = self._fleet.publish(version, deadline_s=self._deadline_s).wait_committed()
        end = time.monotonic()
        server = report.servers[SERVER]
        if SERVER not in report.serving:
            raise CommitError(f"server {SERVER}, version {version}: {server.state}: {server.error}")
        seconds = report.publish.seconds
        return Taken(
            begin_s=begin,
            end_s=end,
            prepare_s=0.0,
            stall_s=seconds["stall"],
            server_pause_s=server.pause_s,
            replica_pause_s=seconds["pause"],
            phases_s=dict(seconds),
            engine_bytes=report.publish.sink_bytes,
        )

    def tidy(self) -> None:
        """Nothing to do."""


class ReloadWay:
    """A checkpoint in memory, and vLLM's own ``reload_weights`` in a paused server."""

    def __init__(self, server: VLLMServer, control: HTTPServer, model: ServedModel, folder: Path) -> None:
        self._server = server
        self._control = control
        self._model = model
        self._folder = folder

    def run(self, version: int) -> Taken:
        """Write, pause, reload, resume."""
        begin = time.monotonic()
        self._model.write_weights(self._folder)
        written = time.monotonic()
        with _paused(self._control):
            self._server.on_worker("reload_weights", weights_path=str(self._folder))
            reloaded = time.monotonic()
        end = time.monotonic()
        return Taken(
            begin, end, written - begin, written - begin, end - written, phases_s={"reload": reloaded - written}
        )

    def tidy(self) -> None:
        """Remove the checkpoint."""
        self._model.remove_weights(self._folder)


class BroadcastWay:
    """Packed buckets over gloo into a paused server, which loads each with vLLM's layerwise reload."""

    def __init__(self, server: VLLMServer, control: HTTPServer, model: ServedModel, deadline_s: float) -> None:
        self._server = server
        self._control = control
        self._parameters = model.parameters
        self._buckets = make_buckets(model.parameters, BUCKET_BYTES)
        size = max(bucket.num_bytes for bucket in self._buckets)
        self._memory = [torch.zeros(size, dtype=torch.uint8) for _ in range(2)]
        port = free_port()
        buckets = msgspec.json.encode(self._buckets).decode()
        joining = _Call(lambda: server.on_worker("wsync_bench_join", port=port, buckets=buckets, deadline_s=deadline_s))
        try:
            self._group = join_group(port, TRAINER, deadline_s)
        except RuntimeError as e:
            joining.check()
            raise TransportError(f"the worker did not join the broadcast: {e}") from e
        joining.result()

    def run(self, version: int) -> Taken:
        """Pause, send all buckets, resume when the last one is loaded."""
        begin = time.monotonic()
        with _paused(self._control):
            receiving = _Call(lambda: self._server.on_worker("wsync_bench_receive"))
            try:
                self._send()
            except RuntimeError as e:
                receiving.check()
                raise TransportError(f"the broadcast of version {version} failed: {e}") from e
            sent = time.monotonic()
            receiving.result()
        end = time.monotonic()
        return Taken(begin, end, 0.0, sent - begin, end - begin, phases_s={"send": sent - begin})

    def _send(self) -> None:
        """One bucket is packed while the one before travels."""
        travelling: list[Any] = [None, None]
        for i, bucket in enumerate(self._buckets):
            if travelling[i % 2] is not None:
                travelling[i % 2].wait()
            memory = self._memory[i % 2][: bucket.num_bytes]
            for packed in bucket.tensors:
                tensor_in(memory, packed).copy_(self._parameters[packed.name])
            travelling[i % 2] = broadcast(self._group, memory)
        for work in travelling:
            if work is not None:
                work.wait()

    def tidy(self) -> None:
        """Nothing to do."""


@contextlib.contextmanager
def open_wsync(server: VLLMServer, model: ServedModel, options: VLLMOptions, run_dir: Path) -> Iterator[dict[str, Way]]:
    """The row of wsync, on a server of its own. It leaves the server when the block ends."""
    key_file = run_dir / f"{server.port}.key"
    new_key_file(key_file)
    deadline_s = options.deadline_s
    source = Source(
        model.model,
        store="tcp://127.0.0.1:0",
        key_file=key_file,
        rank=0,
        world_size=1,
        transport=options.transport,
        join_deadline_s=deadline_s,
        peer_timeout_s=max(PEER_TIMEOUT_S, deadline_s / 4),  # clients and a server crowd out this process
    )
    control = HTTPServer(server.url, timeout_s=deadline_s)
    with source, Fleet(source, [control], names=[SERVER], key_file=key_file, deadline_s=deadline_s) as fleet:
        yield {WSYNC: WsyncWay(fleet, deadline_s)}
    control.close()


@contextlib.contextmanager
def open_baselines(
    server: VLLMServer, model: ServedModel, options: VLLMOptions, folder: Path
) -> Iterator[dict[str, Way]]:
    """The rows of the baselines, on one server; ``folder`` is for the checkpoint of the reload."""
    control = HTTPServer(server.url, timeout_s=options.deadline_s)
    yield {
        RELOAD: ReloadWay(server, control, model, folder),
        BROADCAST: BroadcastWay(server, control, model, options.deadline_s),
    }
    control.close()


@contextlib.contextmanager
def _paused(control: HTTPServer) -> Iterator[None]:
    """Requests stay, as they do for wsync; nobody steps."""
    control.pause("keep", clear_cache=True)
    yield
    control.resume()


class _Call:
    """A call in a thread of its own."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="wsync-bench-call", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._function()
        except Exception as e:
            self._error = e

    def check(self) -> None:
        """Raise what it raised already: it explains more than what the caller met."""
        if self._error is not None:
            raise self._error

    def result(self) -> None:
        """Wait for it."""
        self._thread.join()
        self.check()
