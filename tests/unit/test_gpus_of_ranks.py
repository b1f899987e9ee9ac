"""Which GPU a rank says that it uses, and where it keeps what is synced. There is none here: torch says otherwise."""

import pytest
import torch

import wsync.api.sink
from wsync import Sink, new_key_file
from wsync.adapters.gpus import on_its_gpu
from wsync.adapters.trainers import describe, description
from wsync.spec.manifest import DEVICE, HOST, RankInfo

INFO = RankInfo("h", 7)


@pytest.fixture
def cuda(monkeypatch):
    """Say what torch and the environment say of CUDA."""

    def say(device=None, visible=None, count=8):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: device is not None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: device)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return say


def found():
    info = on_its_gpu(INFO, in_host=True)
    return info.gpu, info.memory


@pytest.mark.parametrize(
    ("device", "visible", "gpu"),
    [
        (0, None, 0),
        (5, None, 5),
        (0, "4", 4),
        (1, "4,5,6,7", 5),
        (2, " 0, 2 ,6", 6),
        (1, "3,-1,5", None),
        (1, "4", None),  # torch and the environment disagree: changed since CUDA was begun
        (0, "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", None),
        (1, "2,MIG-GPU-8932f937", None),
        (0, "2,MIG-GPU-8932f937", 2),
        (0, "\u0664", None),
    ],
)
def test_the_gpu_in_use_is_counted_as_the_machine_counts(cuda, device, visible, gpu):
    cuda(device, visible)
    assert found() == (gpu, HOST)


def test_a_process_that_uses_no_gpu_says_nothing(cuda):
    cuda()
    assert on_its_gpu(INFO, in_host=True) is INFO
    for visible in ("", "-1", "4,5"):
        cuda(visible=visible, count=0 if visible in ("", "-1") else 2)
        assert on_its_gpu(INFO, in_host=True) is INFO


def test_a_process_that_is_given_one_gpu_will_use_that(cuda):
    cuda(visible="6", count=1)
    assert found() == (6, HOST)
    cuda(visible="6", count=0)
    assert on_its_gpu(INFO, in_host=True) is INFO


def test_asking_does_not_begin_to_use_cuda(cuda, monkeypatch):
    cuda(visible="6", count=1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("this would begin to use CUDA"))
    assert found() == (6, HOST)


def test_a_gpu_that_is_said_stays_and_memory_is_that_of_the_tensors(cuda):
    cuda(1)
    assert on_its_gpu(RankInfo("h", gpu=3), in_host=False) == RankInfo("h", gpu=3, memory=DEVICE)
    assert on_its_gpu(INFO, in_host=False) == RankInfo("h", 7, gpu=1)


def test_a_trainer_rank_beside_a_gpu_is_offloaded_where_its_tensors_are_on_the_cpu(cuda):
    def info_of(tensors):
        return describe(tensors, rank=0, world_size=1, info=INFO).manifest.info

    weights = {"w": torch.ones(4, 4)}
    cuda()
    assert info_of(weights) == INFO
    cuda(2)
    assert info_of(weights) == RankInfo("h", 7, gpu=2, memory=HOST)
    assert info_of({"w": torch.ones(0, 4)}) == RankInfo("h", 7, gpu=2)


def test_a_few_bytes_on_the_cpu_are_no_weights_in_host_memory():
    weights, steps = torch.ones(4, 4, device="meta"), torch.ones(2)
    assert not description._is_in_host([weights, steps])
    assert description._is_in_host([weights, steps, torch.ones(8, 8)])


def test_an_engine_rank_beside_a_gpu_keeps_what_it_receives_in_host_memory(cuda, tmp_path, monkeypatch):
    class Told(Exception):
        pass

    def session(*_, info, **__):
        raise Told(info)

    monkeypatch.setattr(wsync.api.sink, "SinkSession", session)
    cuda(3)
    key_file = tmp_path / "key"
    new_key_file(key_file)
    with pytest.raises(Told) as told:
        Sink({"w": torch.ones(4, 4)}, store="tcp://127.0.0.1:1", key_file=key_file)
    (info,) = told.value.args
    assert (info.gpu, info.memory) == (3, HOST)
