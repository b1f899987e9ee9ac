"""The event loop: buckets that queue for resources, first come, first served.

A *resource* serves one bucket at a time, for ``bytes / rate``; the first one of a hop, which is the sender's, for alpha
more. A bucket that crosses several resources on one hop
(a port out, a shared link, a port in) occupies each for that resource's own time and passes through without being
stored (virtual cut-through): the next resource may begin as soon as the last one has begun, and the hop ends when all
have ended. Between hops a bucket is stored whole and forwarded.

Why a queue and not max-min fair shares: both keep every busy resource busy, so they move the same bytes in the same
time; a queue keeps the order that the plan chose, which is what a transport does with it, and costs one event for each
bucket and resource where fair shares cost a fixed point over all flows for each event.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from heapq import heappop, heappush, heapreplace
from typing import Any

Path = tuple[int, ...]
"""Resources that one hop occupies, in order."""


class Job:
    """One bucket on its way over one hop, or in one local step.

    Attributes:
        owner: what the bucket belongs to; the engine does not look inside.
        tag: which hop or step of it.
        path: its resources.
        nbytes: that every one of them serves.
        alpha_s: that the first of them takes beside.
        left: resources that have not ended yet.
        dead: it was cancelled; what it occupies runs out.
    """

    __slots__ = ("alpha_s", "dead", "left", "nbytes", "owner", "path", "tag")

    def __init__(self, owner: Any, tag: int, path: Path, nbytes: int, alpha_s: float = 0.0) -> None:
        self.owner = owner
        self.tag = tag
        self.path = path
        self.nbytes = nbytes
        self.alpha_s = alpha_s
        self.left = len(path)
        self.dead = False


Done = Callable[[Job, float], None]
"""Told of every job that has ended, with the time in seconds."""


class Resource:
    """What happened to one resource.

    Attributes:
        name: for reports.
        kind: ``nic``, ``nvlink``, ``pcie``, ``hbm``, ``host``, ``send``, ``core`` or ``link``.
        rate: bytes per second.
        node: index of the node that it is a part of; -1 for a link between nodes.
        busy_s, nbytes, services: what it did.
        spans: busy times as [begin, end, busy seconds], close ones merged.
    """

    __slots__ = ("busy_s", "kind", "name", "nbytes", "node", "rate", "services", "spans")

    def __init__(self, name: str, kind: str, rate: float, node: int = -1) -> None:
        self.name = name
        self.kind = kind
        self.rate = rate
        self.node = node
        self.busy_s = 0.0
        self.nbytes = 0
        self.services = 0
        self.spans: list[list[float]] = []


_LOST = (Job(None, 0, (), 0), 0)
"""What a resource that has failed serves for ever."""


class Engine:
    """A clock, resources with queues, and what is under way.

    Args:
        resources: that jobs name by index.
        done: called for every job that ends; it may submit others.
        merge_s: idle time below which two busy times are one span; None keeps no spans, which is faster.
        jitter: each service takes its time times a number drawn evenly from ``1 - jitter`` to ``1 + jitter``.
        seed: of those draws.

    Attributes:
        resources: as given.
        now_s: the clock.
        busy_until_s: when the last service ended.
        num_events: so far.
    """

    def __init__(
        self,
        resources: list[Resource],
        done: Done,
        *,
        merge_s: float | None = None,
        jitter: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.resources = resources
        self.now_s = 0.0
        self.busy_until_s = 0.0
        self.num_events = 0
        self._done = done
        self._merge_s = merge_s
        self._jitter = jitter
        self._draw = random.Random(seed).random  # not for secrets: equal seeds must give equal runs
        self._heap: list[tuple[float, int, int]] = []
        self._timers: dict[int, Callable[[float], None]] = {}
        self._serving: list[tuple[Job, int] | None] = [None] * len(resources)
        self._queues: list[deque[tuple[Job, int]]] = [deque() for _ in resources]
        self._per_byte = [1.0 / r.rate for r in resources]
        self._busy = [0.0] * len(resources)
        self._nbytes = [0] * len(resources)
        self._services = [0] * len(resources)
        self._plain = merge_s is None and not jitter

    def at(self, time_s: float, call: Callable[[float], None]) -> None:
        """Call ``call`` with the time at ``time_s``."""
        self.num_events += 1
        self._timers[self.num_events] = call
        heappush(self._heap, (time_s, self.num_events, -1))

    def submit(self, job: Job) -> None:
        """Let a job queue for the first resource of its path, now. A job without a path ends at once."""
        if not job.path:
            self._done(job, self.now_s)
            return
        first = job.path[0]
        if self._serving[first] is None:
            self._begin(first, job, 0)
        else:
            self._queues[first].append((job, 0))

    def run(self) -> float:
        """Run until nothing is left, and return the time of the last event."""
        heap, serving, queues, done = self._heap, self._serving, self._queues, self._done
        while heap:
            now, number, r = heap[0]
            self.now_s = now
            if r < 0:
                heappop(heap)
                self._timers.pop(number)(now)
                continue
            entry = serving[r]
            if entry is None or entry is _LOST:
                heappop(heap)
                continue
            self.busy_until_s = now
            queue = queues[r]
            while queue:
                following = queue.popleft()
                if not following[0].dead:
                    self._follow(r, following)
                    break
            else:
                serving[r] = None
                heappop(heap)
            job = entry[0]
            job.left -= 1
            if not job.left and not job.dead:
                done(job, now)
        for i, resource in enumerate(self.resources):
            resource.busy_s += self._busy[i]
            resource.nbytes += self._nbytes[i]
            resource.services += self._services[i]
        return self.now_s

    def _follow(self, r: int, entry: tuple[Job, int]) -> None:
        """Serve what was next in a queue; its event takes the place of the one that has just come, the heap's first."""
        job, position = entry
        seconds = self._seconds(r, job, position)
        self._serving[r] = entry
        self.num_events += 1
        heapreplace(self._heap, (self.now_s + seconds, self.num_events, r))
        position += 1
        path = job.path
        if position < len(path):
            r = path[position]
            if self._serving[r] is None:
                self._begin(r, job, position)
            else:
                self._queues[r].append((job, position))

    def _begin(self, r: int, job: Job, position: int) -> None:
        """Serve a job at ``r``, which is idle, and let it queue for what follows; go on as long as that is idle."""
        path, now = job.path, self.now_s
        while True:
            seconds = self._seconds(r, job, position)
            self._serving[r] = (job, position)
            self.num_events += 1
            heappush(self._heap, (now + seconds, self.num_events, r))
            position += 1
            if position == len(path):
                return
            r = path[position]
            if self._serving[r] is not None:
                self._queues[r].append((job, position))
                return

    def _seconds(self, r: int, job: Job, position: int) -> float:
        """What a service takes; counted."""
        nbytes = job.nbytes
        seconds = nbytes * self._per_byte[r]
        if not position:
            seconds += job.alpha_s
        if not self._plain:
            seconds = self._noted(r, seconds)
        self._busy[r] += seconds
        self._nbytes[r] += nbytes
        self._services[r] += 1
        return seconds

    def _noted(self, r: int, seconds: float) -> float:
        """With jitter, and kept as a span."""
        if self._jitter:
            seconds *= 1.0 + self._jitter * (2.0 * self._draw() - 1.0)
        if self._merge_s is not None:
            now, spans = self.now_s, self.resources[r].spans
            if spans and now - spans[-1][1] <= self._merge_s:
                spans[-1][1] = now + seconds
                spans[-1][2] += seconds
            else:
                spans.append([now, now + seconds, seconds])
        return seconds

    def lose(self, lost: set[int]) -> None:
        """Resources that serve nothing any more. Cancel what waits for them first."""
        for end_s, _, r in self._heap:
            if r in lost and self._serving[r] is not _LOST:
                self._busy[r] -= end_s - self.now_s  # what it would have served from now on
        for r in lost:
            self._queues[r].clear()
            self._serving[r] = _LOST
            spans = self.resources[r].spans
            if spans and spans[-1][1] > self.now_s:
                spans[-1][2] -= spans[-1][1] - self.now_s
                spans[-1][1] = self.now_s

    def cancel(self, lost: Callable[[Job], bool]) -> list[Job]:
        """Cancel all jobs under way for which ``lost`` holds, and return them, each once, in a fixed order."""
        found = [job for job in self.under_way() if lost(job)]
        for job in found:
            job.dead = True
        return found

    def under_way(self) -> Iterator[Job]:
        """Jobs of owners that have begun or queue, each once, in a fixed order."""
        seen: set[int] = set()
        for entry, queue in zip(self._serving, self._queues, strict=True):
            for job, _ in [*([entry] if entry else []), *queue]:
                if not job.dead and job.owner is not None and id(job) not in seen:
                    seen.add(id(job))
                    yield job
