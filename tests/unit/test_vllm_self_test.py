"""The self-test of vLLM's layers: post-processing that is another one at the second call is found before it serves."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import nn
from vllm_lab import laboratory, needs_vllm

from wsync.errors import RecordError

pytestmark = needs_vllm

LOGGER = "wsync.adapters.engines.vllm"


@pytest.fixture(scope="module")
def lab():
    """Layers, models and engines; vLLM is imported when the first test asks."""
    yield from laboratory()


@pytest.fixture
def only_once(lab):
    """A method that post-processes in one way at its first call and in another one afterwards."""

    def method(first, later):
        class OnlyOnce(lab.Method):
            loaded = False

            def process_weights_after_loading(self, layer):
                way, self.loaded = (later if self.loaded else first), True
                way.process_weights_after_loading(self, layer)

            def apply(self, layer, x, bias=None):
                return first.apply(self, layer, x, bias)

        return OnlyOnce

    return method


def one_layer(lab, method, *, norm=True):
    """Builds models of one post-processed layer (square, so that shapes tell nothing), and one that stays as it is."""

    def make():
        layers = {"proj": lab.Linear(method(), out=4, size=4)}
        if norm:
            layers["norm"] = lab.Linear(None, out=1, size=4)
            layers["norm"].forward = lambda x: x
        return lab.Model(**layers)

    return make


def passed(caplog):
    """Layers that the self-test says it compared, or None where it says nothing."""
    found = [r.getMessage() for r in caplog.records if "self-test of layers" in r.getMessage()]
    return found[-1].rpartition(": ")[2] if found else None


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger=LOGGER)
    return caplog


@pytest.mark.parametrize(
    "method",
    ["Method", "Transposes", "Views", "Permutes", "Quantises", "Expands", "InClosure", "InKernel", "InNative"],
)
def test_one_layer_of_each_kind_is_compared_and_passes(lab, log, tmp_path, method):
    served = lab.Served(one_layer(lab, getattr(lab, method)), folder=tmp_path)
    before, computed = lab.held(served.model), lab.outputs(served.model)
    served.record()
    assert passed(log) == "proj"
    assert lab.same(lab.held(served.model), before)
    assert lab.same(lab.outputs(served.model), computed)


def test_experts_and_slow_layers_are_compared_too(lab, log, tmp_path):
    class Slow(lab.Transposes):
        def process_weights_after_loading(self, layer):
            super().process_weights_after_loading(layer)
            layer.peak = float(layer.weight.abs().max())

    def make():
        return lab.Model(
            experts=lab.Experts(lab.ExpertsMethod()), slow=lab.Linear(Slow()), plain=lab.Linear(None, out=2, size=2)
        )

    served = lab.Served(make, folder=tmp_path)
    before, peak = lab.held(served.model), served.model.slow.peak
    served.record()
    assert served.recorded.roads["reloaded"] == 48
    assert passed(log) == "experts, slow"
    assert lab.same(lab.held(served.model), before)
    assert served.model.slow.peak == peak


def test_a_layer_that_is_taken_for_unprocessed_is_named(lab, only_once, tmp_path):
    method = only_once(lab.Permutes, lab.Method)
    served = lab.Served(one_layer(lab, method), folder=tmp_path)
    before = lab.held(served.model)
    with pytest.raises(RecordError, match=r"serves other bytes in proj\.weight .* \(1 of") as error:
        served.record()
    assert "please report it" in error.value.hint
    assert lab.same(lab.held(served.model), before)


def test_a_layer_that_is_repacked_in_another_way_is_named(lab, only_once, tmp_path):
    class Also(lab.Permutes):
        def process_weights_after_loading(self, layer):
            lab.Permutes.process_weights_after_loading(self, layer)
            layer.weight.data = layer.weight.data.t().contiguous()

    served = lab.Served(one_layer(lab, only_once(lab.Permutes, Also)), folder=tmp_path)
    before = lab.held(served.model)
    with pytest.raises(RecordError, match=r"serves other bytes in proj\.weight "):
        served.record()
    assert lab.same(lab.held(served.model), before)


def test_a_slow_layer_that_is_made_in_another_way_is_named_and_serves_what_it_served(lab, only_once, tmp_path):
    class Slow(lab.Method):
        def process_weights_after_loading(self, layer):
            layer.peak = float(layer.weight.abs().max())

    class Permutes(lab.Permutes):
        def process_weights_after_loading(self, layer):
            lab.Permutes.process_weights_after_loading(self, layer)
            Slow.process_weights_after_loading(self, layer)

    served = lab.Served(one_layer(lab, only_once(Permutes, Slow)), folder=tmp_path)
    before, computed, attributes = lab.held(served.model), lab.outputs(served.model), dict(vars(served.model.proj))
    with pytest.raises(RecordError, match=r"serves other bytes in proj\.weight "):
        served.record()
    assert lab.same(lab.held(served.model), before)
    assert lab.same(lab.outputs(served.model), computed)
    assert vars(served.model.proj) == attributes


@pytest.mark.parametrize("hidden", ["InKernel", "InClosure", "InNativeOfMethod"])
def test_a_copy_that_a_kernel_makes_of_its_weights_only_once_is_found_without_a_checkpoint(lab, only_once, hidden):
    """Registered bytes say nothing here: they stay as they are loaded, and no kernel reads them."""

    class Keeps(getattr(lab, hidden)):
        def process_weights_after_loading(self, layer):
            weight = layer.weight
            super().process_weights_after_loading(layer)
            layer.weight = weight

    def process(self, layer):
        if not getattr(self, "loaded", False):
            Keeps.process_weights_after_loading(self, layer)
            self.loaded = True

    once = type("Once", (Keeps,), {"process_weights_after_loading": process})
    served = lab.Served(one_layer(lab, once))
    computed = lab.outputs(served.model)
    with pytest.raises(RecordError, match=r"the kernel of 'proj' \(Linear\) computes the same for any weights"):
        served.record()
    assert lab.same(lab.outputs(served.model), computed)


def test_a_native_matrix_that_is_made_in_another_way_is_found_by_what_it_computes(lab, only_once, tmp_path):
    class Other(lab.InNative):
        def process_weights_after_loading(self, layer):
            native = lab.Native(layer.weight.t() * 2)
            layer.run = lambda x: native.run(x)
            lab.empty(layer)

    served = lab.Served(one_layer(lab, only_once(lab.InNative, Other)), folder=tmp_path)
    with pytest.raises(RecordError, match=r"other bytes in proj\.\.run<native> than"):
        served.record()


def test_a_failed_self_test_is_made_again_when_the_sink_joins_again(lab, only_once, tmp_path):
    served = lab.Served(one_layer(lab, only_once(lab.Permutes, lab.Method)), folder=tmp_path)
    for _ in range(2):
        with pytest.raises(RecordError, match=r"serves other bytes in proj\.weight "):
            served.record()


def test_an_engine_that_serves_another_version_is_not_tested_and_says_so(lab, log, tmp_path):
    served = lab.Served(one_layer(lab, lab.Transposes), folder=tmp_path)
    with torch.no_grad():
        served.model.norm.weight.add_(1)
    served.record()
    (warning,) = [r for r in log.records if r.levelno == logging.WARNING]
    assert "does not serve the checkpoint that it was started from (norm.weight differs)" in warning.getMessage()
    assert passed(log) == "none"


def test_after_a_version_was_committed_there_is_no_second_self_test(lab, log, tmp_path):
    served = lab.Served(one_layer(lab, lab.Transposes), folder=tmp_path)
    served.record()
    served.publish(served.version(2))
    log.clear()
    served.record()
    assert passed(log) is None
    assert not [r for r in log.records if r.levelno == logging.WARNING]


def test_scratch_memory_is_no_witness_of_what_the_engine_serves(lab, log, tmp_path):
    """All but one of a kind are no samples; their scratch memory holds nothing of the checkpoint."""

    def make():
        return lab.Model(**{f"proj{i}": lab.Linear(lab.Transposes()) for i in range(4)}, norm=lab.Linear(None))

    lab.Served(make, folder=tmp_path).record()
    assert passed(log) == "proj0"


def test_a_model_of_nothing_but_repacked_layers_is_tested(lab, log, tmp_path):
    lab.Served(one_layer(lab, lab.Transposes, norm=False), folder=tmp_path).record()
    assert passed(log) == "proj"


def test_a_layer_that_the_checkpoint_lacks_is_passed_over(lab, log, tmp_path):
    served = lab.Served(one_layer(lab, lab.Transposes), folder=tmp_path)
    lab.save_file({"norm.weight": served.first["norm.weight"]}, tmp_path / "model.safetensors")
    served.record()
    assert passed(log) == "none"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_that_the_engine_holds_in_a_wider_dtype_are_compared(lab, log, tmp_path, dtype):
    def make():
        layer = lab.Linear(lab.Transposes(), bias=True)
        layer.bias = nn.Parameter(torch.empty(6), requires_grad=False)
        layer.forward = lambda x: layer.quant_method.apply(layer, x)
        return lab.Model(proj=layer)

    served = lab.Served(make)
    first = {n: t.to(lab.BF16) for n, t in served.first.items()}
    lab.save_file(first, tmp_path / "model.safetensors")
    served = lab.Served(make, folder="")
    served.model = lab.load(make(), first)
    served.engine = lab.VLLMEngine(served.model, lab.config(tmp_path))
    served.first = served.state = {n: t.to(dtype if n == "proj.bias" else lab.BF16) for n, t in first.items()}
    served.record()
    assert passed(log) == "proj"


def test_a_checkpoint_of_several_files_is_read_by_its_index(lab, log, tmp_path):
    served = lab.Served(one_layer(lab, lab.Transposes))
    files = {"proj.weight": "model-1.safetensors", "norm.weight": "model-2.safetensors"}
    for name, file in files.items():
        lab.save_file({name: served.first[name]}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    served.engine = lab.VLLMEngine(served.model, lab.config(tmp_path))
    served.record()
    assert passed(log) == "proj"


@pytest.mark.parametrize("load_format", ["dummy", "sharded_state"])
def test_an_engine_that_was_not_loaded_from_a_checkpoint_is_not_tested(lab, log, tmp_path, load_format):
    served = lab.Served(one_layer(lab, lab.Transposes), folder=tmp_path)
    served.engine._vllm_config.load_config.load_format = load_format
    served.record()
    assert passed(log) is None
