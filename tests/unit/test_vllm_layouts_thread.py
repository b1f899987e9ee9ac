"""What only the engine's thread can post-process in vLLM's layers, and what an error half way leaves."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from vllm_lab import check_published, laboratory, linear_of, needs_vllm

from wsync.errors import StateError

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def lab():
    yield from laboratory()


class OnlyTheLayerItself:
    """Mixed into a method: what it is given must be the layer that it was made for."""

    def process_weights_after_loading(self, layer):
        self.seen = getattr(self, "seen", None) or id(layer)
        if self.seen != id(layer):
            raise RuntimeError("not the layer that I know")
        super().process_weights_after_loading(layer)


@pytest.mark.parametrize("method", ["Transposes", "Quantises", "InClosure", "InNativeOfMethod"])
def test_post_processing_that_fails_on_a_copy_runs_on_the_layer_itself(lab, method):
    known = type("Known", (OnlyTheLayerItself, getattr(lab, method)), {})
    served = lab.Served(lambda: lab.Model(proj=lab.Linear(known())))
    assert served.record().roads == {"in_place": 0, "repacked": 0, "reloaded": 48}
    places, before, computed = lab.addresses(served.model), lab.held(served.model), lab.outputs(served.model)
    served.stage(served.version(2))
    assert lab.same(lab.held(served.model), before)
    assert lab.same(lab.outputs(served.model), computed)
    served.commit(served.version(2))
    assert lab.same(lab.held(served.model), lab.held(served.fresh(served.version(2))))
    check_published(lab, served, served.version(3))
    assert lab.addresses(served.model) == places


@pytest.mark.parametrize("where", ["number", "memory", "dtype"])
def test_what_cannot_be_put_in_place_from_outside_is_made_on_the_engines_thread(lab, where):
    class Makes(lab.Method):
        def process_weights_after_loading(self, layer):
            if where == "number":
                layer.peak = float(layer.weight.abs().max())
            if where == "memory":
                layer.copied = layer.weight.data.clone().untyped_storage()
            if where == "dtype":
                layer.made_in = torch.get_default_dtype()

        def apply(self, layer, x, bias=None):
            if where == "memory":
                weight = torch.empty(0, dtype=lab.BF16).set_(layer.copied, 0, layer.weight.shape)
                return nn.functional.linear(x, weight)
            found = nn.functional.linear(x, layer.weight)
            return found * layer.peak if where == "number" else found.to(layer.made_in)

    served = lab.Served(lambda: lab.Model(proj=lab.Linear(Makes())))
    assert served.record().roads["reloaded"] == 48
    state = served.version(2)
    torch.set_default_dtype(lab.BF16)  # as vLLM does while it loads
    try:
        fresh = served.fresh(state)
    finally:
        torch.set_default_dtype(torch.float32)
    served.publish(state)
    assert torch.get_default_dtype() == torch.float32
    assert lab.same(lab.outputs(served.model), lab.outputs(fresh))


def test_an_error_half_way_leaves_the_layer_as_it_was(lab):
    class Fails(OnlyTheLayerItself, lab.InKernel):
        fails = False

        def process_weights_after_loading(self, layer):
            super().process_weights_after_loading(layer)
            layer.flag = "half way"
            if self.fails:
                raise RuntimeError("no memory")

    served = lab.Served(lambda: lab.Model(proj=lab.Linear(Fails(), bias=True)))
    served.record()
    layer = served.model.proj
    before, places, computed = lab.held(served.model), lab.addresses(served.model), lab.outputs(served.model)
    attributes, kernel = dict(vars(layer)), dict(vars(layer.quant_method.kernel))
    served.stage(served.version(2))
    Fails.fails = True
    (repack,) = served.recorded.last_steps.repacks
    with pytest.raises(RuntimeError, match="no memory"):
        repack.commit()
    assert lab.same(lab.held(served.model), before)
    assert lab.addresses(served.model) == places
    assert lab.same(lab.outputs(served.model), computed)
    assert all(vars(layer)[k] is v for k, v in attributes.items())
    assert vars(layer.quant_method.kernel) == kernel


def test_preparing_says_when_post_processing_makes_another_shape_than_before(lab):
    class Changes(lab.Transposes):
        pads = False

        def process_weights_after_loading(self, layer):
            super().process_weights_after_loading(layer)
            if self.pads:
                lab.Pads().process_weights_after_loading(layer)

    served = lab.Served(linear_of(lab, Changes))
    served.record()
    before = lab.held(served.model)
    Changes.pads = True
    with pytest.raises(StateError, match=r"of 'proj' made 'weight' \(\(4, 10\), torch.bfloat16\).*\(4, 6\)"):
        served.stage(served.version(2))
    assert lab.same(lab.held(served.model), before)
