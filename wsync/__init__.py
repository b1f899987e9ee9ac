"""wsync: weights of a trainer into running inference engines, in place, atomic per replica.

    source = wsync.Source(model, store="tcp://127.0.0.1:29600", key_file="wsync.key")     # every trainer rank
    source.publish(version=1).wait_committed()

    sink = wsync.Sink(engine_model, load_weights=engine_model.load_weights, store=..., key_file=..., replica="engine-0")
    sink.commit(sink.prepare())                                                           # every engine rank

`import wsync` loads no torch; what needs it is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from wsync.errors import (
    CommitError,
    ConfigError,
    ConnectError,
    DeadlineError,
    DigestError,
    DtypeMismatchError,
    FormatVersionError,
    ManifestError,
    MissingTensorError,
    NonFiniteError,
    PeerLostError,
    PlanMismatchError,
    RecipeError,
    RecordError,
    ShapeMismatchError,
    StateError,
    TransportError,
    UnknownTensorError,
    WireError,
    WsyncError,
)

if TYPE_CHECKING:
    from wsync.api import Publication, PublishReport, Sink, Source, Ticket
    from wsync.kernels import dequantize, quantize
    from wsync.plan import Plan, PlanOptions, make_plan
    from wsync.session.auth import new_key_file
    from wsync.spec.cluster import Cluster

__version__ = "0.1.0"

_LAZY = {
    "Source": "wsync.api",
    "Sink": "wsync.api",
    "Publication": "wsync.api",
    "PublishReport": "wsync.api",
    "Ticket": "wsync.api",
    "new_key_file": "wsync.session.auth",
    "quantize": "wsync.kernels",
    "dequantize": "wsync.kernels",
    "make_plan": "wsync.plan",
    "Plan": "wsync.plan",
    "PlanOptions": "wsync.plan",
    "Cluster": "wsync.spec.cluster",
}

__all__ = [
    "Cluster",
    "CommitError",
    "ConfigError",
    "ConnectError",
    "DeadlineError",
    "DigestError",
    "DtypeMismatchError",
    "FormatVersionError",
    "ManifestError",
    "MissingTensorError",
    "NonFiniteError",
    "PeerLostError",
    "Plan",
    "PlanMismatchError",
    "PlanOptions",
    "Publication",
    "PublishReport",
    "RecipeError",
    "RecordError",
    "ShapeMismatchError",
    "Sink",
    "Source",
    "StateError",
    "Ticket",
    "TransportError",
    "UnknownTensorError",
    "WireError",
    "WsyncError",
    "__version__",
    "dequantize",
    "make_plan",
    "new_key_file",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'wsync' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
