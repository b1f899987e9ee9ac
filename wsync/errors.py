"""The errors of wsync. Every error that a user can meet is one of these, and names both values.

    WsyncError
    |-- ConfigError (also ValueError)    the caller's mistake; nothing was moved
    |   |-- ManifestError                the two sides, or the ranks of one side, describe different models
    |   |   |-- UnknownTensorError       a tensor that the other side does not have
    |   |   |-- MissingTensorError       a tensor that is needed and that nobody has (or that is not covered)
    |   |   |-- ShapeMismatchError       the shapes differ
    |   |   `-- DtypeMismatchError       the dtypes differ and no recipe converts one to the other
    |   |-- RecipeError                  an unknown recipe, or one that cannot encode this tensor
    |   |-- RecordError                  the engine's loader did something that cannot be recorded as copies
    |   |-- NonFiniteError               a weight is NaN or infinite
    |   |-- PlanMismatchError            ranks hold different plans
    |   `-- StateError                   a call that the object's state does not allow
    |-- TransportError                   retry after recreating the Source or Sink
    |   |-- ConnectError                 the store cannot be bound or reached, or the key is refused
    |   |-- DeadlineError                a wait ran out of time (also TimeoutError)
    |   `-- PeerLostError                a peer died or went silent
    |-- WireError                        do not commit
    |   |-- FormatVersionError           a message or file of another format version
    |   `-- DigestError                  bytes differ from what was published
    `-- CommitError                      says for each replica: old version serving, or poisoned

A message is one sentence that names the subject and both values; ``hint`` says what to do.
"""

from __future__ import annotations

from collections.abc import Mapping


class WsyncError(Exception):
    """Base of all errors of wsync.

    Attributes:
        hint: one line on what to do next, or an empty string.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    @property
    def message(self) -> str:
        """The message without the hint."""
        return str(self.args[0]) if self.args else ""

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class ConfigError(WsyncError, ValueError):
    """The caller's mistake. Nothing was moved."""


class ManifestError(ConfigError):
    """The two sides, or the ranks of one side, describe different models."""


class UnknownTensorError(ManifestError):
    """A tensor that the other side does not have."""


class MissingTensorError(ManifestError):
    """A tensor, or a part of one, that is needed and that nobody holds."""


class ShapeMismatchError(ManifestError):
    """Two shapes of one tensor differ."""


class DtypeMismatchError(ManifestError):
    """Two dtypes of one tensor differ and no recipe converts one to the other."""


class RecipeError(ConfigError):
    """An unknown recipe, or one that cannot encode this tensor."""


class RecordError(ConfigError):
    """The engine's loader did something that cannot be recorded as copies."""


class NonFiniteError(ConfigError):
    """A weight is NaN or infinite; the message names the tensor and the first bad index."""


class PlanMismatchError(ConfigError):
    """Two ranks hold different plans."""


class StateError(ConfigError):
    """A call that the object's state does not allow."""


class TransportError(WsyncError):
    """Bytes or messages did not get through. Retry after recreating the Source or Sink."""


class ConnectError(TransportError):
    """The store cannot be bound or reached, or the key is refused."""


class DeadlineError(TransportError, TimeoutError):
    """A wait ran out of time; the message names what was waited for and for how long."""


class PeerLostError(TransportError):
    """A peer died or went silent; the message names it and the phase."""


class WireError(WsyncError):
    """The bytes or messages are not what they should be. Do not commit."""


class FormatVersionError(WireError):
    """A message or file of another format version."""


class DigestError(WireError):
    """Bytes differ from what was published."""


class CommitError(WsyncError):
    """A publish or commit did not reach every replica that it had to.

    Attributes:
        replicas: for each replica, ``"committed"``, ``"old version serving"`` or ``"poisoned"``.
    """

    def __init__(self, message: str, *, replicas: Mapping[str, str] | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.replicas = dict(replicas or {})


def _leaves(cls: type[WsyncError]) -> dict[str, type[WsyncError]]:
    found = {cls.__name__: cls}
    for sub in cls.__subclasses__():
        found.update(_leaves(sub))
    return found


def error_from_wire(name: str, message: str, hint: str = "") -> WsyncError:
    """Rebuild an error that another rank reported by its class name.

    An unknown name (a newer peer) becomes a plain `WsyncError` that keeps the name in its message.
    """
    cls = _leaves(WsyncError).get(name)
    if cls is None:
        return WsyncError(f"{name}: {message}", hint=hint)
    return cls(message, hint=hint)
