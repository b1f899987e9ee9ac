"""From measured publishes to the costs of a machine: what one size teaches about others.

Two publishes over shared memory are enough where every rank has a core. A small one, whose bytes take no time worth
mentioning, tells what control messages cost; a larger one tells what ranks do with each byte. Where ranks share cores
and memory, a third one with more ranks tells how much faster all cores are than one (`fit`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from wsync.errors import ConfigError
from wsync.sim.options import HostCosts, SimOptions


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One publish of one trainer rank to one engine rank, as `PublishReport` tells it.

    Attributes:
        wire_bytes: packed.
        total_s: publish to commit.
        pack_s: on the trainer.
        verify_s: digests, on the engine.
        install_s: on the engine.
        receive_s: from the engine's begin until all is staged.
    """

    wire_bytes: int
    total_s: float
    pack_s: float
    verify_s: float
    install_s: float
    receive_s: float = 0.0


def calibrate(small: Measured, large: Measured, rank_gbps: float) -> SimOptions:
    """Options for `simulate` that repeat ``large`` and predict other sizes and layouts of the same machine and recipe.

    Args:
        small: a publish of a few bytes.
        large: a publish whose bytes count.
        rank_gbps: copy rate of one rank; only a unit, the measured passes are relative to it.

    Raises:
        ConfigError: measurements that cannot be, or a small publish that is none.
    """
    for name, measured in (("small", small), ("large", large)):
        for field in ("wire_bytes", "total_s", "pack_s", "verify_s", "install_s"):
            value = getattr(measured, field)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{field} of the {name} publish is {value!r}, it must be more than 0")
    if small.wire_bytes * 4 > large.wire_bytes:
        raise ConfigError(
            f"the small publish has {small.wire_bytes} bytes, of the large one's {large.wire_bytes}: at most a 4th is "
            f"allowed"
        )
    if not (math.isfinite(rank_gbps) and rank_gbps > 0):
        raise ConfigError(f"rank_gbps is {rank_gbps!r}, it must be more than 0")
    per_pass = large.wire_bytes / (rank_gbps * 1e9)
    host = HostCosts(rank_gbps, large.pack_s / per_pass, large.verify_s / per_pass, large.install_s / per_pass)
    # What of the small publish was not work on bytes. Half of it comes before the first byte, half after the last.
    control_s = max(small.total_s - small.pack_s - small.verify_s - small.install_s, 0.0)
    return SimOptions(start_s=control_s / 2, vote_s=control_s / 2, host=host)


def fit(simulated_s: Callable[[float], float], measured_s: float, low: float, high: float, steps: int = 20) -> float:
    """The rate between ``low`` and ``high`` at which a simulation takes what was measured, or the nearer end.

    Args:
        simulated_s: seconds at a rate; more of it never takes longer.
        measured_s: what to meet.
        low, high: rates to look between.
        steps: halvings.

    Raises:
        ConfigError: no range, or nothing measured.
    """
    if not 0 < low <= high or not measured_s > 0:
        raise ConfigError(f"nothing to fit: rates from {low!r} to {high!r}, {measured_s!r} s measured")
    for _ in range(steps):
        middle = (low + high) / 2
        if simulated_s(middle) > measured_s:
            low = middle
        else:
            high = middle
    return (low + high) / 2
