"""Tensors of vLLM's layers that are shared, derived or left alone, and weights that the trainer lacks."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn
from vllm_lab import check_published, laboratory, linear, needs_vllm

from wsync.errors import MissingTensorError, RecordError

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def lab():
    yield from laboratory()


TIED = [
    ("Permutes", "Method"),
    ("Permutes", None),
    ("Method", "Permutes"),
    (None, "Permutes"),
    ("Method", "InKeeping"),
    (None, "InKeeping"),
    ("InKeeping", "InKeeping"),
    ("InKeeping", None),
    ("Method", "Method"),
    (None, None),
]


def tied(lab, first, second):
    """Builds models of two layers that have one parameter."""

    class InKeeping(lab.InKernel):
        """As vLLM's lm_head on a CPU: a packed copy, and the parameter stays for the embedding."""

        def process_weights_after_loading(self, layer):
            self.kernel.packed = layer.weight.t().contiguous()

    def method(name):
        return {"InKeeping": InKeeping}.get(name) or (getattr(lab, name) if name else None)

    def make():
        embed, head = (lab.Linear(method(n)() if n else lab.Method()) for n in (first, second))
        for layer, name in ((embed, first), (head, second)):
            if name is None:
                layer.quant_method = None
                layer.forward = lambda x, layer=layer: nn.functional.linear(x, layer.weight)
        head.weight = embed.weight
        return lab.Model(embed=embed, head=head)

    return make


@pytest.mark.parametrize(("first", "second"), TIED)
def test_tied_embeddings_are_right_in_both_places_and_change_only_at_the_commit(lab, first, second):
    served = lab.Served(tied(lab, first, second))
    assert list(served.state) == ["embed.weight"]
    served.record()
    before, computed = lab.held(served.model), lab.outputs(served.model)
    served.stage(served.version(2))
    assert lab.same(lab.held(served.model), before)
    assert lab.same(lab.outputs(served.model), computed)
    served.commit(served.version(2))
    assert served.model.head.weight is served.model.embed.weight
    assert lab.same(lab.held(served.model), lab.held(served.fresh(served.version(2))))
    assert lab.same(lab.outputs(served.model), lab.outputs(served.fresh(served.version(2))))


@pytest.mark.parametrize(("first", "second"), [("Permutes", "Permutes"), ("InKeeping", "Permutes")])
def test_two_layers_that_both_repack_one_parameter_are_refused(lab, first, second):
    served = lab.Served(tied(lab, first, second))
    with pytest.raises(RecordError, match=r"'head\.weight' is 'embed\.weight', too"):
        served.record()


def test_a_correction_bias_of_gate_and_experts_changes_at_the_commit_and_expert_maps_never(lab):
    def make():
        gate = lab.Linear(lab.Method())
        gate.e_score_correction_bias = nn.Parameter(torch.empty(2), requires_grad=False)
        return lab.Model(gate=gate, experts=lab.Experts(lab.ExpertsMethod(), gate.e_score_correction_bias))

    served = lab.Served(make)
    served.record()
    model = served.model
    model.experts._expert_map.copy_(torch.tensor([0, 1]))  # experts are rearranged after the recording
    before = lab.held(model)
    served.stage(served.version(2))
    assert lab.same(lab.held(model), before)
    model.experts._expert_map.copy_(torch.tensor([-1, 0]))
    served.commit(served.version(2))
    fresh = lab.held(served.fresh(served.version(2)))
    assert torch.equal(model.gate.e_score_correction_bias, fresh["gate.e_score_correction_bias"])
    assert model.experts.e_score_correction_bias is model.gate.e_score_correction_bias
    assert torch.equal(model.experts.w13_weight, fresh["experts.w13_weight"])
    assert model.experts._expert_map.tolist() == [-1, 0]


def test_expert_maps_are_followed_as_the_engine_has_them(lab):
    """Made-up indices would reach behind the weights."""

    class Sorts(lab.ExpertsMethod):
        def process_weights_after_loading(self, layer):
            order = layer._expert_map.long()
            assert sorted(order.tolist()) == [0, 1]
            layer.w13_weight.data = layer.w13_weight.data[order].contiguous()

    served = lab.Served(lambda: lab.Model(experts=lab.Experts(Sorts())))
    assert served.record().roads["repacked"] == 2 * 6 * 4 * 2
    check_published(lab, served, served.version(2))


def test_a_buffer_that_the_trainer_fills_follows_it_through_a_repacked_layer(lab):
    class Scales(lab.Transposes):
        def process_weights_after_loading(self, layer):
            super().process_weights_after_loading(layer)
            layer.scale.mul_(2)

        def apply(self, layer, x, bias=None):
            return super().apply(layer, x) * layer.scale

    def make():
        layer = lab.Linear(Scales())
        layer.register_buffer("scale", torch.ones(6, dtype=lab.BF16))
        return lab.Model(proj=layer)

    served = lab.Served(make)
    served.state["proj.scale"] = torch.ones(6, dtype=lab.BF16)
    served.record()
    state = {**served.version(2), "proj.scale": torch.arange(6).to(lab.BF16)}
    check_published(lab, served, state)


def test_a_view_of_a_parameter_in_a_buffer_follows_it(lab):
    def make():
        layer = lab.Linear(lab.Method())
        layer.register_buffer("flat", layer.weight.data.view(-1), persistent=False)
        return lab.Model(proj=layer)

    served = lab.Served(make)
    served.record()
    assert served.repacked == set()
    served.publish(served.version(2))
    assert torch.equal(served.model.proj.flat, served.version(2)["proj.weight"].view(-1))


@pytest.mark.parametrize("method", ["Method", "Transposes"])
def test_what_attention_derives_is_made_again_in_its_memory(lab, method):
    def make():
        derives = types.SimpleNamespace(weight=None)
        layer = lab.Linear(getattr(lab, method)())
        return lab.Model(proj=layer, attn=lab.Attention(layer)), derives

    served = lab.Served(lambda: make()[0])
    served.record()
    place = served.model.attn.W_UV.data_ptr()
    served.stage(served.version(2))
    served.commit(served.version(2))
    assert served.model.attn.W_UV.data_ptr() == place
    assert torch.equal(served.model.attn.W_UV, lab.held(served.fresh(served.version(2)))["attn.W_UV"])


def test_a_weight_that_attention_releases_comes_back_to_derive_from_only(lab):
    def make():
        layer = lab.Linear(lab.Method())
        return lab.Model(proj=layer, attn=lab.ReleasingAttention(layer))

    served = lab.Served(make)
    served.record()
    released, place = served.model.proj.weight, served.model.attn.W_UV.data_ptr()
    assert released.numel() == 0
    for seed in (2, 3):
        served.publish(served.version(seed))
        assert served.model.proj.weight is released
        assert served.model.attn.W_UV.data_ptr() == place
        assert torch.equal(served.model.attn.W_UV, lab.held(served.fresh(served.version(seed)))["attn.W_UV"])


def test_attention_whose_implementation_packs_for_itself_is_refreshed(lab):
    from vllm.v1.attention.backend import AttentionImplBase

    class Impl(AttentionImplBase):
        def __new__(cls, *args):
            return object.__new__(cls)

        def __init__(self, neighbour):
            self.neighbour = neighbour

        def process_weights_after_loading(self, act_dtype):
            self.packed = self.neighbour.weight.detach().clone()

    class Packs(lab.Attention):
        def __init__(self, neighbour):
            super().__init__(neighbour)
            self.impl = Impl(neighbour)

        def process_weights_after_loading(self, act_dtype):
            self.impl.process_weights_after_loading(act_dtype)

    def make():
        layer = lab.Linear(lab.Method())
        return lab.Model(proj=layer, attn=Packs(layer))

    served = lab.Served(make)
    served.record()
    served.publish(served.version(2))
    assert torch.equal(served.model.attn.impl.packed, served.version(2)["proj.weight"])


def test_layers_of_another_pipeline_stage_are_left_out(lab):
    def make():
        absent = lab.Linear(lab.Transposes())
        absent.weight = nn.Parameter(torch.empty(6, 4, device="meta"), requires_grad=False)
        return lab.Model(here=lab.Linear(lab.Transposes()), stage=nn.Identity(), absent=absent)

    served = lab.Served.__new__(lab.Served)
    model = make()
    first = {"here.weight": torch.rand(6, 4).to(lab.BF16)}
    lab.record_metadata_for_reloading(model)
    model.load_weights(first.items())
    model.here.quant_method.process_weights_after_loading(model.here)
    served.engine = lab.VLLMEngine(model, lab.config())
    served.state, served.allow_missing = first, ()
    assert list(served.engine.live_tensors()) == ["here.weight"]
    served.record()
    state = {"here.weight": torch.rand(6, 4).to(lab.BF16)}
    served.publish(state)
    assert torch.equal(model.here.weight, state["here.weight"].t())


def test_a_layer_that_was_made_after_loading_is_refused_by_name(lab):
    served = lab.Served(linear(lab, "Transposes"))
    served.model.late = lab.Linear(lab.Transposes())
    with pytest.raises(RecordError, match=r"no record of how 'late' \(Linear\) is loaded"):
        served.record()


def test_a_model_that_post_processes_itself_as_a_whole_is_refused(lab):
    class Derives(lab.Model):
        def process_weights_after_loading(self):
            self.derived = self.proj.weight.sum()

    class DoesNothing(lab.Model):
        def process_weights_after_loading(self):
            pass

    with pytest.raises(RecordError, match="Derives post-processes itself as a whole"):
        lab.Served(lambda: Derives(proj=lab.Linear(lab.Method()))).record()
    lab.Served(lambda: DoesNothing(proj=lab.Linear(lab.Method()))).record()


@pytest.mark.parametrize("method", ["Transposes", "Method", "InClosure"])
def test_a_weight_that_the_trainer_lacks_is_named(lab, method):
    def make():
        return lab.Model(a=lab.Linear(lab.Method()), b=lab.Linear(getattr(lab, method)()))

    served = lab.Served(make, without=("b.weight",))
    with pytest.raises(MissingTensorError, match=r"b\.weight"):
        served.record()


def test_what_may_be_missing_keeps_the_engines_value_where_it_is_held_as_loaded(lab):
    served = lab.Served(linear(lab, "InKernel", bias=True), without=("proj.bias",), allow_missing=("proj.bias",))
    served.record()
    check_published(lab, served, served.version(2))
    assert torch.equal(served.model.proj.bias, served.first["proj.bias"])


def test_what_is_repacked_cannot_be_missing(lab):
    served = lab.Served(linear(lab, "Permutes", bias=True), without=("proj.weight",), allow_missing=("proj.weight",))
    with pytest.raises(MissingTensorError, match=r"fills 'proj\.weight' of the repacked 'proj'"):
        served.record()
