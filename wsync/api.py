"""What users hold: `Source` on every trainer rank, `Sink` on every engine rank."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from wsync.adapters.engines.recorder import Recording, record_loader
from wsync.adapters.trainers import describe
from wsync.errors import ConfigError, MissingTensorError, ShapeMismatchError, StateError, WsyncError
from wsync.plan.types import PlanOptions
from wsync.session.auth import derive_keys, load_secret, new_key_file
from wsync.session.channel import PEER_TIMEOUT_S, Channel
from wsync.session.clock import local_info
from wsync.session.coordinator import Coordinator
from wsync.session.report import PublishReport
from wsync.session.sink import SinkSession, Ticket, is_retryable
from wsync.session.source import Publication, SourceSession
from wsync.spec.cluster import Cluster
from wsync.spec.manifest import SinkRankManifest, TensorSpec
from wsync.transport import choose_transport, open_sink, open_source

if TYPE_CHECKING:
    import torch

    from wsync.plan.program import StorageMemory

__all__ = ["Publication", "PublishReport", "Sink", "Source", "Ticket", "new_key_file"]

LoadWeights = Callable[[Iterable[tuple[str, "torch.Tensor"]]], Any]
Recipes = Mapping[str, str] | Callable[[TensorSpec], str]


def _threads(num_threads: int | None, ranks_here: int) -> int:
    """Cores of this process's affinity, shared by the ranks of the side that run here."""
    if num_threads is None:
        return max(1, len(os.sched_getaffinity(0)) // max(1, ranks_here))
    if num_threads < 1:
        raise ConfigError(f"num_threads must be at least 1, got {num_threads}")
    return num_threads


def _rank_and_world(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ConfigError(f"give both rank and world_size or neither, got rank={rank} and world_size={world_size}")
    if rank is None or world_size is None:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return 0, 1
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank must be in [0, world_size), got rank={rank} and world_size={world_size}")
    return rank, world_size


class Source:
    """One trainer rank's weights. Construct it on every trainer rank; the call returns when all have.

    Args:
        model_or_tensors: an ``nn.Module`` (plain or with DTensor parameters of any placement), or a dict from
            checkpoint name to tensor or array (torch, NumPy, anything with ``__dlpack__``), on the CPU. Plain tensors
            count as replicated. Tied weights are sent once. The memory is read in place at every publish.
        store: ``tcp://host:port``; trainer rank 0 binds it, everybody else connects. Port 0 (one trainer rank only)
            picks a free one: read `store`.
        key_file: file with the job's secret (`new_key_file`); None takes it from ``WSYNC_KEY``.
        rank, world_size: of the trainer; None takes them from torch.distributed, or 0 and 1.
        transport: ``"auto"`` (shared memory where all ranks share one, else gloo),
            ``"shm"``, ``"gloo"`` or ``"loopback"``.
        name_map: from the model's name of a tensor to its checkpoint name.
        cluster: rates of the machines, for the plan; None assumes equal nodes.
        options: of the planner.
        num_threads: of the pack kernels; None divides this process's cores among the trainer ranks of this host.
        join_deadline_s: seconds to wait for all trainer ranks.
        peer_timeout_s: silence after which a rank counts as lost.

    Raises:
        ConfigError: bad arguments; `ManifestError` where ranks describe different models. Raised on every rank.
        ConnectError: the store cannot be bound or reached, or the key is refused.
        DeadlineError: not all trainer ranks came in time.

    Threads: calls are for one thread. Packing runs on threads of its own without the GIL.
    """

    def __init__(
        self,
        model_or_tensors: torch.nn.Module | Mapping[str, Any],
        *,
        store: str,
        key_file: str | os.PathLike[str] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        transport: str = "auto",
        name_map: Callable[[str], str] | None = None,
        cluster: Cluster | None = None,
        options: PlanOptions | None = None,
        num_threads: int | None = None,
        join_deadline_s: float = 60.0,
        peer_timeout_s: float = PEER_TIMEOUT_S,
    ) -> None:
        self.rank, self.world_size = _rank_and_world(rank, world_size)
        keys = derive_keys(load_secret(key_file))
        if store.endswith(":0") and self.world_size > 1:
            raise ConfigError(f"store {store!r} has port 0, which works for 1 trainer rank only, not {self.world_size}")
        info = local_info()
        self._description = describe(
            model_or_tensors, rank=self.rank, world_size=self.world_size, info=info, name_map=name_map
        )
        self._last_version: int | None = None
        self._coordinator: Coordinator | None = None
        self._channel: Channel | None = None
        self._session: SourceSession | None = None
        self._closed = False
        try:
            if self.rank == 0:
                self._coordinator = Coordinator(
                    store,
                    keys,
                    self.world_size,
                    transport=transport,
                    choose_transport=choose_transport,
                    cluster=cluster,
                    options=options,
                    peer_timeout_s=peer_timeout_s,
                )
                store = self._coordinator.store
            self.store = store
            self._channel = Channel(store, keys, f"trainer/{self.rank}", peer_timeout_s=peer_timeout_s)
            self._session = SourceSession(
                self._channel,
                self._description.manifest,
                self._description.memory,
                open_source,
                transport=transport,
                num_threads=_threads(num_threads, int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))),
                join_deadline_s=join_deadline_s,
            )
        except BaseException:
            self.close()
            raise

    def publish(self, version: int, *, min_replicas: int | None = None, deadline_s: float = 60.0) -> Publication:
        """Publish the current weights as ``version``. Call it on every trainer rank with the same arguments.

        Returns at once. The weights must not change before `Publication.wait_released`. A publish that is not yet
        committed everywhere is superseded: replicas that had not decided keep the version that they serve.

        Args:
            version: larger than the last one of this Source.
            min_replicas: replicas that must commit, and that are waited for before anything moves; None means 1.
            deadline_s: seconds for the whole publish, on every rank.

        Raises:
            StateError: the Source is closed, the version does not increase, the previous publish is not released, or
                a tensor's memory moved since the Source was made.
            ConfigError: bad arguments.
        """
        session = self._session
        if session is None:
            raise StateError(f"publish(version={version}) on a closed Source")
        if not 0 <= version < 2**63:
            raise ConfigError(f"version must be in [0, 2**63), got {version}")
        if self._last_version is not None and version <= self._last_version:
            raise StateError(
                f"version must increase: got {version}, the last was {self._last_version}",
                hint="a new Source begins a new incarnation and may start anywhere",
            )
        if min_replicas is not None and min_replicas < 1:
            raise ConfigError(f"min_replicas must be at least 1, got {min_replicas}")
        self._description.check_addresses()
        publication = session.publish(version, min_replicas or 1, deadline_s)
        self._last_version = version
        return publication

    def close(self) -> None:
        """Leave and free staging. Engines keep what they serve. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._session is not None:
            self._session.close()
            self._session = None
        elif self._channel is not None:
            self._channel.close()
        if self._coordinator is not None:
            self._coordinator.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def live_tensors(engine_model: Any) -> dict[str, torch.Tensor]:
    """The live parameters and buffers of an engine: its own ``live_tensors()``, a module's, or a dict as it is.

    Raises:
        ConfigError: it is none of these.
    """
    if hasattr(engine_model, "live_tensors"):
        return dict(engine_model.live_tensors())
    if isinstance(engine_model, Mapping):
        return dict(engine_model)
    if hasattr(engine_model, "named_parameters") and hasattr(engine_model, "named_buffers"):
        tensors = dict(engine_model.named_parameters())
        keys = set(engine_model.state_dict(keep_vars=True))
        tensors.update((name, b) for name, b in engine_model.named_buffers() if name in keys)
        return tensors
    raise ConfigError(
        f"an engine is a module, a dict of tensors or has live_tensors(); got {type(engine_model).__name__}"
    )


def load_by_name(tensors: Mapping[str, torch.Tensor]) -> LoadWeights:
    """The loader of an engine whose tensors have checkpoint names and whole shapes: one copy each."""

    def load(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, weight in weights:
            target = tensors.get(name)
            if target is None:
                continue
            if target.shape != weight.shape:
                raise ShapeMismatchError(
                    f"tensor {name!r} has shape {tuple(weight.shape)} at the trainer "
                    f"and {tuple(target.shape)} in the engine"
                )
            target.data.copy_(weight)

    return load


class Sink:
    """One engine rank's live memory. The call returns when the trainer knows what this rank needs.

    Args:
        engine_model: a module, a dict of live tensors, or an object with ``live_tensors()``.
        load_weights: the engine's own loader, called once on stand-ins that carry no data; None copies by name.
        store, key_file: as for `Source`.
        replica: name of the replica that this rank belongs to.
        rank, world_size: within the replica.
        mode: ``"staged"``.
        recipes: recipe of each tensor: a dict by checkpoint name, or a function of `TensorSpec`; None asks the
            engine's ``recipe_for`` where it has one, and otherwise copies.
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
        allow_missing: Iterable[str] = (),
        num_threads: int | None = None,
        join_deadline_s: float = 60.0,
        peer_timeout_s: float = PEER_TIMEOUT_S,
    ) -> None:
        if mode != "staged":
            raise ConfigError(f"mode must be 'staged', got {mode!r}")
        if not replica or "/" in replica:
            raise ConfigError(f"replica must be a name without '/', got {replica!r}")
        self.replica = replica
        self.rank, self.world_size = _rank_and_world(rank, world_size)
        tensors = live_tensors(engine_model)
        self._load_weights = load_weights or load_by_name(tensors)
        self._tensors = tensors
        self._recipes = recipes if recipes is not None else getattr(engine_model, "recipe_for", None)
        self._allow_missing = tuple(allow_missing)
        self._info = local_info()
        self._recording: Recording | None = None
        self._ready: Ticket | None = None
        self._background_error: WsyncError | None = None
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
                num_threads=_threads(num_threads, self.world_size),
                join_deadline_s=join_deadline_s,
            )
        except BaseException:
            channel.close()
            raise

    def _describe(self, tensors: tuple[TensorSpec, ...]) -> tuple[SinkRankManifest, list[StorageMemory]]:
        self._recording = record_loader(
            self._load_weights, tensors, self._tensors, self._recipes or {}, allow_missing=self._allow_missing
        )
        forgotten = sorted(set(self._recording.coverage.not_loaded) - set(self._allow_missing))
        if forgotten:
            raise MissingTensorError(
                f"the engine has {', '.join(map(repr, forgotten[:5]))}, which no tensor of the trainer fills "
                f"({len(forgotten)} of {len(self._tensors)} live tensors)",
                hint="load the same model on both sides, or name them in allow_missing",
            )
        manifest = self._recording.manifest(self.replica, self.rank, self.world_size, self._info)
        return manifest, self._recording.memory

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
    def last_pause_s(self) -> float:
        """Seconds that the last `commit` took on this rank: decision, install, confirmation."""
        return self._session.last_pause_s

    # ---- prepare and commit

    def prepare(self, deadline_s: float = 60.0) -> Ticket:
        """Wait for the next version, stage it and verify its digests. The old version keeps serving.

        Raises:
            DeadlineError: no version came, or it did not arrive in time. The old version serves.
            DigestError: staged bytes differ from what was published. The old version serves.
            PeerLostError: the trainer is gone. The old version serves.
            WsyncError: what ended the publish at the trainer, such as `NonFiniteError`. The old version serves.
            StateError: a version is prepared already, or `start` does this in the background.
        """
        if self._thread is not None:
            raise StateError("prepare() after start(): take tickets with poll()")
        return self._session.prepare(deadline_s)

    def commit(self, ticket: Ticket) -> None:
        """Make live memory the ticket's version, in place, on the calling thread.

        Returns when every rank of the replica has installed: it may serve.

        Raises:
            CommitError: ``replicas`` says whether the old version serves or the replica is poisoned.
            DigestError: what was installed is not what was published: poisoned.
            StateError: the ticket is not the one that is prepared.
        """
        try:
            if self._recording is not None:
                self._recording.check_addresses()
            self._session.commit(ticket)
        finally:
            with self._wake:
                self._ready = None
                self._wake.notify_all()

    # ---- in the background

    def start(self) -> None:
        """Prepare versions on a thread of this Sink; the engine takes tickets with `poll`."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._prepare_forever, name=f"wsync-{self.replica}", daemon=True)
            self._thread.start()

    def poll(self) -> Ticket | None:
        """The ticket that is ready to commit, or None. Never blocks.

        Raises:
            WsyncError: an error that ended the background thread.
        """
        with self._wake:
            if self._background_error is not None:
                raise self._background_error
            return self._ready

    def _prepare_forever(self) -> None:
        while not self._stopping:
            try:
                ticket = self._session.prepare(1.0)
            except WsyncError as e:
                if self._stopping:
                    return
                if not is_retryable(e):
                    with self._wake:
                        self._background_error = e
                    return
                continue
            with self._wake:
                self._ready = ticket
                self._wake.wait_for(lambda: self._ready is None or self._stopping)

    def close(self) -> None:
        """Leave. Live memory stays as it is. May be called twice."""
        self._stopping = True
        with self._wake:
            self._wake.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5)
        self._session.close()

    def __enter__(self) -> Sink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
