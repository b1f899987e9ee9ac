"""``nvidia-smi nvlink -s``, ``-R``, ``-e``, ``-ec``, ``-c``: links one by one, and the error counters."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from wsync.topo.model import Gap, Gpu, Machine, NvLink
from wsync.topo.parse.text import MAX_DEVICES, MAX_WORDS_CHARS, bus_id, numbers
from wsync.topo.platforms import profile_of_product

_GPU = re.compile(r"\s*GPU\s+(\d{1,4}):([^(\n]*)(?:\(UUID.*)?$")
_LINK = re.compile(r"\s*Link\s+(\d{1,3})\s*[:,]\s*(.*)$")
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*GB/s")
_COUNTER = re.compile(r"([A-Za-z][\w /()-]*?)\s*:\s*(\d+)\s*$")
_NONE = re.compile(r"all links are in-?active", re.I)


@dataclass
class _Listing:
    """What has been read of one GPU."""

    index: int
    name: str
    links: dict[int, NvLink] = field(default_factory=dict)
    states: bool = False
    none_active: bool = False


def looks_like_nvlink(text: str) -> bool:
    """Whether a GPU is followed by its links or by the word that it has none."""
    lines = text.splitlines()
    has_gpu = any(_GPU.match(line) for line in lines)
    return has_gpu and any(_LINK.match(line) or _NONE.search(line) for line in lines)


def parse_nvlink(text: str, source: str) -> Machine:
    """Read a listing. Inactive links are listed, too: a last GPU with fewer lines than it should have was cut off."""
    listings: dict[int, _Listing] = {}
    now: _Listing | None = None
    for line in text.splitlines():
        if len(line) > MAX_WORDS_CHARS:
            continue
        gpu = _GPU.match(line)
        if gpu is not None and len(listings) <= MAX_DEVICES:
            now = listings.setdefault(int(gpu[1]), _Listing(int(gpu[1]), gpu[2].strip()))
        elif now is not None:
            _read_line(now, line)
    found = list(listings.values())
    most = max((len(g.links) for g in found if g.states), default=0)
    last = found[-1] if found else None
    cut = False
    if last is not None and last.states and all(x.active for x in last.links.values()):
        profile = profile_of_product(last.name)
        most = max(most, profile.links or 0 if profile is not None else 0)
        cut = len(last.links) < most
    gaps = []
    if cut and last is not None:
        absent = numbers(set(range(most)) - set(last.links))
        gaps.append(Gap(f"links {absent} of GPU{last.index} (the listing ends)", source))
    return Machine(gpus=tuple(_gpu(g, cut and g is last) for g in found), gaps=tuple(gaps), sources=(source,))


def _read_line(listing: _Listing, line: str) -> None:
    if _NONE.search(line):
        listing.none_active = True
        return
    found = _LINK.match(line)
    if found is None:
        return
    index, rest = int(found[1]), found[2].rstrip()
    known = listing.links.get(index, NvLink(index))
    rate, remote, counter = _RATE.match(rest), rest.startswith("Remote Device"), _COUNTER.fullmatch(rest)
    if rate is not None:
        listing.states = True
        listing.links[index] = NvLink(index, True, float(rate[1]), known.remote, known.errors)
    elif rest.lower().strip("<>") in ("inactive", "disabled"):
        listing.states = True
        listing.links[index] = NvLink(index, False, None, known.remote, known.errors)
    elif remote:
        # A link that has a remote end is trained; -R prints nothing else of it.
        listing.states = True
        listing.links[index] = NvLink(index, True, known.rate_gbps, bus_id(rest), known.errors)
    elif counter is not None:
        errors = {**known.errors, counter[1]: int(counter[2])}
        listing.links[index] = NvLink(index, known.active, known.rate_gbps, known.remote, errors)


def _gpu(listing: _Listing, cut: bool) -> Gpu:
    links: tuple[NvLink, ...] | None = tuple(listing.links[i] for i in sorted(listing.links))
    if not links and not listing.none_active:
        links = None
    return Gpu(listing.index, shown=not cut, name=listing.name or None, nvlinks=links, nvlinks_cut=cut)
