"""What a fleet reports of its servers."""

from __future__ import annotations

from dataclasses import dataclass, field

from wsync.session.report import PublishReport

COMMITTED = "committed"
OLD_VERSION = "old version serving"
POISONED = "poisoned"
ABSENT = "absent"
LOST = "lost"


@dataclass(frozen=True)
class ServerReport:
    """What one publish did to one server.

    Attributes:
        name: of the server.
        state: ``"committed"``; ``"old version serving"`` (it was never paused, or goes on with what it had);
            ``"poisoned"`` (its weights are of no known version); ``"absent"`` (it, or an engine of it, had not joined);
            ``"lost"`` (it does not answer: what it serves, and whether it is paused, is not known).
        replicas: the state of each of its replicas.
        paused: it was left paused, and serves nothing until a later publish commits.
        staged_s: seconds from the publish until it could commit; the old version serves meanwhile.
        pause_s: seconds from asking it to pause until it stepped again.
        commit_s: seconds that the commit took of those.
        error: why it does not serve the version, or an empty string.
    """

    name: str
    state: str
    replicas: dict[str, str] = field(default_factory=dict)
    paused: bool = False
    staged_s: float = 0.0
    pause_s: float = 0.0
    commit_s: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class FleetReport:
    """What one publish did.

    Attributes:
        version: what was published.
        publish: of the trainer. It takes a replica for poisoned that held the version and did not say in time that it
            had put it in place; ``servers`` knows better, where the server was never asked to.
        servers: by name; empty on trainer ranks other than 0.
    """

    version: int
    publish: PublishReport
    servers: dict[str, ServerReport]

    @property
    def serving(self) -> tuple[str, ...]:
        """Names of the servers that generate with this version."""
        return tuple(name for name, s in self.servers.items() if s.state == COMMITTED and not s.paused)
