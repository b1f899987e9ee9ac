"""How NVLinks join the GPUs of a machine (switch, mesh, bridges, not at all) and how many links each GPU should show.

In ``topo -m`` the number on an NVSwitch is that of links to the switch, the same for every peer; on a mesh it is that
of links to the peer, and a row adds up to the GPU's links; a bridge joins a pair. The majority of those GPUs
that have NVLink decides, so that broken GPUs do not change what is expected of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import msgspec

from wsync.topo.platforms import PAIR_COUNTS, SWITCH_COUNTS, UNKNOWN, Profile
from wsync.topo.view import View

MESH_TOTALS = (4, 6, 12, 18)
"""Links of a GPU on boards whose GPUs are wired to each other: P100, V100, A100 (four), H100 (four)."""


BRIDGE_LINKS = 12
"""Links of a pair with three bridges (A100, H100 NVL); H200 NVL has 18, and then every GPU has a partner."""


class Shape(msgspec.Struct, frozen=True):
    """The NVLink wiring.

    Attributes:
        joined: ``"switch"``, ``"mesh"``, ``"bridge"``, ``"none"``, or ``"unknown"`` where no pair is known.
        links: that each GPU should show: per peer on a switch, in sum on a mesh, to its partner on a bridge.
    """

    joined: str
    links: int | None = None


def find_shape(view: View, profile: Profile = UNKNOWN) -> Shape:
    """The wiring that most GPUs show."""
    others = len(view.gpus) - 1
    rows = {gpu: counts for gpu, counts in view.links_between.items() if counts and len(counts) == others}
    if not rows:
        return Shape("unknown", profile.links)
    # GPUs that have lost all links say nothing of the wiring, be they the majority.
    wired = {gpu: counts for gpu, counts in rows.items() if any(counts.values())}
    biggest = _mode(max(counts.values()) for counts in wired.values())
    if not any(links for counts in view.links_between.values() for links in counts.values()):
        # Of a few rows that show no NVLink nothing follows for the others.
        return Shape("none" if 2 * len(rows) >= len(view.gpus) else "unknown", profile.links)
    partners = max((sum(n > 0 for n in counts.values()) for counts in wired.values()), default=0)
    if partners <= 1 and not profile.soldered and not _is_rest_of_board(view, wired, biggest, profile):
        return Shape("bridge", _next(PAIR_COUNTS, max(max(c.values()) for c in rows.values()), profile))
    if wired and _is_mesh(wired, biggest, profile):
        return Shape(
            "mesh", profile.links or _next(MESH_TOTALS, _mode(sum(c.values()) for c in wired.values()), UNKNOWN)
        )
    return Shape("switch", _next(SWITCH_COUNTS, biggest, profile))


def _is_rest_of_board(view: View, wired: dict[int, dict[int, int]], biggest: int, profile: Profile) -> bool:
    """Whether one pair is all that is left of a switched board: more links than a bridge has, and most have none."""
    return profile is UNKNOWN and len(view.gpus) >= 5 and biggest > BRIDGE_LINKS and 2 * len(wired) <= len(view.gpus)


def _is_mesh(rows: dict[int, dict[int, int]], biggest: int, profile: Profile) -> bool:
    """Whether rows add up to the links of a GPU, rather than repeat them."""
    if "mesh" not in profile.joined:
        return False
    total = _mode(sum(counts.values()) for counts in rows.values())
    if biggest < SWITCH_COUNTS[0]:
        return True
    if profile.links is not None:
        # A mesh of three or more spreads its links: one pair with most of them is on a switch that lacks some.
        return 2 * biggest <= profile.links and total <= profile.links
    pairs = Counter(n for counts in rows.values() for n in counts.values())
    if biggest > BRIDGE_LINKS or (total > max(MESH_TOTALS) and total % biggest == 0):
        # No GPU of a mesh has so many links: each row repeats the links to the switch.
        return False
    uneven = sum(count for n, count in pairs.items() if n != biggest) * 2 > sum(pairs.values())
    # Four GPUs with 4 or 6 links to each peer are A100 and H100 meshes; more GPUs with one number are on a switch.
    return uneven or (total in MESH_TOTALS and len(rows) <= 4 and total != biggest)


def _mode(values: Iterable[int]) -> int:
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value), default=0)


def _next(known: tuple[int, ...], seen: int, profile: Profile) -> int:
    """The number of links that the profile or the market has, at least what was seen."""
    if profile.links:
        return profile.links
    return next((n for n in known if n >= seen), seen)
