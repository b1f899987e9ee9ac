"""What a probe in a child process tells its parent: one JSON object a line, sent before and after every call.

A probe only asks and tells; what the answers mean is decided in the parent, so that an answer is judged although the
next call never returns. Nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

Value = int | str | list[int | None] | dict[str, int | str]
"""What a call returns: fields of a structure by name, ``None`` for one of several that was refused."""


class Request(msgspec.Struct, frozen=True):
    """What a child shall do.

    Attributes:
        probe: ``module:function`` of the probe. It comes from the Python call (`wsync.topo.live.LiveOptions`), never
            from the command line or the environment, so that who can choose it runs code in the parent already.
        root: folder with ``sys`` and ``proc``.
        skip: GPUs of which nothing may be asked, because asking did not end well.
        argument: for the probe; the real ones have none.
        give_up_s: after this the child ends by itself, should nobody be left to kill it.
    """

    probe: str
    root: str = "/"
    skip: tuple[int, ...] = ()
    argument: str = ""
    give_up_s: int = 60


class Doing(msgspec.Struct, frozen=True, tag="doing", omit_defaults=True):
    """A call is about to be made: of a GPU by index (-1: of none), with more arguments (a link, a peer)."""

    call: str
    gpu: int = -1
    at: tuple[int, ...] = ()


class Answer(msgspec.Struct, frozen=True, tag="answer", omit_defaults=True):
    """A call returned."""

    call: str
    value: Value
    gpu: int = -1
    at: tuple[int, ...] = ()


class Refusal(msgspec.Struct, frozen=True, tag="refusal", omit_defaults=True):
    """A call failed; ``error`` is the end of NVML's constant (``NOT_SUPPORTED``) or the system's (``EIO``)."""

    call: str
    error: str
    gpu: int = -1
    at: tuple[int, ...] = ()


class Failure(msgspec.Struct, frozen=True, tag="failure", omit_defaults=True):
    """Nothing can be probed at all; ``hint`` says what to do."""

    text: str
    hint: str = ""


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The probe is at its end; a child that stops without it was stopped."""


Record = Doing | Answer | Refusal | Failure | Done
Send = Callable[[Record], None]
Probe = Callable[[Request, Send], None]

encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Record).decode


def spell(doing: Doing) -> str:
    """``nvmlDeviceGetNvLinkState of GPU3, link 5``, or ``reading /sys/...``."""
    if doing.call.startswith("/"):
        return f"reading {doing.call}"
    of = f" of GPU{doing.gpu}" if doing.gpu >= 0 else ""
    if not doing.at:
        return f"{doing.call}{of}"
    what = f"link {doing.at[0]}" if "NvLink" in doing.call else f"with GPU{doing.at[0]}"
    return f"{doing.call}{of}, {what}"
