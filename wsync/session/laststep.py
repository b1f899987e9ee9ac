"""The sink's last packing step: what an engine makes of weights before its kernels read them.

Most weights are written straight into live memory. Where an engine repacks a weight after loading, the sink fills
scratch memory in the layout of loading instead, and the engine's own code makes the packed form of it: in the
background while the old version serves (`Repack.prepare`), so that the commit only puts it in place (`Repack.commit`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def _nothing() -> None:
    """A step that an engine does not need."""


@dataclass(frozen=True)
class Repack:
    """Weights that the engine holds in another form than it loads them in.

    Attributes:
        name: of the layer, for messages and reports.
        storages: indices of the manifest's storages that are its scratch memory. No live memory is among them, and no
            storage belongs to two repacks. Repacks may share scratch memory: it is filled for one after the other.
        prepare: makes the packed form from scratch memory. Runs on the thread that stages, after the scratch memory of
            this repack is filled and verified; touches nothing that the engine reads. When it returns, scratch memory
            may be filled for the next repack, unless it is this one's alone.
        commit: puts the prepared form in place. On the engine's thread, between steps.
        discard: forgets what `prepare` made, for a version that is not committed. Also after an error in `prepare`.
    """

    name: str
    storages: frozenset[int]
    prepare: Callable[[], None]
    commit: Callable[[], None] = _nothing
    discard: Callable[[], None] = _nothing


@dataclass(frozen=True)
class LastSteps:
    """All of one engine rank.

    Attributes:
        repacks: in the order in which they are prepared.
        refresh: recomputes what the engine derives from live weights (absorbed matrices). On the engine's thread, after
            everything is installed and put in place.
    """

    repacks: tuple[Repack, ...] = ()
    refresh: Callable[[], None] = _nothing
