"""Boxes of real DTensors on four gloo processes: every box holds what the full tensor holds there, none is missing."""

import ctypes
import math
import os
import tempfile
import traceback

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from wsync.adapters.trainers import describe
from wsync.errors import ConfigError, ManifestError, StateError
from wsync.spec.manifest import RankInfo, merge_source

pytestmark = pytest.mark.multiproc

WORLD = 4


def numbered(*shape):
    return torch.arange(math.prod(shape), dtype=torch.float32).view(shape)


def describe_here(source):
    return describe(source, rank=dist.get_rank(), world_size=WORLD, info=RankInfo("host", os.getpid()))


def read(memory):
    """A box, read through its address and strides."""
    shape, strides = memory.box.shape, tuple(4 * s for s in memory.strides)
    span = 4 * (1 + sum((n - 1) * s for n, s in zip(shape, memory.strides, strict=True)))
    raw = (ctypes.c_char * span).from_address(memory.address)
    return np.lib.stride_tricks.as_strided(np.frombuffer(raw, np.float32), shape, strides)


def check(tensors, full, copies=None):
    """Compare every box with the full tensors, and count how many ranks hold each element."""
    d = describe_here(tensors)
    parts = [None] * WORLD
    dist.all_gather_object(parts, d.manifest)
    merged = merge_source(parts)
    for i, spec in enumerate(merged.tensors):
        expected = full[spec.name].numpy()
        assert spec.shape == expected.shape
        if spec.alias_of is not None:
            continue
        holders = np.zeros(expected.shape, int)
        for boxes in merged.shards[i]:
            for box in boxes:
                holders[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))] += 1
        assert (holders == copies).all() if copies else holders.min(initial=1) >= 1, (spec, holders)
        for held in d.memory[i]:
            where = tuple(slice(o, o + n) for o, n in zip(held.box.offset, held.box.shape, strict=True))
            np.testing.assert_array_equal(read(held), expected[where], err_msg=spec.name)
    d.check_addresses()
    return d


def uneven_and_empty_shards(mesh_of):
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = mesh_of(4)
    for shape, dim in [
        ((8, 3), 0),
        ((10, 3), 0),
        ((5, 3), 0),
        ((3, 6), 0),
        ((1,), 0),
        ((3, 7), 1),
        ((2, 5, 6), 2),
        ((0, 4), 0),
    ]:
        full = numbered(*shape)
        check({"w": distribute_tensor(full, mesh, [Shard(dim)])}, {"w": full}, copies=1)


def meshes_of_two_dimensions(mesh_of):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = mesh_of(2, 2)
    for placements, copies in [
        ([Shard(0), Shard(1)], 1),
        ([Shard(1), Shard(0)], 1),
        ([Shard(0), Shard(0)], 1),
        ([Replicate(), Shard(0)], 2),
        ([Shard(2), Replicate()], 2),
        ([Replicate(), Replicate()], 4),
        ([Shard(-1), Shard(0)], 1),
    ]:
        full = numbered(7, 6, 5)
        d = distribute_tensor(full, mesh, placements)
        assert torch.equal(d.full_tensor(), full)
        check({"w": d}, {"w": full}, copies=copies)


def strided_shards(mesh_of):
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    rank = dist.get_rank()
    full = numbered(24, 3)
    # A fused q|k|v, each sharded for itself: three intervals on every rank.
    pieces = full.view(3, 4, 2, 3)[:, rank].reshape(6, 3).clone()
    d = DTensor.from_local(
        pieces, mesh_of(4), [_StridedShard(0, split_factor=3)], run_check=False, shape=(24, 3), stride=(3, 1)
    )
    assert len(check({"w": d}, {"w": full}, copies=1).memory[0]) == 3
    # Two intervals in each of two dimensions.
    grid = numbered(8, 8)
    a, b = divmod(rank, 2)
    local = grid.view(2, 2, 2, 2, 2, 2)[:, a, :, :, b].reshape(4, 4).clone()
    placements = [_StridedShard(0, split_factor=2), _StridedShard(1, split_factor=2)]
    d = DTensor.from_local(local, mesh_of(2, 2), placements, run_check=False, shape=(8, 8), stride=(8, 1))
    assert len(check({"w": d}, {"w": grid}, copies=1).memory[0]) == 4
    # Read from left to right, the second axis splits what the first one left.
    order = [Shard(0), _StridedShard(0, split_factor=3)]
    mine = full.view(2, 3, 2, 2, 3)[a, :, b].reshape(6, 3).clone()
    d = DTensor.from_local(mine, mesh_of(2, 2), order, run_check=False, shape=(24, 3), stride=(3, 1))
    check({"w": d}, {"w": full}, copies=1)


class Block(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(numbered(*p.shape))

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def fully_sharded_modules(mesh_of):
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(Block(5, 7), Block(5, 3))
    model[1].down.bias = model[0].down.bias
    model.register_buffer("scale", numbered(3))
    full = {k: v.detach().clone() for k, v in model.state_dict().items()}
    # Tied parameters have to be in one group, here that of the root.
    fully_shard(model[0].up, mesh=mesh_of(4))
    fully_shard(model, mesh=mesh_of(4))
    d = check(model, full)
    assert next(t for t in d.manifest.tensors if t.name == "1.down.bias").alias_of == "0.down.bias"
    for name, p in model.named_parameters():
        assert torch.equal(p.full_tensor(), full[name])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    d.check_addresses()
    stepped = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}
    assert not torch.equal(stepped["0.up.weight"], full["0.up.weight"])
    check(model, stepped)
    check(model.state_dict(), stepped)
    model.unshard()
    d.check_addresses()
    with pytest.raises(StateError, match="holds gathered parameters"):
        describe_here(model)
    model.reshard()


def fully_sharded_over_tensor_parallel(mesh_of):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for inner in (8, 7, 5, 3, 1):
        mesh = mesh_of(2, 2, names=("dp", "tp"))
        model = Block(6, inner)
        full = {k: v.detach().clone() for k, v in model.state_dict().items()}
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        check(model, full)
        # With a part that is empty on a tensor-parallel rank, torch 2.13 cannot gather the tensor itself.
        for name, p in model.named_parameters() if inner > 1 else ():
            assert torch.equal(p.full_tensor(), full[name]), name


def hybrid_sharded_modules(mesh_of):
    from torch.distributed.fsdp import fully_shard

    model = Block(5, 7)
    full = {k: v.detach().clone() for k, v in model.state_dict().items()}
    fully_shard(model, mesh=mesh_of(2, 2, names=("replicate", "shard")))
    check(model, full, copies=2)


def plain_tensors_are_replicated(mesh_of):
    full = numbered(3, 4)
    check({"w": full.clone()}, {"w": full}, copies=WORLD)


def data_parallel_modules(mesh_of):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = Block(3, 4)
    full = {k: v.detach().clone() for k, v in model.state_dict().items()}
    check(nn.parallel.DistributedDataParallel(model), full, copies=WORLD)
    flat = FullyShardedDataParallel(Block(3, 4), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(ConfigError, match=r"the module '\(root\)' is sharded by FSDP1"):
        describe_here(flat)


def what_cannot_be_sent_is_refused(mesh_of):
    from torch.distributed.tensor import DTensor, Partial, Shard

    d = DTensor.from_local(torch.ones(2, 2), mesh_of(4), [Partial()], run_check=False)
    with pytest.raises(ConfigError, match="'w' has the placement Partial"):
        describe_here({"w": d})
    d = DTensor.from_local(torch.ones(2, 2), mesh_of(4), [Shard(0)], run_check=False, shape=(9, 2), stride=(2, 1))
    with pytest.raises(ManifestError, match=r"'w' holds a local tensor of shape \(2, 2\), but its placements say"):
        describe_here({"w": d})


CASES = [
    uneven_and_empty_shards,
    meshes_of_two_dimensions,
    strided_shards,
    fully_sharded_modules,
    fully_sharded_over_tensor_parallel,
    hybrid_sharded_modules,
    plain_tensors_are_replicated,
    data_parallel_modules,
    what_cannot_be_sent_is_refused,
]


def run_cases(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    meshes = {}

    def mesh_of(*shape, names=None):
        if (shape, names) not in meshes:
            meshes[shape, names] = init_device_mesh("cpu", shape, mesh_dim_names=names)
        return meshes[shape, names]

    for case in CASES:
        outcome = ""
        try:
            case(mesh_of)
        except BaseException:
            outcome = traceback.format_exc()
        with open(f"{folder}/{case.__name__}.{rank}", "w") as f:
            f.write(outcome)
        if outcome:
            os._exit(1)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes():
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        ranks = [context.Process(target=run_cases, args=(rank, folder)) for rank in range(WORLD)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(150)
            if process.is_alive():
                process.kill()
        found = {}
        for name in os.listdir(folder):
            if name != "store":
                with open(os.path.join(folder, name)) as f:
                    found[name] = f.read()
        yield found


@pytest.mark.parametrize("case", [c.__name__ for c in CASES])
def test_boxes_of_dtensors_hold_what_the_full_tensor_holds(case, outcomes):
    reports = [outcomes.get(f"{case}.{rank}", "did not finish") for rank in range(WORLD)]
    assert reports == [""] * WORLD, "\n".join(r for r in reports if r)
