"""How the benchmark's trainer changes its weights."""

import itertools

import pytest
import torch

from wsync.bench import weights
from wsync.bench.trainer import NUM_CONTENTS, Trainer


@pytest.fixture
def trainer():
    made = Trainer.__new__(Trainer)
    made.model = torch.nn.Linear(300, 200, dtype=torch.bfloat16)
    made._content = 0
    return made


def test_every_element_differs_between_any_two_contents_and_stays_finite(trainer):
    contents = []
    for version in range(NUM_CONTENTS):
        trainer.set_version(version)
        contents.append(trainer.model.weight.detach().clone())
        assert torch.isfinite(contents[-1]).all()
    for left, right in itertools.combinations(contents, 2):
        assert (left != right).all()


def test_versions_with_equal_contents_are_bit_identical(trainer):
    trainer.set_version(4)
    first = trainer.model.weight.detach().clone()
    trainer.set_version(9)
    trainer.set_version(4 + NUM_CONTENTS)
    assert torch.equal(trainer.model.weight.detach().view(torch.int16), first.view(torch.int16))


def test_f32_masters_change_in_their_bf16_bits():
    values = torch.tensor([1.0, -3.5, 0.25])
    before = values.clone()
    weights._flip_bits(values, 0x8015)
    assert (values.to(torch.bfloat16) != before.to(torch.bfloat16)).all()
    weights._flip_bits(values, 0x8015)
    assert torch.equal(values, before)
