"""What trainer ranks agree on through torch.distributed, where the trainer uses it. CPU tensors only; no pickle."""

from __future__ import annotations

from collections.abc import Callable

from wsync.errors import TransportError


def ranks_meet(rank: int, world_size: int) -> bool:
    """Whether torch.distributed's default group has exactly these ranks, so that they can agree on something."""
    if world_size < 2:
        return False
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return False
    return dist.get_rank() == rank and dist.get_world_size() == world_size


def agree(rank: int, world_size: int, do: Callable[[], None], why: str) -> None:
    """Do something on all ranks, or raise on all of them: none goes on without the others. A collective.

    Raises:
        TransportError: another rank could not; ``why`` is the message. What ``do`` raises is raised here.
    """
    if not ranks_meet(rank, world_size):
        return do()
    try:
        do()
    except BaseException:
        all_succeeded(False)
        raise
    if not all_succeeded(True):
        raise TransportError(why)


def all_succeeded(ok: bool) -> bool:
    """Whether every rank did. A collective; where the group takes no CPU tensors every rank knows of itself alone."""
    import torch
    import torch.distributed as dist

    flag = torch.tensor([int(ok)], dtype=torch.int32)
    try:
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    except RuntimeError as e:
        if "No backend type associated with device type" in str(e):
            return ok
        raise
    return bool(flag.item())


def gather_masks(mask: list[bool], world_size: int) -> list[list[bool]]:
    """Every rank's mask, by rank. A collective."""
    import torch
    import torch.distributed as dist

    mine = torch.tensor(mask, dtype=torch.uint8)
    masks = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(masks, mine)
    return [[bool(x) for x in m.tolist()] for m in masks]
