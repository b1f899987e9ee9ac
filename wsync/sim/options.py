"""What a simulation may be asked for: stragglers, failures, replicas that are missing, how engines install."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from typing import Literal

import msgspec

from wsync.errors import ConfigError
from wsync.spec.cluster import MAX_RATE_GBPS
from wsync.spec.manifest import HOST, SourceManifest

MIN_FACTOR = 1e-6
MAX_TIME_S = 1e6
"""A failure later than this (11 days) is a slip of the pen."""


class Straggler(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A slow node.

    Attributes:
        node: its name.
        factor: on all its rates, more than 0 and at most 1.
    """

    node: str
    factor: float


class Failure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A port or a node that fails.

    Attributes:
        node: its name.
        time_s: seconds after the publish.
        nic: index of the port; None for the whole node.
    """

    node: str
    time_s: float
    nic: int | None = None


class HostCosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What ranks without a GPU do with each wire byte, as measured (`wsync.sim.calibrate`).

    Attributes:
        rank_gbps: copy rate of one rank.
        pack, hop, install: passes of that rate for each wire byte: quantising it, taking it over from a rank of the
            same node (shared memory: its digest), writing it.
    """

    rank_gbps: float
    pack: float
    hop: float
    install: float


class SimOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to simulate.

    Attributes:
        stragglers: nodes with lower rates than the cluster says.
        failures: what fails meanwhile.
        without: names of replicas that are not there: the plan is made for the others.
        install: ``staged`` as `Sink` does it (live memory is written after the vote), or ``in_place`` (each bucket as
            it comes, while the engine does not serve).
        offloaded: take every trainer rank to have its weights in host memory, as a manifest says it by
            `RankInfo.memory`. A scenario is planned so as well.
        start_s, vote_s: of control messages: from the publish to the first packing, and from the last staged rank to
            the first write; None for two messages each.
        host: what ranks without a GPU do, as measured; None for copies at the rate of the cluster file.
        detect_s: from a failure until peers act on it.
        gpu_memory_gb: memory of one GPU, in 10^9 bytes: a run whose weights and staged buckets need more says so. None
            if it is not known.
        jitter: every service takes its time times a number between ``1 - jitter`` and ``1 + jitter``.
        seed: of the jitter.
    """

    stragglers: tuple[Straggler, ...] = ()
    failures: tuple[Failure, ...] = ()
    without: tuple[str, ...] = ()
    install: Literal["staged", "in_place"] = "staged"
    offloaded: bool = False
    start_s: float | None = None
    vote_s: float | None = None
    host: HostCosts | None = None
    detect_s: float = 0.05
    gpu_memory_gb: float | None = None
    jitter: float = 0.0
    seed: int = 0

    def source_of(self, source: SourceManifest) -> SourceManifest:
        """The trainer as it is planned and simulated: with `offloaded` all of its weights are in host memory."""
        if not self.offloaded:
            return source
        ranks = tuple(msgspec.structs.replace(rank, memory=HOST) for rank in source.ranks)
        return msgspec.structs.replace(source, ranks=ranks)


def check_options(options: SimOptions) -> None:
    """Refuse what no machine can be.

    Raises:
        ConfigError: names the option, the value and what is allowed.
    """
    for straggler in options.stragglers:
        check_range(f"the factor of straggler {shown(straggler.node)}", straggler.factor, MIN_FACTOR, 1.0)
    for failure in options.failures:
        check_range(f"the time of the failure of {shown(failure.node)}", failure.time_s, 0.0, MAX_TIME_S)
    names = [s.node for s in options.stragglers]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"node {shown(name)} is a straggler {names.count(name)} times, allowed is once")
    for field in ("start_s", "vote_s"):
        if getattr(options, field) is not None:
            check_range(field, getattr(options, field), 0.0, MAX_TIME_S)
    if options.host is not None:
        check_range("host.rank_gbps", options.host.rank_gbps, 1e-6, MAX_RATE_GBPS)
        for field in ("pack", "hop", "install"):
            check_range(f"host.{field}", getattr(options.host, field), 0.0, 1e6)
    if options.gpu_memory_gb is not None:
        check_range("gpu_memory_gb", options.gpu_memory_gb, 1e-3, 1e6)
    check_range("detect_s", options.detect_s, 0.0, MAX_TIME_S)
    check_range("jitter", options.jitter, 0.0, 0.99)


def check_range(what: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside of a range, infinities and NaN among them.

    Raises:
        ConfigError: names the value and the range.
    """
    if not (math.isfinite(value) and low <= value <= high):
        raise ConfigError(f"{what} is {value!r}, allowed is {low:g} to {high:g}")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names what was probably meant, or empty."""
    close = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"did you mean {close[0]!r}?" if close else ""


def parse_straggler(text: str) -> Straggler:
    """``NODE:FACTOR``, such as ``trainer-3:0.5``.

    Raises:
        ConfigError: the text is something else.
    """
    node, colon, factor = text.rpartition(":")
    if not (colon and node):
        raise ConfigError(f"straggler {shown(text)} is not NODE:FACTOR, such as trainer-3:0.5")
    return Straggler(node, parse_number(factor, f"the factor of straggler {shown(text)}"))


def parse_failure(text: str) -> Failure:
    """``NODE@SECONDS`` or ``NODE/NIC@SECONDS``, such as ``engine-2/0@0.3s``.

    Raises:
        ConfigError: the text is something else.
    """
    match = re.fullmatch(r"(?P<node>[^@]+?)(/(?P<nic>[\d_]+))?@(?P<time>[^@]+?)s?", text)
    if match is None:
        raise ConfigError(f"failure {shown(text)} is not NODE@SECONDS or NODE/NIC@SECONDS, such as engine-2/0@0.3s")
    nic = None if match["nic"] is None else parse_index(match["nic"], f"the port of failure {shown(text)}")
    return Failure(match["node"], parse_number(match["time"], f"the time of failure {shown(text)}"), nic)


def shown(text: str, limit: int = 60) -> str:
    """What a user gave, for a message: whole if it is short."""
    return repr(text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)")


_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(inf|nan)")
"""Decimal numbers as everybody writes them; `float` also takes underscores and the digits of all scripts."""
_MAX_DIGITS = 9


def parse_number(text: str, what: str) -> float:
    """A decimal number in ASCII.

    Raises:
        ConfigError: the text is something else.
    """
    if len(text) > 400 or not _NUMBER.fullmatch(text):
        raise ConfigError(f"{what} is {shown(text)}, which is not a number")
    return float(text)


def parse_index(text: str, what: str) -> int:
    """A whole number from 0 on, in ASCII digits.

    Raises:
        ConfigError: the text is something else.
    """
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise ConfigError(f"{what} is {shown(text)}, which is not an index: at most {_MAX_DIGITS} digits from 0 to 9")
    return int(text)
