"""Reads the machine that the command runs on: NVML and ``/sys``, each in a child process with a deadline.

A driver that hangs or crashes cannot take the check with it: what was told before is judged, the call that did not
return is a finding, and the GPUs that it did not concern are asked again without the one that it did.
"""

from __future__ import annotations

import platform
import time
from concurrent.futures import ThreadPoolExecutor

import msgspec

from wsync.errors import ConfigError
from wsync.topo.live.assemble import assemble
from wsync.topo.live.records import Request
from wsync.topo.live.supervise import Outcome, run_probe
from wsync.topo.model import Machine

TIMEOUT_S = 30.0
"""A driver without persistence mode takes some seconds for each GPU."""
MAX_ROUNDS = 3
"""Times that NVML is asked at most: with two GPUs that do not answer, the rest is not waited for."""


class LiveOptions(msgspec.Struct, frozen=True):
    """How to read this machine.

    Attributes:
        timeout_s: of everything together.
        root: folder with ``sys`` and ``proc``; ``/host`` in a container that mounts them there.
        nvml, sysfs: ``module:function`` of the probes. Tests name their own; neither the command line nor the
            environment can, so that whoever may choose what runs could run it anyway.
        argument: for the probes.
    """

    timeout_s: float = TIMEOUT_S
    root: str = "/"
    nvml: str = "wsync.topo.live.nvml:probe"
    sysfs: str = "wsync.topo.live.sysfs:probe"
    argument: str = ""


def read_live(options: LiveOptions | None = None, host: str | None = None) -> Machine:
    """Read this machine.

    Args:
        options: deadline, root, probes.
        host: its name, if not that of the system.

    Returns:
        Everything that was told before the deadline; the call that did not end well is among the oddities.

    Raises:
        ConfigError: without nvidia-ml-py or without a driver; the hint says what to do. Or a timeout that is not
            positive.
    """
    options = options or LiveOptions()
    if not 0 < options.timeout_s <= 3600:
        raise ConfigError(f"a timeout of {options.timeout_s:g} s, allowed is more than 0, up to 3600")
    deadline = time.monotonic() + options.timeout_s
    with ThreadPoolExecutor(2, "wsync-topo") as pool:
        nvml = pool.submit(_ask_nvml, options, deadline)
        sysfs = pool.submit(run_probe, _request(options, options.sysfs), deadline, options.timeout_s / MAX_ROUNDS)
        rounds, devices = nvml.result(), sysfs.result()
    failure = rounds[0].failure
    if failure is not None:
        raise ConfigError(failure.text, hint=failure.hint)
    return assemble(rounds, devices, host or platform.node() or None)


def _ask_nvml(options: LiveOptions, deadline: float) -> list[Outcome]:
    """Ask until the end is reached, leaving out GPUs that did not let it."""
    rounds: list[Outcome] = []
    skip: list[int] = []
    while len(rounds) < MAX_ROUNDS and time.monotonic() < deadline:
        outcome = run_probe(_request(options, options.nvml, tuple(skip)), deadline, options.timeout_s / MAX_ROUNDS)
        rounds.append(outcome)
        if outcome.end not in ("hang", "crash") or outcome.doing is None or outcome.doing.gpu < 0:
            break
        skip.append(outcome.doing.gpu)
    return rounds


def _request(options: LiveOptions, probe: str, skip: tuple[int, ...] = ()) -> Request:
    # The child outlives its parent by seconds at most.
    return Request(probe, options.root, skip, options.argument, int(options.timeout_s) + 5)


__all__ = ["LiveOptions", "read_live"]
