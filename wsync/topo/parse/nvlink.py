"""``nvidia-smi nvlink -s``, ``-R``, ``-e``, ``-ec``, ``-c``: links one by one, and the error counters."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from msgspec.structs import replace

from wsync.topo.model import Gap, Gpu, Machine, NvLink, Oddity
from wsync.topo.parse.text import MAX_DEVICES, MAX_WORDS_CHARS, bus_id, numbers
from wsync.topo.platforms import profile_of_product

_GPU = re.compile(r"\s*GPU\s+(\d{1,4}):([^(\n]*)(?:\(UUID:?\s*([^)\s]*).*)?$")
_LINK = re.compile(r"\s*Link\s+(\d{1,3})\s*[:,]\s*(.*)$")
_RATE = re.compile(r"(\d{1,6}(?:\.\d+)?)\s*GB/s")
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
    disagree: bool = False


def looks_like_nvlink(text: str) -> bool:
    """Whether a GPU is followed by its links or by the word that it has none."""
    lines = text.splitlines()
    has_gpu = any(_GPU.match(line) for line in lines)
    return has_gpu and any(_LINK.match(line) or _NONE.search(line) for line in lines)


def parse_nvlink(text: str, source: str) -> tuple[Machine, ...]:
    """Read a listing, or several of hosts whose GPUs have other UUIDs, each as a machine of its own.

    Inactive links are listed, too: a last GPU with fewer lines than it should have was cut off. Of a link that is
    listed twice the worse state counts, and an `Oddity` says so.
    """
    parts = _split([line for line in text.splitlines() if len(line) <= MAX_WORDS_CHARS])
    found = [_parse_listing(lines, source) for lines in parts]
    if len(found) == 1:
        return (found[0],)
    return tuple(replace(m, host=f"{source} listing {i}") for i, m in enumerate(found, 1))


def _split(lines: list[str]) -> list[list[str]]:
    """Lines of each host."""
    parts: list[list[str]] = [[]]
    uuids: dict[str, str] = {}
    for line in lines:
        gpu = _GPU.match(line)
        if gpu is not None and gpu[3] and uuids.setdefault(gpu[1], gpu[3]) != gpu[3]:
            parts.append([])
            uuids = {gpu[1]: gpu[3]}
        parts[-1].append(line)
    return parts


def _parse_listing(lines: list[str], source: str) -> Machine:
    listings: dict[int, _Listing] = {}
    now: _Listing | None = None
    for line in lines:
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
    return Machine(
        gpus=tuple(_gpu(g, cut and g is last) for g in found),
        gaps=tuple(gaps),
        oddities=tuple(
            Oddity("sources-disagree", f"GPU{g.index}", f"{source} shows links of GPU{g.index} up and down", source)
            for g in found
            if g.disagree
        ),
        sources=(source,),
    )


def _read_line(listing: _Listing, line: str) -> None:
    if _NONE.search(line):
        listing.none_active = True
        return
    found = _LINK.match(line)
    if found is None:
        return
    index, rest = int(found[1]), found[2].rstrip()
    known = listing.links.get(index, NvLink(index))
    was_active = known.active
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
    now = listing.links.get(index)
    if now is not None and was_active is not None and now.active is not was_active:
        listing.disagree = True
        listing.links[index] = NvLink(index, False, None, now.remote, now.errors)


def _gpu(listing: _Listing, cut: bool) -> Gpu:
    links: tuple[NvLink, ...] | None = tuple(listing.links[i] for i in sorted(listing.links))
    if listing.none_active and links and any(x.active for x in links):
        links, listing.disagree = (), True
    if not links and not listing.none_active:
        links = None
    return Gpu(listing.index, shown=not cut, name=listing.name or None, nvlinks=links, nvlinks_cut=cut)
