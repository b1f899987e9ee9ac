"""The worker side: what vLLM makes in every worker of a server whose weight transfer backend is ``wsync``.

vLLM calls every method on the engine's thread, between steps. Staging runs on a thread of the `Sink`, while the engine
generates; `WsyncWorkerBackend.update_weights` commits what is staged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wsync.api.common import whole_number
from wsync.errors import ConfigError, StateError
from wsync.integrations.vllm import signatures

if TYPE_CHECKING:
    import torch

    from wsync.api import Sink
    from wsync.integrations.vllm.metrics import WorkerMetrics

_log = logging.getLogger("vllm.wsync")

_REPLICA = re.compile(r"[^\s/]+")


@dataclass(frozen=True)
class WsyncInitInfo:
    """What a worker needs to join. The trainer sends it; it holds the path of a key, never a key.

    Attributes:
        store: ``tcp://host:port`` of trainer rank 0, as this machine reaches it.
        replica: name of the server; `placement` says what a replica of it is called.
        key_file: path on this machine; None takes the secret from ``WSYNC_KEY``.
        recipes: recipe by checkpoint name, where the engine's own is not wanted.
        mode: ``"staged"``.
        join_deadline_s: seconds for this worker to be accepted.
        allow_missing: live tensors that no tensor of the trainer fills, on purpose.
        num_threads: of the verify and install kernels; None divides this process's cores among the replica's ranks.
        num_engines: data-parallel engines of the server.
        afresh: leave and join anew, though this worker may have joined with all the same info.
    """

    store: str
    replica: str
    key_file: str | None = None
    recipes: dict[str, str] | None = None
    mode: str = "staged"
    join_deadline_s: float = 60.0
    allow_missing: tuple[str, ...] = ()
    num_threads: int | None = None
    num_engines: int = 1
    afresh: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.replica, str) or not _REPLICA.fullmatch(self.replica):
            raise ConfigError(f"replica must be a name without '/' and blanks, got {self.replica!r}")
        if isinstance(self.allow_missing, str):
            raise ConfigError(f"allow_missing is a list of names, got {self.allow_missing!r}")
        object.__setattr__(self, "allow_missing", tuple(self.allow_missing))


@dataclass(frozen=True)
class WsyncUpdateInfo:
    """What one update is.

    Attributes:
        version: to commit.
        deadline_s: seconds to wait for it to be staged.
        replicas: those that take it; None means all. A worker of another one leaves its weights alone.
    """

    version: int
    deadline_s: float = 60.0
    replicas: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", whole_number(self.version, "version"))
        if not isinstance(self.deadline_s, (int, float)) or self.deadline_s < 0:
            raise ConfigError(f"deadline_s must be seconds from 0, got {self.deadline_s!r}")
        if isinstance(self.replicas, str):
            raise ConfigError(f"replicas is a list of names, got {self.replicas!r}")


def placement(parallel: Any, replica: str, num_engines: int = 1) -> tuple[str, int, int]:
    """Name of the replica, rank in it and its size, for one worker.

    Data-parallel engines of a mixture of experts share experts and step together: they are one replica. Those of a
    dense model are independent, and each is a replica of its own, ``<replica>.dp<i>``.

    Args:
        parallel: the worker's ``ParallelConfig``.
        replica: name of the server.
        num_engines: data-parallel engines of the server; a worker of a dense model does not know them.
    """
    world_size, rank = int(parallel.world_size), int(parallel.rank)
    num_lockstep = int(getattr(parallel, "data_parallel_size", 1))
    index = int(getattr(parallel, "data_parallel_index", getattr(parallel, "data_parallel_rank", 0)) or 0)
    if num_lockstep > 1:
        return replica, index * world_size + rank, num_lockstep * world_size
    if num_engines > 1 or index > 0:
        return f"{replica}.dp{index}", rank, world_size
    return replica, rank, world_size


class WsyncWorkerBackend:
    """vLLM's ``WeightTransferEngine``, by its members.

    Args:
        config: vLLM's ``WeightTransferConfig``.
        vllm_config: the worker's ``VllmConfig``.
        device: of the model.
        model: whose weights are written.

    Raises:
        ConfigError: LoRA is enabled (its layers are wrapped, and an adapter would sit on weights it was not trained
            for), or the balancing of expert loads (vLLM moves experts about after they were recorded).
    """

    init_info_cls = WsyncInitInfo
    update_info_cls = WsyncUpdateInfo
    supports_draft_weight_update = False
    defers_processing = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        if getattr(vllm_config, "lora_config", None) is not None:
            raise ConfigError(
                "the weight transfer backend 'wsync' does not serve LoRA adapters: lora_config is set",
                hint="start the server without --enable-lora, and publish merged weights",
            )
        if getattr(vllm_config.parallel_config, "enable_eplb", False):
            raise ConfigError(
                "the weight transfer backend 'wsync' does not serve experts that are moved about: enable_eplb is set",
                hint="start the server without --enable-eplb",
            )
        found = signatures.worker_differences()
        if found:
            _log.warning("%s", signatures.describe_differences(found))
        self.config = config
        self.vllm_config = vllm_config
        self.parallel_config = vllm_config.parallel_config
        self.model_config = vllm_config.model_config
        self.device = device
        self.model = model
        self._sink: Sink | None = None
        self._joined: WsyncInitInfo | None = None
        self._metrics: WorkerMetrics | None = None

    # ---- joining

    def parse_init_info(self, init_dict: Mapping[str, Any]) -> WsyncInitInfo:
        """Check and type what the trainer sent.

        Raises:
            ConfigError: a key that is unknown or lacking; the message names it.
        """
        return WsyncInitInfo(**_checked(WsyncInitInfo, init_dict, "init_info"))

    def parse_update_info(self, update_dict: Mapping[str, Any]) -> WsyncUpdateInfo:
        """As `parse_init_info`, for one update."""
        return WsyncUpdateInfo(**_checked(WsyncUpdateInfo, update_dict, "update_info"))

    def init_transfer_engine(self, init_info: WsyncInitInfo) -> None:
        """Join the trainer's store: record the engine's loader, and stage in the background from then on.

        Called again with the same info it does nothing while the rank is alive (a restarted trainer on the same store
        is found by itself); with another one, or ``afresh``, it leaves, and joins anew.

        Raises:
            WsyncError: this rank is refused, or was not accepted in time. The engine serves what it served.
        """
        is_afresh, init_info = init_info.afresh, dataclasses.replace(init_info, afresh=False)
        if init_info == self._joined and self._is_alive() and not is_afresh:
            return
        self.shutdown()
        replica, rank, world_size = placement(self.parallel_config, init_info.replica, init_info.num_engines)
        self._sink = self._make_sink(init_info, replica, rank, world_size)
        self._joined = init_info
        self._sink.start()
        _log.info("wsync: %s/%d of %d joined %s", replica, rank, world_size, init_info.store)
        self._metrics = _metrics_of(replica, rank)

    def _make_sink(self, info: WsyncInitInfo, replica: str, rank: int, world_size: int) -> Sink:
        from wsync.adapters.engines.vllm import VLLMEngine
        from wsync.api import Sink

        with _current_config(self.vllm_config):
            return Sink(
                VLLMEngine(self.model, self.vllm_config),
                store=info.store,
                key_file=info.key_file,
                replica=replica,
                rank=rank,
                world_size=world_size,
                mode=info.mode,
                recipes=info.recipes,
                allow_missing=info.allow_missing,
                num_threads=info.num_threads,
                join_deadline_s=info.join_deadline_s,
            )

    def _is_alive(self) -> bool:
        if self._sink is None:
            return False
        try:
            self._sink.poll()
        except Exception:  # its background thread has ended: it stages nothing any more
            return False
        return True

    # ---- one update

    def start_weight_update(self) -> None:
        """Nothing has to be prepared; the call says early, before a server is paused, that this worker has no trainer.

        Raises:
            StateError: the worker has not joined.
        """
        self._joined_sink("start_weight_update")

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        """Commit a version: wait until it is staged, and make it what this worker serves.

        Raises:
            WsyncError: `CommitError` and others say whether the old version serves or the replica is poisoned.
        """
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: WsyncUpdateInfo) -> None:
        """As `update_weights`."""
        sink = self._joined_sink("update_weights")
        if update_info.replicas is not None and sink.replica not in update_info.replicas:
            return
        try:
            sink.commit(sink.wait(update_info.version, update_info.deadline_s))
        except BaseException:
            if self._metrics is not None:
                self._metrics.failed(sink)
            raise
        if self._metrics is not None:
            self._metrics.committed(sink)

    def finish_weight_update(self) -> None:
        """Nothing is left to do: a commit is complete when it returns."""

    def drain_pending(self) -> None:
        """Nothing is ever pending: `update_weights` returns when the weights are in place."""

    def _joined_sink(self, call: str) -> Sink:
        if self._sink is None:
            raise StateError(f"{call} came before init_weight_transfer_engine", hint="the trainer has not joined")
        return self._sink

    # ---- targets

    def set_weight_update_target(self, model: torch.nn.Module, model_config: Any) -> None:
        """Refuse another model.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"the weight transfer backend 'wsync' updates the served model, not a draft model ({type(model).__name__})",
            hint="the draft only proposes tokens, and the served model checks each: outputs are right, fewer are taken",
        )

    def reset_weight_update_target(self) -> None:
        """The target is always the served model."""

    def shutdown(self) -> None:
        """Leave the trainer. The engine serves on with the weights that it has. May be called twice."""
        sink, self._sink, self._joined = self._sink, None, None
        metrics, self._metrics = self._metrics, None
        if metrics is not None:
            metrics.close()
        if sink is not None:
            sink.close()


def _checked(cls: type[Any], given: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The fields of a dataclass from a JSON object; unknown and lacking keys are named."""
    known = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError(f"{what} has the unknown keys {unknown}; the backend 'wsync' knows {sorted(known)}")
    lacking = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in given]
    if lacking:
        raise ConfigError(f"{what} lacks {lacking}; it has {sorted(given)}")
    return dict(given)


def _metrics_of(replica: str, rank: int) -> WorkerMetrics | None:
    from wsync.integrations.vllm.metrics import WorkerMetrics

    try:
        return WorkerMetrics(replica, rank)
    except Exception as e:  # metrics that cannot be kept must not keep a worker from joining
        _log.warning("wsync keeps no metrics for %s/%d: %s: %s", replica, rank, type(e).__name__, e)
        return None


def _current_config(vllm_config: Any) -> contextlib.AbstractContextManager[Any]:
    """vLLM's layers ask for the current config while they are made and post-processed."""
    try:
        from vllm.config import set_current_vllm_config
    except ImportError:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[Any] = set_current_vllm_config(vllm_config)
    return context
