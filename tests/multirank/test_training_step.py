"""A real training loop: forward, backward and optimizer between publishes of the same Source."""

from __future__ import annotations

import dtensor_workers
import pytest
import torch

import wsync
from wsync.testing.processes import Processes, free_port

pytestmark = pytest.mark.multiproc


def test_each_step_of_an_fsdp2_trainer_arrives_as_the_bf16_rounding_of_its_masters(tmp_path):
    key_file = str(wsync.new_key_file(tmp_path / "wsync.key"))
    store = f"tcp://127.0.0.1:{free_port()}"
    shapes = {"0.weight": (70, 33), "0.bias": (70,), "2.weight": (5, 70), "2.bias": (5,)}
    live = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    with Processes() as processes:
        for rank in range(2):
            args = (rank, 2, store, key_file, str(tmp_path))
            processes.start(f"trainer/{rank}", dtensor_workers.training_loop, *args)
        taken = []
        with wsync.Sink(live, store=store, key_file=key_file, join_deadline_s=90) as sink:
            for _ in (1, 2):
                sink.commit(sink.prepare(60))
                taken.append({name: t.clone() for name, t in live.items()})
        for rank in range(2):
            outcome = processes.wait(f"trainer/{rank}")
            assert outcome.error is None, outcome.trace
    for step in (1, 2):
        masters = torch.load(tmp_path / f"masters{step}.pt")
        for name, full in masters.items():
            assert torch.equal(taken[step - 1][name], full.to(torch.bfloat16)), (step, name)
    assert not torch.equal(taken[0]["0.weight"], taken[1]["0.weight"])
