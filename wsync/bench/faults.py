"""Failures on purpose, so that tests can see them noticed."""

from __future__ import annotations

import os
import signal
import time

import torch

from wsync.bench.engine import Engine, parameters
from wsync.bench.events import Step
from wsync.bench.options import Fault
from wsync.bench.world import World
from wsync.errors import ConfigError


def is_due(fault: Fault | None, world: World, step: Step) -> bool:
    """Whether ``fault`` happens on this rank in this repeat."""
    if fault is None:
        return False
    role = "trainer" if world.is_trainer else "engine"
    return (fault.role, fault.rank, fault.row, 0) == (role, world.side_rank, step.row, step.repeat)


def fail(fault: Fault) -> None:
    """Raise, die or hang, as the fault says."""
    if fault.kind == "raise":
        raise ConfigError(f"a failure was injected into {fault.role} {fault.rank} in row {fault.row}")
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.kind == "hang":
        time.sleep(3600)


def corrupt(engine: Engine) -> None:
    """Flip one bit of the last byte of the engine's first parameter."""
    tensor = next(iter(parameters(engine.live).values()))
    tensor.view(-1).view(torch.uint8)[-1] ^= 1
