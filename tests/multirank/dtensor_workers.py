"""Trainer processes whose parameters are DTensors of several placements."""

from __future__ import annotations

import torch

import wsync

SHAPES = {"plain": (300, 224), "wide": (130, 544), "stack": (3, 200, 160), "norm": (77,)}


def full_tensors(version: int) -> dict[str, torch.Tensor]:
    """The whole model, the same on every rank."""
    g = torch.Generator().manual_seed(version)
    return {name: torch.randn(shape, generator=g) * 10 ** (version - 1) for name, shape in SHAPES.items()}


def _distribute(full, layout, world_size):
    """DTensors of ``full``: FSDP2's uneven shards, or tensor parallel first and FSDP2 on top."""
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    module = nn.Module()
    if layout == "fsdp":
        mesh = init_device_mesh("cpu", (world_size,))
        for name, t in full.items():
            module.register_parameter(name, nn.Parameter(t.clone()))
    else:
        mesh2 = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("dp", "tp"))
        for name, t in full.items():
            dim = 1 if name == "wide" else 0
            module.register_parameter(name, nn.Parameter(distribute_tensor(t.clone(), mesh2["tp"], [Shard(dim)])))
        mesh = mesh2["dp"]
    fully_shard(module, mesh=mesh)
    return module


def published(version: int, dtype: str) -> dict[str, torch.Tensor]:
    """The whole model as recipes see it: f32 masters rounded to bf16, others as they are."""
    to = torch.bfloat16 if dtype == "float32" else getattr(torch, dtype)
    return {name: t.to(to) for name, t in full_tensors(version).items()}


def trainer(report, rank, world_size, layout, dtype, store, key_file, init_file, transport):
    """Publishes versions 1 and 2."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=world_size)
    to = getattr(torch, dtype)
    model = _distribute({n: t.to(to) for n, t in full_tensors(1).items()}, layout, world_size)
    with wsync.Source(model, store=store, key_file=key_file, transport=transport) as source:
        source.publish(1, deadline_s=60).wait_committed()
        fresh = _distribute({n: t.to(to) for n, t in full_tensors(2).items()}, layout, world_size)
        with torch.no_grad():
            for mine, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
                mine.to_local().copy_(theirs.to_local())
        result = source.publish(2, deadline_s=60).wait_committed()
    dist.destroy_process_group()
    return result.wire_bytes


def training_loop(report, rank, world_size, store, key_file, folder):
    """Two AdamW steps of FSDP2 with f32 masters and bf16 compute; publishes and saves the masters after each."""
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 70), nn.ReLU(), nn.Linear(70, 5))
    mesh = init_device_mesh("cpu", (world_size,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with wsync.Source(model, store=store, key_file=key_file) as source:
        for step in (1, 2):
            loss = model(torch.randn(8, 33)).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            publication = source.publish(step, deadline_s=60)
            publication.wait_released()
            masters = {name: p.full_tensor() for name, p in model.named_parameters()}
            if rank == 0:
                torch.save(masters, f"{folder}/masters{step}.pt")
            publication.wait_committed()
    dist.destroy_process_group()
