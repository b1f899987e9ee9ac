"""Splittable work on machines of different speeds, each piece restricted to some of them: the smallest largest load."""

from __future__ import annotations

from collections.abc import Sequence

SWEEPS = 200
"""Rounds of water-filling; a fixed point is reached long before in all that clusters look like."""


def fill(amount: int, machines: Sequence[int], load: list[int], speed: Sequence[int]) -> dict[int, int]:
    """Pour ``amount`` onto ``machines`` so that the highest of their levels (load / speed) is as low as can be.

    Args:
        amount: to pour, in whole bytes.
        machines: that may take it.
        load: bytes on each machine before; not changed.
        speed: bytes per second of each machine.

    Returns:
        What each machine takes; they add up to ``amount``.
    """
    order = sorted(machines, key=lambda m: (load[m] / speed[m], m))
    total, rate = amount, 0
    used: list[int] = []
    for m in order:
        # A machine whose level is above the water takes nothing.
        if used and load[m] * rate >= total * speed[m]:
            break
        used.append(m)
        total += load[m]
        rate += speed[m]
    out = {m: max(0, total * speed[m] // rate - load[m]) for m in used}
    rest = amount - sum(out.values())
    for m in used:
        if not rest:
            break
        # Rounding leaves less than one byte per machine, or takes it where a level was rounded up.
        step = min(rest, 1) if rest > 0 else max(rest, -out[m])
        out[m] += step
        rest -= step
    if rest:
        out[used[0]] += rest
    return {m: x for m, x in out.items() if x}


def balance(work: Sequence[tuple[int, tuple[int, ...]]], load: list[int], speed: Sequence[int]) -> list[dict[int, int]]:
    """Split every piece of work among its machines so that the largest load / speed is as small as possible.

    Block coordinate descent on the sum of squared loads over speeds: each piece in turn is taken off and poured again.
    It is convex, and its minimum is the lexicographically smallest vector of sorted levels, so its largest level is the
    smallest possible.

    Args:
        work: (bytes, machines that may take it).
        load: bytes on each machine before; changed to what they are after.
        speed: bytes per second of each machine.

    Returns:
        For each piece what each machine takes.
    """
    split: list[dict[int, int]] = [{} for _ in work]
    open_idx: list[int] = []
    for i in sorted(range(len(work)), key=lambda i: (len(work[i][1]), i)):
        amount, machines = work[i]
        if len(machines) == 1:
            split[i] = {machines[0]: amount}
            load[machines[0]] += amount
        else:
            open_idx.append(i)
    tolerance = 0
    for sweep in range(SWEEPS):
        moved = 0
        for i in open_idx:
            amount, machines = work[i]
            before = split[i]
            for m, x in before.items():
                load[m] -= x
            after = split[i] = fill(amount, machines, load, speed)
            for m, x in after.items():
                load[m] += x
                moved += max(0, x - before.get(m, 0))
        if sweep == 0:
            tolerance = moved // 100_000
        elif moved <= tolerance:
            break
    return split
