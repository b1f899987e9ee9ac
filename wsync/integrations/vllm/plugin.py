"""The entry point ``vllm.general_plugins``: makes the backend ``wsync`` known to vLLM, in every process of a server.

vLLM calls `register` in the API server, in the engine core and in every worker, possibly more than once, and an error
from it would end the process: what is missing in this vLLM is logged and left out.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any

BACKEND = "wsync"
"""Name of the backend: ``--weight-transfer-config '{"backend": "wsync"}'``."""

IN_PLACE = "WSYNC_VLLM_IN_PLACE"
"""Environment variable: 1 keeps the linear weights of a vLLM on a CPU where they can be written."""

_FACTORIES = "vllm.distributed.weight_transfer.factory"
_PACKAGE = "wsync.integrations.vllm"

_log = logging.getLogger("vllm.wsync")


def register() -> None:
    """Register the worker backend, the trainer backend and the metrics. Never raises; may be called again."""
    try:
        factories = importlib.import_module(_FACTORIES)
    except ImportError as e:
        _log.warning("wsync is not registered: this vLLM has no weight transfer engines (%s)", e)
        return
    _add(getattr(factories, "WeightTransferEngineFactory", None), f"{_PACKAGE}.worker", "WsyncWorkerBackend")
    # vLLM 0.28 has no registry for trainers; there a trainer makes a Fleet.
    _add(getattr(factories, "WeightTransferTrainerFactory", None), f"{_PACKAGE}.trainer", "WsyncTrainer")
    if os.environ.get(IN_PLACE, "0") not in ("", "0"):
        _keep_in_place()
    try:
        from wsync.integrations.vllm.metrics import serve_metrics

        serve_metrics()
    except Exception as e:  # a server without these metrics is better than no server
        _log.warning("wsync has no metrics here: %s: %s", type(e).__name__, e)


def _keep_in_place() -> None:
    try:
        from wsync.adapters.engines.vllm import keep_linear_weights_in_place

        if not keep_linear_weights_in_place():
            _log.warning("%s=1 changes nothing here: this vLLM does not pack linear weights on a CPU", IN_PLACE)
    except Exception as e:  # the engine packs its weights then, which wsync follows as well
        _log.warning("%s=1 does not work with this vLLM: %s: %s", IN_PLACE, type(e).__name__, e)


def _add(factory: Any, module: str, class_name: str) -> None:
    if factory is None or BACKEND in getattr(factory, "_registry", {}):
        return
    try:
        factory.register_engine(BACKEND, module, class_name)
    except ValueError:  # it is registered, in a registry of another name
        return
    except Exception as e:  # whatever a future vLLM raises here must not end its process
        _log.warning("%s did not register wsync: %s: %s", factory.__name__, type(e).__name__, e)
