"""What a run of ``wsync bench vllm`` is asked to do. No torch and no vLLM: the CLI reads this at start-up."""

from __future__ import annotations

from typing import Any

import msgspec

from wsync.bench.options import WSYNC
from wsync.errors import ConfigError
from wsync.integrations.vllm import plugin

PACKED, IN_PLACE = "packed", "in-place"

MODES: dict[str, dict[str, str]] = {PACKED: {plugin.IN_PLACE: "0"}, IN_PLACE: {plugin.IN_PLACE: "1"}}
"""How the engine holds linear weights -> what its environment says. The first one is vLLM's default."""

RELOAD, BROADCAST = "reload", "broadcast"

ROWS: dict[str, str] = {WSYNC: "wsync", RELOAD: "vLLM reload", BROADCAST: "packed broadcast"}
"""Row name -> title. ``docs/measurement.md`` says what each does."""

BUCKET_BYTES = 256 << 20
"""Size of a bucket of the ``broadcast`` row; a larger tensor travels alone."""

SERVER = "engine-0"
"""Name of the server, and of its replica."""

FAULTS = ("corrupt", "kill")
"""What a test may inject into the first timed repeat of wsync: one wrong bit in the server, or a server that dies."""


class VLLMOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of one run.

    Attributes:
        model: Hugging Face configuration with its ``model_type``.
        model_name: preset or file that it came from.
        modes: some of `MODES`.
        num_clients: that generate at the same time.
        repeats: timed repeats of each row.
        transport: of wsync.
        deadline_s: of every wait.
        fault: one of `FAULTS` to inject, or an empty string.
    """

    model: dict[str, Any]
    model_name: str
    modes: tuple[str, ...]
    num_clients: int
    repeats: int
    transport: str
    deadline_s: float
    fault: str = ""


def check_options(options: VLLMOptions) -> VLLMOptions:
    """Refuse numbers that no run can have.

    Raises:
        ConfigError: naming the option and its value.
    """
    for name, value in (("--clients", options.num_clients), ("--repeats", options.repeats)):
        if value < 1:
            raise ConfigError(f"{name} is {value}, but at least 1 is needed")
    if not options.deadline_s > 0:
        raise ConfigError(f"--deadline is {options.deadline_s} s, but a positive number is needed")
    if options.fault not in ("", *FAULTS):
        raise ConfigError(f"fault {options.fault!r} is unknown; known are {', '.join(FAULTS)}")
    return options
