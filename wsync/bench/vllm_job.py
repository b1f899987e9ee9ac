"""The steps of ``wsync bench vllm``: servers, warm-ups, repeats, verdicts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from wsync.bench.options import WSYNC
from wsync.bench.vllm_check import Observation, check_told_apart, difference, observe
from wsync.bench.vllm_clients import Clients
from wsync.bench.vllm_model import ServedModel
from wsync.bench.vllm_options import IN_PLACE, ROWS, VLLMOptions
from wsync.bench.vllm_result import Measured, VLLMRepeat
from wsync.bench.vllm_rows import Taken, Way, open_baselines, open_wsync
from wsync.bench.vllm_server import VLLMServer
from wsync.errors import StateError, WsyncError
from wsync.integrations.vllm import plugin

Progress = Callable[[str, int, int], None]
"""Called with what runs, steps done and steps in all."""

_WARM_TOKENS = 8
"""That every client gets before, and again during, the time that counts as before the update."""
_BEFORE_S = 1.0
_EXTRA_REQUESTS = 4
_WARM_UP = -1


class _Site:
    """A server, and which content it serves."""

    def __init__(self, server: VLLMServer, content: int) -> None:
        self.server = server
        self.content = content


class Job:
    """The trainer's model and the folders of a run.

    Attributes:
        model: what is published.
    """

    def __init__(self, options: VLLMOptions, tmpfs_dir: Path, run_dir: Path, progress: Progress) -> None:
        self._options = options
        self._run_dir = run_dir
        self._progress = progress
        self._done = 0
        self._version = 0
        progress("making the model", 0, self._total)
        torch.set_num_threads(1)  # two servers have the cores: threads that wait for each other would wait for both
        self.model = ServedModel(options.model)
        self._folders = [tmpfs_dir / "content-0", tmpfs_dir / "content-1"]
        self._reload_folder = tmpfs_dir / "reload"
        for folder in (*self._folders, self._reload_folder):
            self.model.prepare_folder(folder, None if folder is self._folders[0] else self._folders[0])

    def measure(self, mode: str) -> Measured:
        """Start the servers, run every row, end them."""
        self._say(f"{mode}: starting the servers")
        for content, folder in enumerate(self._folders):
            self.model.set_content(content)
            self.model.write_weights(folder)
        with contextlib.ExitStack() as stack:
            sites = [
                _Site(stack.enter_context(self._server(mode, folder)), content)
                for content, folder in enumerate(self._folders)
            ]
            for site in sites:
                site.server.await_ready()
            for folder in self._folders:
                self.model.remove_weights(folder)  # they are as large as what they were loaded into
            stack.enter_context(_blame(sites))
            references = [self._observe(site) for site in sites]
            check_told_apart(references)
            linear, packed = _describe(sites[0].server, mode)
            began = time.monotonic()
            ways = self._join(sites, stack)
            join_s = time.monotonic() - began
            first, repeats = self._repeat_all(mode, ways, references)
            return Measured(
                mode=mode,
                linear_layers=linear,
                packed_layers=packed,
                start_s=sites[0].server.start_s,
                join_s=join_s,
                engine_bytes=first[WSYNC][0].engine_bytes or self.model.num_bytes,
                warm_up={name: done.difference for name, (_, done) in first.items()},
                repeats=repeats,
            )

    def _server(self, mode: str, folder: Path) -> VLLMServer:
        requests = self._options.num_clients + _EXTRA_REQUESTS
        return VLLMServer(mode, folder, requests, self._run_dir, self._options.deadline_s)

    def _join(self, sites: list[_Site], stack: contextlib.ExitStack) -> dict[str, tuple[_Site, Way]]:
        """All rows. wsync has a server of its own: vLLM's reload makes new packed matrices, which wsync refuses to take
        for those that it recorded."""
        ours, theirs = sites
        wsync = stack.enter_context(open_wsync(ours.server, self.model, self._options, self._run_dir))
        others = stack.enter_context(open_baselines(theirs.server, self.model, self._options, self._reload_folder))
        return {name: (ours, wsync[name]) if name in wsync else (theirs, others[name]) for name in ROWS}

    def _repeat_all(
        self, mode: str, ways: Mapping[str, tuple[_Site, Way]], references: list[Observation]
    ) -> tuple[dict[str, tuple[Taken, VLLMRepeat]], dict[str, list[VLLMRepeat]]]:
        """One warm-up of each row, then the timed repeats, the rows taking turns."""
        first: dict[str, tuple[Taken, VLLMRepeat]] = {}
        repeats: dict[str, list[VLLMRepeat]] = {name: [] for name in ROWS}
        for repeat in range(_WARM_UP, self._options.repeats):
            # Contents take turns on a server: in one order throughout a row would see the same one every time.
            for name in list(ROWS) if repeat % 2 == 0 else reversed(ROWS):
                site, way = ways[name]
                self._say(f"{mode}, {ROWS[name]}: " + ("warm-up" if repeat == _WARM_UP else f"repeat {repeat}"))
                taken, done = self._repeat(site, name, way, repeat, references)
                if repeat == _WARM_UP:
                    first[name] = (taken, done)
                else:
                    repeats[name].append(done)
        return first, repeats

    def _repeat(
        self, site: _Site, name: str, way: Way, repeat: int, references: list[Observation]
    ) -> tuple[Taken, VLLMRepeat]:
        """Take the other content to a server while clients generate; then the verdict."""
        options, server = self._options, site.server
        self._version += 1
        site.content = 1 - site.content
        self.model.set_content(site.content)
        fault = options.fault if (name, repeat) == (WSYNC, 0) else ""
        with Clients(server.port, options.num_clients, self.model.vocabulary, options.deadline_s) as clients:
            clients.await_tokens(_WARM_TOKENS)
            before = time.monotonic()
            clients.await_tokens(_WARM_TOKENS)
            time.sleep(max(0.0, before + _BEFORE_S - time.monotonic()))
            if fault == "kill":
                server.kill()
            taken = way.run(self._version)
            clients.await_tokens(1)
            clients.check()
        way.tidy()
        if fault == "corrupt":
            server.on_worker("wsync_bench_corrupt")
        return taken, VLLMRepeat(
            repeat=repeat,
            version=self._version,
            seconds=taken.end_s - taken.begin_s - taken.prepare_s,
            prepare_s=taken.prepare_s,
            stall_s=taken.stall_s,
            server_pause_s=taken.server_pause_s,
            replica_pause_s=taken.replica_pause_s,
            longest_wait_s=clients.longest_wait(taken.begin_s, taken.end_s),
            tokens_before=clients.rate(before, taken.begin_s),
            tokens_during=clients.rate(taken.begin_s, taken.end_s),
            phases_s=taken.phases_s,
            difference=self._difference(site, name, references),
        )

    def _difference(self, site: _Site, name: str, references: list[Observation]) -> str:
        """What is wrong with the version that a server serves now, or an empty string."""
        label = site.server.call("/weight_info")["weight_version"]
        if name == WSYNC and label != str(self._version):
            return f"the server says that it serves version {label!r}, but {str(self._version)!r} was published"
        return difference(self._observe(site), references[site.content])

    def _observe(self, site: _Site) -> Observation:
        return observe(site.server, self.model.vocabulary, self._options.deadline_s)

    @property
    def _total(self) -> int:
        return len(self._options.modes) * (1 + len(ROWS) * (self._options.repeats + 1))

    def _say(self, what: str) -> None:
        self._progress(what, self._done, self._total)
        self._done += 1


def _describe(server: VLLMServer, mode: str) -> tuple[int, int]:
    """Linear layers of the engine, and those that it packs.

    Raises:
        StateError: weights are packed although the mode is to keep them in place.
    """
    held = server.on_worker("wsync_bench_describe")
    if mode == IN_PLACE and held["packed_layers"]:
        raise StateError(
            f"{held['packed_layers']} of {held['linear_layers']} linear layers are packed although the server was "
            f"started with {plugin.IN_PLACE}=1"
        )
    return held["linear_layers"], held["packed_layers"]


@contextlib.contextmanager
def _blame(sites: list[_Site]) -> Iterator[None]:
    """Where a server has died, that is the error, whatever a call to it met."""
    try:
        yield
    except WsyncError:
        for site in sites:
            site.server.check_alive()
        raise
