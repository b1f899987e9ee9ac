"""vLLM goes on between and during versions: no traces on it, and what it changed is noticed."""

from __future__ import annotations

import threading
import types

import pytest
import torch
from torch import nn
from vllm_lab import (
    HIDDEN,
    NATIVE,
    REPACKED,
    check_published,
    discard,
    graph,
    laboratory,
    linear,
    linear_of,
    needs_vllm,
)

from wsync.errors import StateError

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def lab():
    yield from laboratory()


@pytest.mark.parametrize("method", ["Method", *REPACKED, *HIDDEN, *NATIVE, "Restless"])
def test_neither_recording_nor_preparing_leaves_a_trace_on_the_engine(lab, method):
    if method == "Restless":
        served = lab.Served(lambda: lab.Model(proj=restless(lab)))
    else:
        served = lab.Served(linear(lab, method, bias=True))
    before = graph(served.model)
    served.record()
    assert graph(served.model) == before
    served.stage(served.version(2))
    discard(served)
    assert graph(served.model) == before


def restless(lab):
    """A layer whose post-processing writes to whatever it can reach."""

    class Restless(lab.Transposes):
        def __init__(self):
            self.kernel = lab.Kernel()
            self.kernel.steps = [0]
            self.kernel.table = torch.zeros(3)
            self.kernel.names = {"a"}
            self.kernel.owner = self
            self.kernel.slotted = lab.Slotted()
            self.kernel.slotted.packed = torch.zeros(2)
            self.kernel.far = [{"a": [types.SimpleNamespace(table=torch.zeros(2))]}]
            self.calls = 0

        def process_weights_after_loading(self, layer):
            super().process_weights_after_loading(layer)
            self.calls += 1
            self.kernel.owner.last = layer
            self.kernel.steps.append(len(self.kernel.steps))
            self.kernel.table.add_(1)
            self.kernel.slotted.packed.add_(1)
            self.kernel.far[0]["a"][0].table.add_(1)
            self.kernel.names.add(f"b{len(self.kernel.names)}")
            layer.options["workspace"].fill_(7)
            layer.options["seen"] = layer.options.get("seen", 0) + 1
            layer._already_called_process_weights_after_loading = True
            layer.weight.is_shuffled = True

    layer = lab.Linear(Restless(), bias=True)
    layer.options = {"workspace": torch.zeros(2)}
    return layer


@pytest.mark.parametrize("method", ["Method", "Transposes", "Permutes"])
def test_a_parameter_that_the_engine_replaced_is_noticed_with_both_addresses(lab, method):
    served = lab.Served(linear(lab, method))
    served.record()
    served.engine.live_tensors()
    old = served.model.proj.weight.data_ptr()
    served.model.proj.weight = nn.Parameter(served.model.proj.weight.clone(), requires_grad=False)
    new = served.model.proj.weight.data_ptr()
    with pytest.raises(StateError, match=rf"proj\.weight.* {old:#x} .*recorded.* {new:#x} ") as error:
        served.engine.live_tensors()
    assert old != new
    assert "create the Sink again" in error.value.hint


def test_a_kernel_that_the_engine_made_anew_is_noticed(lab):
    served = lab.Served(linear(lab, "InClosure"))
    served.record()
    packed = torch.ones(4, 6, dtype=lab.BF16)
    served.model.proj.run = lambda x: x @ packed
    with pytest.raises(StateError, match=r"proj\.run<packed> was at address 0x\w+ .* is at 0x\w+ now"):
        served.engine.live_tensors()


def test_a_buffer_that_is_no_weight_may_be_replaced(lab):
    def make():
        layer = nn.Module()
        layer.register_buffer("cos_sin_cache", torch.ones(4))
        return lab.Model(proj=lab.Linear(lab.Method()), rotary=layer)

    served = lab.Served(make)
    served.record()
    served.model.rotary.cos_sin_cache = served.model.rotary.cos_sin_cache.to(torch.float64)
    served.engine.live_tensors()


def test_a_sink_that_rejoins_records_again(lab):
    def make():
        return lab.Model(a=lab.Linear(lab.Method()), b=lab.Linear(lab.Transposes()), c=lab.Linear(lab.InNative()))

    served = lab.Served(make)
    first = served.record()
    check_published(lab, served, served.version(2))
    again = served.record()
    assert again.recording.copies == first.recording.copies
    assert again.recording.memory == first.recording.memory
    check_published(lab, served, served.version(3))


def test_recording_again_on_another_thread_is_refused(lab):
    served = lab.Served(linear(lab, "Transposes"))
    served.record()
    before = graph(served.model)
    raised = []

    def rejoin():
        try:
            served.record()
        except StateError as e:
            raised.append(str(e))

    thread = threading.Thread(target=rejoin)
    thread.start()
    thread.join()
    assert "recording belongs on the worker's thread" in raised[0]
    assert graph(served.model) == before


def test_preparing_in_the_background_leaves_vllms_current_configuration_to_the_engine(lab):
    from vllm.config import set_current_vllm_config
    from vllm.config.vllm import get_current_vllm_config_or_none

    seen = []

    class Looks(lab.Transposes):
        def process_weights_after_loading(self, layer):
            super().process_weights_after_loading(layer)
            seen.append(get_current_vllm_config_or_none())

    served = lab.Served(linear_of(lab, Looks))
    served.record()
    state = served.version(2)
    started, finished = threading.Event(), threading.Event()

    class Waits:
        def __call__(self):
            started.set()
            finished.wait(5)
            served.stage(state)

    mine = lab.config()
    thread = threading.Thread(target=Waits())
    with set_current_vllm_config(mine):
        thread.start()
        started.wait(5)
        finished.set()
        thread.join()
        assert get_current_vllm_config_or_none() is mine
    assert seen[-1] is mine, "nobody but the engine sets it"
    assert get_current_vllm_config_or_none() is None
    served.commit(state)
    assert torch.equal(served.model.proj.weight, state["proj.weight"].t())


def test_layers_can_be_prepared_while_the_engine_computes(lab):
    served = lab.Served(linear(lab, "InNative"))
    served.record()
    expected = lab.outputs(served.model)
    stop, failed = threading.Event(), []

    def stage():
        try:
            for seed in range(40):
                served.stage(served.version(seed))
        except Exception as e:
            failed.append(e)
        finally:
            stop.set()

    thread = threading.Thread(target=stage)
    thread.start()
    while not stop.is_set():
        assert lab.same(lab.outputs(served.model), expected)
    thread.join()
    assert not failed
