"""What a user of `Fleet` may choose, and what vLLM and its workers are told then."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wsync.errors import ConfigError

CACHES = {
    ("keep", "recompute"): True,
    ("keep", "keep"): False,
    ("abort", "drop"): True,
    ("abort", "recompute"): True,
    ("abort", "keep"): False,
    ("wait", "drop"): True,
    ("wait", "recompute"): True,
    ("wait", "keep"): False,
}
"""vLLM's ``clear_cache`` for each pair of pause and caches."""

OPTIONS = ("allow_missing", "join_deadline_s", "mode", "num_threads")
"""Fields of `WsyncInitInfo` that `Fleet` has no argument for."""


@dataclass(frozen=True)
class PausePolicy:
    """How a server is paused.

    Attributes:
        mode: vLLM's: ``"keep"``, ``"abort"`` or ``"wait"``.
        clear_cache: vLLM's.
    """

    mode: str
    clear_cache: bool


def pause_policy(pause: str, caches: str | None) -> PausePolicy:
    """vLLM's arguments for a choice of pause and caches.

    Raises:
        ConfigError: an unknown value, or a pair that vLLM cannot do.
    """
    modes = sorted({mode for mode, _ in CACHES})
    if pause not in modes:
        raise ConfigError(f"pause must be one of {modes}, got {pause!r}")
    if caches is None:
        caches = "recompute" if pause == "keep" else "drop"
    if caches not in ("recompute", "keep", "drop"):
        raise ConfigError(f"caches must be 'recompute', 'keep' or 'drop', got {caches!r}")
    if (pause, caches) not in CACHES:
        raise ConfigError(
            f"pause={pause!r} and caches={caches!r} do not go together: the prefix cache is not dropped under requests "
            "that are frozen and use it",
            hint="caches='recompute' drops it and computes what the frozen requests need again",
        )
    return PausePolicy(pause, CACHES[pause, caches])


def worker_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that go to every worker.

    Raises:
        ConfigError: one of them is none, or an argument of `Fleet`.
    """
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise ConfigError(
            f"options has {unknown}, which is none of {list(OPTIONS)} (arguments of Fleet go by their names)"
        )
    return dict(options)


def reachable_store(store: str) -> str:
    """The store, unless it is an address that means another machine on every machine.

    Raises:
        ConfigError: it is one.
    """
    if re.match(r"tcp://(0\.0\.0\.0|\[::\]|\*)", store):
        raise ConfigError(
            f"servers cannot reach the store at {store}, which is every address of the trainer's machine",
            hint="give Fleet store='tcp://<name or address of trainer rank 0>:<port>'",
        )
    return store
