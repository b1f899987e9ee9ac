"""Machine code of the CUDA kernels as text: functions, basic blocks, and the way that a loop takes when all is well.

Read with NVIDIA's ``cuobjdump``. Nothing here needs a GPU.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from wsync.errors import ConfigError

_LINE = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"0x([0-9a-f]+)")
_ARGUMENT = re.compile(r"(\d+)E(?=L|$)")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its address in the function, the opcode with its suffixes, the operands."""

    address: int
    opcode: str
    operands: str
    predicated: bool

    @property
    def base(self) -> str:
        """The opcode without suffixes."""
        return self.opcode.split(".")[0]


@dataclass
class Block:
    """Instructions without a branch in between, and the blocks that may follow."""

    code: list[Instruction]
    after: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Resources:
    """What one kernel takes: registers of a thread, and bytes."""

    registers: int
    stack: int
    shared: int
    local: int


def cuobjdump() -> str:
    """Path of NVIDIA's ``cuobjdump``: on PATH, of the package nvidia-cuda-cuobjdump, or the one in Triton.

    Raises:
        ConfigError: there is none.
    """
    if found := shutil.which("cuobjdump"):
        return found
    for package, inside in (("nvidia", "cu13/bin/cuobjdump"), ("triton", "backends/nvidia/bin/cuobjdump")):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            if (path := Path(root) / inside).exists():
                return str(path)
    raise ConfigError(
        "cuobjdump is neither on PATH nor in the packages nvidia-cuda-cuobjdump and triton",
        hint="pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm",
    )


def _ask(*arguments: str) -> str:
    done = subprocess.run([cuobjdump(), *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(f"cuobjdump {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout


def kernel_name(symbol: str) -> str:
    """A readable name of a mangled kernel, such as ``pack_rows_kernel<1,6>``."""
    length = re.search(r"cuda(\d+)", symbol)
    if length is None:
        return symbol
    begin = length.end()
    name = symbol[begin : begin + int(length.group(1))]
    rest = symbol[begin + int(length.group(1)) :]
    if name.startswith("_GLOBAL__N_"):  # an anonymous namespace, whose name changes with each build
        return kernel_name(f"cuda{rest}")
    if not rest.startswith("I"):
        return name
    listed = re.match(r"I((?:L(?:NS0_\d+[A-Za-z]+E|[a-z])\d+E)+)E", rest)
    return f"{name}<{','.join(_ARGUMENT.findall(listed.group(1)))}>" if listed else name


def resources(library: Path, arch: str) -> dict[str, Resources]:
    """Resources of every kernel of ``library`` for ``arch`` (such as ``sm_90a``)."""
    found: dict[str, Resources] = {}
    symbol = ""
    for line in _ask("--dump-resource-usage", "-arch", arch, str(library)).splitlines():
        if line.strip().startswith("Function"):
            symbol = line.split()[1].rstrip(":")
        elif match := _RESOURCES.search(line):
            found[kernel_name(symbol)] = Resources(*(int(value) for value in match.groups()))
    return found


def functions(library: Path, arch: str) -> dict[str, list[Instruction]]:
    """Instructions of every kernel of ``library`` for ``arch``."""
    found: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in _ask("-sass", "-arch", arch, str(library)).splitlines():
        if "Function :" in line:
            code = found.setdefault(kernel_name(line.split(":")[1].strip()), [])
        elif match := _LINE.match(line):
            address, opcode, operands = match.groups()
            code.append(Instruction(int(address, 16), opcode, operands, "@" in line.split(";")[0]))
    return found


def blocks_of(code: list[Instruction]) -> dict[int, Block]:
    """Basic blocks by the address of their first instruction."""
    leaders = {code[0].address} if code else set()
    for here, behind in pairwise(code):
        if here.base in ("BRA", "EXIT", "RET", "BRX", "CALL"):
            leaders.add(behind.address)
        if here.base in ("BRA", "BSSY", "CALL") and (target := _TARGET.search(here.operands)):
            leaders.add(int(target.group(1), 16))
    blocks: dict[int, Block] = {}
    for instruction in code:
        if instruction.address in leaders:
            blocks[instruction.address] = block = Block([])
        block.code.append(instruction)
    starts = sorted(blocks)
    for start, following in zip(starts, [*starts[1:], -1], strict=True):
        blocks[start].after = _successors(blocks[start].code[-1], following)
    return blocks


def _successors(last: Instruction, following: int) -> list[int]:
    target = _TARGET.search(last.operands)
    falls_through = last.base not in ("EXIT", "RET", "BRX") and not (last.base == "BRA" and not _conditional(last))
    after = [following] if (falls_through or last.predicated) and following >= 0 else []
    if last.base == "BRA" and target:
        after.append(int(target.group(1), 16))
    return after


def _conditional(branch: Instruction) -> bool:
    """Whether a BRA may fall through: predicated, or with a condition among its operands (``BRA P0, ...``)."""
    return branch.predicated or bool(re.search(r"\b!?U?P[0-9]\b", branch.operands)) or ".DIV" in branch.opcode


def hot_loop(
    blocks: dict[int, Block],
    payload: Callable[[Instruction], bool],
    needed: Callable[[Instruction], bool],
    cold: Callable[[Instruction], bool],
) -> list[Instruction]:
    """The instructions of one turn of the loop that moves the payload, on the cheapest way that does all its work.

    The loop is the smallest one with the most ``payload`` instructions. Its way is the one that never passes a ``cold``
    instruction, has the most ``payload`` and then ``needed`` ones, and among those the fewest instructions; loops
    inside it take one turn, but those that only load (what a row beyond the registers needs) take none.

    Raises:
        ConfigError: no loop has a payload.
    """
    warm = {start for start, block in blocks.items() if not any(cold(i) for i in block.code)}
    worth = {s: (sum(map(payload, b.code)), sum(map(needed, b.code)), -len(b.code)) for s, b in blocks.items()}
    best: tuple[tuple[int, int], list[int]] = ((0, 0), [])
    for tail in sorted(warm):
        for head in blocks[tail].after:
            if head > tail or head not in warm:
                continue
            way = _best_way(blocks, _body(blocks, warm, head, tail), head, tail, worth)
            found = (sum(worth[s][0] for s in way), -len(way))
            if found > best[0]:
                best = (found, way)
    if best[0][0] == 0:
        raise ConfigError("no loop of this kernel has a payload")
    way = best[1]
    skipped = _load_loops(blocks, warm, way, payload)
    return [instruction for start in way if start not in skipped for instruction in blocks[start].code]


def _load_loops(
    blocks: dict[int, Block], warm: set[int], way: list[int], payload: Callable[[Instruction], bool]
) -> set[int]:
    """Blocks of loops inside the way that load a payload and store none, if the way stores some."""

    def moved(starts: set[int]) -> set[str]:
        return {i.base for start in starts for i in blocks[start].code if payload(i)}

    found: set[int] = set()
    for tail in way[:-1] if "STG" in moved(set(way)) else []:
        for head in blocks[tail].after:
            if way[0] < head <= tail and head in way and moved(inner := _body(blocks, warm, head, tail)) == {"LDG"}:
                found |= inner
    return found


def _body(blocks: dict[int, Block], warm: set[int], head: int, tail: int) -> set[int]:
    """Blocks of the loop: those from which the tail is reached without passing the head."""
    before: dict[int, list[int]] = {}
    for start in warm:
        for to in blocks[start].after:
            before.setdefault(to, []).append(start)
    body, queue = {head, tail}, [tail] if tail != head else []
    while queue:
        for start in before.get(queue.pop(), []):
            if start not in body:
                body.add(start)
                queue.append(start)
    return body


def _best_way(
    blocks: dict[int, Block], body: set[int], head: int, tail: int, worth: dict[int, tuple[int, int, int]]
) -> list[int]:
    """Blocks from head to tail with the most worth, each at most once."""
    order = _topological(blocks, body, head)
    gained: dict[int, tuple[tuple[int, int, int], list[int]]] = {head: (worth[head], [head])}
    for start in order:
        if start not in gained:
            continue
        so_far, way = gained[start]
        for to in blocks[start].after:
            if to not in body or order[to] <= order[start]:
                continue
            more = worth[to]
            total = (so_far[0] + more[0], so_far[1] + more[1], so_far[2] + more[2])
            if to not in gained or total > gained[to][0]:
                gained[to] = (total, [*way, to])
    return gained[tail][1] if tail in gained else []


def _topological(blocks: dict[int, Block], body: set[int], head: int) -> dict[int, int]:
    """Positions of the loop's blocks so that every edge but those that close a loop goes forward; in that order."""
    finished: list[int] = []
    seen = {head}
    stack = [(head, iter(blocks[head].after))]
    while stack:
        start, rest = stack[-1]
        to = next((t for t in rest if t in body and t not in seen), None)
        if to is None:
            finished.append(start)
            stack.pop()
        else:
            seen.add(to)
            stack.append((to, iter(blocks[to].after)))
    return {start: position for position, start in enumerate(reversed(finished))}
