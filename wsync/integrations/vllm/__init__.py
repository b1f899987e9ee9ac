"""wsync for vLLM: the worker backend, the trainer backend, and what drives servers from a training loop.

    source = wsync.Source(model, store="tcp://127.0.0.1:29600", key_file="wsync.key")       # every trainer rank
    fleet = Fleet(source, ["http://127.0.0.1:8000"], key_file="wsync.key")
    fleet.publish(version=1).wait_committed()

A server takes weights from wsync when it is started with ``--weight-transfer-config '{"backend": "wsync"}'``. Importing
this package imports neither vLLM nor torch; the trainer needs no vLLM at all.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsync.integrations.vllm.client import HTTPServer, InProcessServer
    from wsync.integrations.vllm.fleet import Fleet, FleetPublication
    from wsync.integrations.vllm.reports import FleetReport, ServerReport
    from wsync.integrations.vllm.trainer import WsyncTrainer, WsyncTrainerInitInfo

_LAZY = {
    "Fleet": "fleet",
    "FleetPublication": "fleet",
    "FleetReport": "reports",
    "HTTPServer": "client",
    "InProcessServer": "client",
    "ServerReport": "reports",
    "WsyncTrainer": "trainer",
    "WsyncTrainerInitInfo": "trainer",
}

__all__ = [
    "Fleet",
    "FleetPublication",
    "FleetReport",
    "HTTPServer",
    "InProcessServer",
    "ServerReport",
    "WsyncTrainer",
    "WsyncTrainerInitInfo",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
