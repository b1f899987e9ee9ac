"""vLLM's layers: how each comes to hold a version, and that it then computes what a freshly loaded one does."""

from __future__ import annotations

import gc

import pytest
from torch import nn
from vllm_lab import HIDDEN, NATIVE, REPACKED, check_published, discard, laboratory, linear, needs_vllm

from wsync.errors import StateError

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def lab():
    yield from laboratory()


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
