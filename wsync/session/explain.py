"""Why a round went as it did, in one sentence that names who was waited for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsync.errors import CommitError
from wsync.session.messages import Fault

if TYPE_CHECKING:
    from wsync.session.round import Round


def late_message(round_: Round) -> str:
    """What a round that ran out of time was waiting for."""
    seconds = f"{round_.deadline - round_.began:.1f} s"
    version, members = round_.version, round_.members
    if not round_.all_requested:
        missing = sorted(set(range(members.num_sources)) - set(round_.requests))
        return f"trainer ranks {missing} did not call publish(version={version}) within {seconds}"
    if round_.state == "gather":
        excluded = "".join(f"; {name}: {fault.message}" for name, fault in sorted(round_.excluded.items()))
        return (
            f"publish(version={version}) needs {round_.needed} complete replicas and has {len(round_.candidates())} "
            f"after {seconds}: {members.describe_missing()}{excluded}"
        )
    if round_.state in ("offers", "ready") and round_.epoch:
        answered = set(round_.epoch.offers) if round_.state == "offers" else round_.epoch.ready
        waiting = [c.name for c in round_.epoch.clients if c.uid not in answered]
        return f"setting up for version {version} took over {seconds}: waiting for {', '.join(waiting)}"
    behind = ", ".join(_behind(round_)) or "flush"
    return f"version {version} was not committed within {seconds}: waiting for {behind}"


def _behind(round_: Round) -> list[str]:
    behind = [f"trainer/{rank}" for rank in range(round_.members.num_sources) if rank not in round_.packed]
    for name, state in round_.replicas.items():
        if not state.outcome:
            done, step = (state.installed, "commit") if state.decided else (state.voted, "prepare")
            behind += [f"{c.name} ({step})" for c in round_.ranks_of(name) if c.rank not in done]
    return behind


def below_minimum(round_: Round, committed: tuple[str, ...], dropped: dict[str, Fault]) -> Fault:
    """Fewer replicas than needed committed."""
    why = "; ".join(f"{name}: {fault.message}" for name, fault in sorted(dropped.items()))
    error = CommitError(
        f"version {round_.version} was committed by {len(committed)} replicas, {round_.needed} are needed ({why})"
    )
    return Fault.of(error)
