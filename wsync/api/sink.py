"""`Sink`: an engine rank's live memory."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import no_grad

from wsync.adapters.engines.events import LiveConstant
from wsync.adapters.engines.recorder import Recording
from wsync.adapters.gpus import on_its_gpu
from wsync.api.common import check_store, close_at_exit, rank_and_world, share_of_cores
from wsync.api.engine import EngineSide, Layouts, Recipes, ScaleGroups, Transforms
from wsync.api.live import LoadWeights, live_tensors
from wsync.errors import ConfigError, DeadlineError, StateError, WsyncError
from wsync.session.auth import derive_keys, load_secret
from wsync.session.channel import PEER_TIMEOUT_S, Channel
from wsync.session.clock import deadline_after, local_info
from wsync.session.laststep import LastSteps
from wsync.session.sink import SinkSession
from wsync.session.vote import Ticket
from wsync.spec.manifest import SinkRankManifest, TensorSpec
from wsync.transport import open_sink

if TYPE_CHECKING:
    from wsync.plan.program import StorageMemory

_BACKGROUND_S = 5.0
_BACKGROUND_PAUSE_S = 0.2
_WATCH_S = 0.02
"""How often a ticket that waits for its commit is looked after: the trainer may give its version up."""
_CLOSE_S = 5.0


class Sink:
    """One engine rank's live memory. The call returns when the trainer knows what this rank needs.

    Args:
        engine_model: a module, a dict of live tensors, or an object with ``live_tensors()``. Such an object may have
            ``record(name_table, recipes, allow_missing)`` too: then it says itself what its loader does, as an object
            with ``recording`` (`Recording`) and ``last_steps`` (`LastSteps`, how it repacks what it loads).
        load_weights: the engine's own loader, called once on stand-ins that carry no data; None copies by name. A
            loader that moves weights through memory of its own runs a second time, on coded values, to compare; every
            live byte is restored, and the engine must not generate meanwhile. None for an engine with ``record``.
        store, key_file: as for `Source`.
        replica: name of the replica that this rank belongs to.
        rank, world_size: within the replica.
        mode: ``"staged"``.
        recipes: recipe of each tensor: a dict by checkpoint name, or a function of `TensorSpec`; None asks the
            engine's ``recipe_for`` where it has one, and otherwise the trainer's ``recipe``, or copies.
        scale_groups: checkpoint names of tensors that share one scale of the whole tensor (``fp8_tensor``, ``nvfp4``),
            such as those of q, k and v: their amax is taken over all of them. None groups the tensors whose weights the
            engine fuses into one matrix.
        transforms: what the commit makes of a tensor's parts, by checkpoint name, or a function of `TensorSpec`:
            ``"dequantise"`` for an engine that holds (and loads) floats where ``recipes`` has a quantised wire,
            (of the trainer's own dtype; f16 cannot hold what its largest values round up to);
            ``"requantise_e8m0"`` for one that requantises 128 x 128 blocks to power-of-two scales when it loads.
        layouts: for live tensors that the loader fills in plain form and the engine's kernels read in another: by name
            a `wsync.plan.layouts.Layout` and the memory that the commit writes. The plain tensor is scratch memory.
        allow_missing: live tensors that the loader does not fill on purpose.
        num_threads: of the verify and install kernels; None divides this process's cores among the replica's ranks.
        join_deadline_s: seconds to wait for the trainer.
        peer_timeout_s: silence after which the trainer counts as lost.

    Raises:
        ConfigError: bad arguments; `RecordError` where the loader does not copy; `UnknownTensorError`,
            `MissingTensorError`, `ShapeMismatchError`, `DtypeMismatchError` where engine and trainer hold different
            models.
        ConnectError: no store there, or the key is refused.
        DeadlineError: the trainer did not describe itself in time.

    Threads: `prepare` may run on any one thread (`start` makes one); `commit` belongs on the engine's thread, between
    steps, on every rank of the replica at the same step.
    """

    def __init__(
        self,
        engine_model: Any,
        load_weights: LoadWeights | None = None,
        *,
        store: str,
        key_file: str | os.PathLike[str] | None = None,
        replica: str = "engine-0",
        rank: int = 0,
        world_size: int = 1,
        mode: str = "staged",
        recipes: Recipes | None = None,
        scale_groups: ScaleGroups | None = None,
        transforms: Transforms | None = None,
        layouts: Layouts | None = None,
        allow_missing: Iterable[str] = (),
        num_threads: int | None = None,
        join_deadline_s: float = 60.0,
        peer_timeout_s: float = PEER_TIMEOUT_S,
    ) -> None:
        check_store(store)
        if mode != "staged":
            raise ConfigError(f"mode must be 'staged', got {mode!r}")
        if not replica or "/" in replica:
            raise ConfigError(f"replica must be a name without '/', got {replica!r}")
        self.replica = replica
        self.rank, self.world_size = rank_and_world(rank, world_size)
        self._engine = EngineSide(engine_model, load_weights, recipes, scale_groups, transforms, layouts, allow_missing)
        self._num_threads = share_of_cores(num_threads, self.world_size)
        # Every transport stages what arrives in host memory.
        self._info = on_its_gpu(local_info(), in_host=True)
        self._recording: Recording | None = None
        self._constants: dict[int, list[LiveConstant]] = {}
        self._ready: Ticket | None = None
        self._background_error: WsyncError | None = None
        self._last_error: WsyncError | None = None
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        keys = derive_keys(load_secret(key_file))
        channel = Channel(store, keys, f"{replica}/{self.rank}", peer_timeout_s=peer_timeout_s)
        try:
            self._session = SinkSession(
                channel,
                self._describe,
                open_sink,
                replica=replica,
                rank=self.rank,
                world_size=self.world_size,
                info=self._info,
                num_threads=self._num_threads,
                join_deadline_s=join_deadline_s,
                write_constants=self._write_constants,
            )
        except BaseException:
            channel.close()
            raise
        close_at_exit(self)

    def _describe(self, tensors: tuple[TensorSpec, ...]) -> tuple[SinkRankManifest, list[StorageMemory], LastSteps]:
        recording, steps = self._engine.record(tensors, self._num_threads)
        self._recording = recording
        self._constants = {}
        for constant in recording.constants:
            self._constants.setdefault(constant.storage_idx, []).append(constant)
        manifest = recording.manifest(self.replica, self.rank, self.world_size, self._info)
        return self._engine.with_groups(manifest, recording), recording.memory, steps

    @no_grad()
    def _write_constants(self, storage_idxs: frozenset[int] | None) -> None:
        """What the loader itself sets (zeros in padding), for memory that no checkpoint was loaded into."""
        if self._recording is None:
            return
        for storage_idx in self._constants if storage_idxs is None else self._constants.keys() & storage_idxs:
            view = self._recording.storage_view(storage_idx)
            for constant in self._constants[storage_idx]:
                constant.write(view)

    # ---- what is served

    @property
    def version(self) -> int | None:
        """The version that live memory holds; None before the first commit and while poisoned."""
        return self._session.version

    @property
    def state(self) -> str:
        """``"serving"``, ``"prepared"`` or ``"poisoned"``."""
        return self._session.state

    @property
    def recording(self) -> Recording | None:
        """What the loader was seen to do, with its coverage."""
        return self._recording

    @property
    def last_error(self) -> WsyncError | None:
        """Why the background thread could not stage a version, the last time that it could not."""
        return self._last_error

    @property
    def last_pause_s(self) -> float:
        """Seconds that the last `commit` took on this rank: decision, install, last steps, confirmation."""
        return self._session.last_pause_s

    @property
    def last_stamps(self) -> dict[str, float]:
        """Seconds that each phase of the version committed last took on this rank.

        ``receive`` (with ``verify`` in it) and ``repack`` while the old version served; ``decide``, ``install`` and
        ``finish`` in `commit`. Empty before the first commit.
        """
        return dict(self._session.last_stamps)

    @property
    def bytes_installed(self) -> int:
        """Wire bytes that all commits of this Sink put in place together."""
        return self._session.bytes_installed

    # ---- prepare and commit

    def prepare(self, deadline_s: float = 60.0) -> Ticket:
        """Wait for the next version, stage it, verify its digests, repack. The old version keeps serving.

        Raises:
            DeadlineError: no version came, or it did not arrive in time. The old version serves.
            DigestError: staged bytes differ from what was published. The old version serves.
            PeerLostError: the trainer is gone. The old version serves.
            CommitError: the engine's own repacking failed. The old version serves.
            WsyncError: what ended the publish at the trainer, such as `NonFiniteError`. The old version serves.
            StateError: a version is prepared already, or `start` does this in the background.
        """
        self._check_open()
        if self._thread is not None:
            raise StateError("prepare() after start(): take tickets with poll()")
        return self._session.prepare(deadline_s)

    def commit(self, ticket: Ticket) -> None:
        """Make live memory the ticket's version, in place, on the calling thread.

        Returns when every rank of the replica has installed: it may serve.

        Raises:
            CommitError: ``replicas`` says whether the old version serves or the replica is poisoned. Also where the
                engine's own last steps fail: poisoned.
            DigestError: what was installed is not what was published: poisoned.
            StateError: the ticket is not the one that is prepared, or is committed already.
        """
        try:
            if self._session.holds(ticket):
                self._check_memory(ticket)
            self._session.commit(ticket)
        finally:
            with self._wake:
                if self._ready is not None and not self._session.holds(self._ready):
                    self._ready = None
                    self._wake.notify_all()

    def _check_memory(self, ticket: Ticket) -> None:
        """The engine's tensors must still be those that were recorded: a replaced one would never be written again."""
        try:
            if self._recording is not None:
                self._recording.check_addresses(live_tensors(self._engine.engine))
        except StateError as e:
            self._session.reject(ticket, e)
            raise

    # ---- in the background

    def start(self) -> None:
        """Prepare versions on a thread of this Sink; the engine takes tickets with `poll` or `wait`.

        A ticket that the trainer gives up before it is committed is withdrawn, and the thread goes on to the next one.
        """
        self._check_open()
        if self._thread is None:
            self._thread = threading.Thread(target=self._prepare_forever, name=f"wsync-{self.replica}", daemon=True)
            self._thread.start()

    def poll(self) -> Ticket | None:
        """The ticket that is ready to commit, or None. Never blocks.

        Errors of single versions (a publish that failed, a trainer that is gone) are in `last_error`; the thread goes
        on.

        Raises:
            WsyncError: the error that ended the background thread.
        """
        self._check_open()
        with self._wake:
            if self._background_error is not None:
                raise self._background_error
            return self._ready

    @property
    def prepared(self) -> bool:
        """Whether a ticket is ready to commit."""
        return self._session.is_prepared if self._thread is None else self._ready is not None

    def wait(self, version: int, deadline_s: float = 10.0) -> Ticket:
        """Block until the background thread has the ticket of ``version``.

        For an engine that is told to commit: the word may come a moment before this rank's own thread is through.

        Raises:
            DeadlineError: it is not ready in time; the message names the version that is.
            StateError: the version is committed already, or `start` was not called.
            WsyncError: why this rank has no such version: it could not be staged, or the trainer gave it up; or what
                ended the background thread.
        """
        if self._thread is None:
            raise StateError(f"wait(version={version}) before start()")
        deadline = deadline_after(deadline_s)
        with self._wake:
            while True:
                self._check_open()
                if self._background_error is not None:
                    raise self._background_error
                ready, failed = self._ready, self._session.failed
                if ready is not None and ready.version == version:
                    return ready
                if self._session.version == version:
                    raise StateError(f"version {version} is committed already by {self.replica}/{self.rank}")
                if failed is not None and failed[0] == version:
                    raise failed[1]
                if time.monotonic() >= deadline:
                    raise self._not_ready(version, deadline_s)
                self._wake.wait(_WATCH_S)

    def _not_ready(self, version: int, deadline_s: float) -> DeadlineError:
        there = f"version {self._ready.version} is" if self._ready is not None else "no version is"
        last = f"; the last error was: {self._last_error.message}" if self._last_error is not None else ""
        return DeadlineError(
            f"{self.replica}/{self.rank} waited {deadline_s:g} s for version {version}, but {there} prepared{last}"
        )

    def _prepare_forever(self) -> None:
        while not self._stopping:
            try:
                ticket = self._session.prepare(_BACKGROUND_S)
            except DeadlineError:
                continue
            except WsyncError as e:
                if self._session.is_over:
                    return self._end_background(e)
                self._last_error = e
                time.sleep(_BACKGROUND_PAUSE_S)  # a fault that comes at once must not keep a core busy
                continue
            except BaseException as e:
                return self._end_background(WsyncError(f"prepare failed: {type(e).__name__}: {e}"))
            with self._wake:
                self._ready = ticket
                self._wake.notify_all()
            self._look_after(ticket)

    def _look_after(self, ticket: Ticket) -> None:
        """Until the engine took the ticket, or the trainer gave it up."""
        while True:
            with self._wake:
                if self._wake.wait_for(lambda: self._ready is None or self._stopping, timeout=_WATCH_S):
                    return
            error = self._session.withdraw(ticket)
            if error is not None:
                with self._wake:
                    self._ready, self._last_error = None, error
                    self._wake.notify_all()
                return

    def _check_open(self) -> None:
        if self._stopping:
            raise StateError(f"{self.replica}/{self.rank} is closed")

    def close(self) -> None:
        """Leave. Live memory stays as it is. May be called twice."""
        self._stopping = True
        with self._wake:
            self._wake.notify_all()
        self._session.leave()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=_CLOSE_S)
            if self._thread.is_alive():
                return  # it still reads staging, which goes with the process
        self._session.close()

    def _end_background(self, error: WsyncError) -> None:
        with self._wake:
            if not self._stopping:
                self._background_error = error

    def __enter__(self) -> Sink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
