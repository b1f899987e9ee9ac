"""Whatever the layout: every element is held, and every element of engine memory is written exactly once."""

from __future__ import annotations

import math

import numpy as np
import pytest
from describe_checks import memory
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from msgspec import structs

from wsync.describe import ModelShape, describe_sink, describe_source, engine_ranks, trainer_ranks
from wsync.describe.models.decoder import decoder_tensors
from wsync.describe.models.facts import read_facts
from wsync.errors import ConfigError
from wsync.spec.manifest import SourceRankManifest, merge_source

SIZES = {
    "vocab_size": 83,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "moe_intermediate_size": 24,
}
MLA = {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 5, "qk_rope_head_dim": 2, "v_head_dim": 3}
ROUTED = {"n_routed_experts": 12, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 4}
FAMILIES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2},
    "qwen3_moe": {"num_experts": 12},
    "deepseek_v3": {**MLA, **ROUTED},
    "glm_moe_dsa": {**MLA, **ROUTED, "index_n_heads": 4, "index_head_dim": 8},
    "glm4_moe": {**ROUTED, "attention_bias": True, "use_qk_norm": True},
    "gpt_oss": {"num_local_experts": 12},
    "qwen3_5_moe_text": {
        "num_experts": 12,
        "shared_expert_intermediate_size": 24,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 3,
        "linear_value_head_dim": 5,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 2,
    },
}


def model_of(family):
    facts = read_facts({**SIZES, **FAMILIES[family], "model_type": family}, family)
    return ModelShape(family, decoder_tensors(facts), "a test", facts)


MODELS = {family: model_of(family) for family in FAMILIES}
DEGREE = st.sampled_from([1, 1, 2, 3, 4])


@st.composite
def trainer_layouts(draw):
    kind = draw(st.sampled_from(["fsdp", "megatron", "zero3"]))
    if kind == "zero3":
        return f"zero3={draw(st.integers(1, 9))},replicate={draw(st.integers(1, 2))}"
    if kind == "fsdp":
        pairs = {"fsdp": draw(st.integers(1, 9)), "replicate": draw(st.sampled_from([1, 1, 2]))}
        pairs |= {"tp": draw(st.sampled_from([1, 2, 4, 5])), "pp": draw(st.sampled_from([1, 1, 2, 3]))}
        if draw(st.booleans()):
            pairs |= {"ep": draw(DEGREE), "etp": draw(st.sampled_from([1, 1, 2]))}
        return ",".join(f"{k}={v}" for k, v in pairs.items())
    pairs = {"tp": draw(DEGREE), "pp": draw(st.sampled_from([1, 1, 5])), "ep": draw(DEGREE), "dp": draw(DEGREE)}
    if draw(st.booleans()):
        pairs |= {"etp": draw(DEGREE), "cp": draw(st.integers(1, 2)), "vocab_multiple": draw(st.integers(1, 16))}
    if pairs["pp"] == 5 and draw(st.booleans()):
        pairs |= {"pp": 3, "pp_first": 1, "pp_last": 2}
    return ",".join(f"{k}={v}" for k, v in pairs.items())


@given(st.sampled_from(sorted(MODELS)), trainer_layouts())
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_every_element_is_held_and_different_boxes_are_disjoint(family, layout):
    model = MODELS[family]
    try:
        source = describe_source(model, layout, ["h"] * trainer_ranks(layout))
    except ConfigError:
        assume(False)
    for tensor, shards in zip(source.tensors, source.shards, strict=True):
        count = np.zeros(tensor.shape, int)
        for box in {box for boxes in shards for box in boxes}:
            count[tuple(slice(o, e) for o, e in zip(box.offset, box.end, strict=True))] += 1
        assert (count == (0 if tensor.alias_of else 1)).all(), tensor.name
        for boxes in shards:
            assert all(box.num_elements for box in boxes)
            assert len(set(boxes)) == len(boxes)
    parts = [
        SourceRankManifest(r, len(source.ranks), info, source.tensors, tuple(s[r] for s in source.shards))
        for r, info in enumerate(source.ranks)
    ]
    assert merge_source(parts) == source


@st.composite
def engine_layouts(draw):
    tp, dp, pp = draw(st.sampled_from([1, 1, 2, 4, 8])), draw(st.sampled_from([1, 1, 2, 3])), draw(DEGREE)
    ep = draw(st.sampled_from([1, tp, dp, tp * dp]))
    pairs = {"tp": tp, "dp": dp, "pp": pp, "ep": ep, "replicas": draw(st.integers(1, 2))}
    layout = ",".join(f"{k}={v}" for k, v in pairs.items())
    return layout + (",placement=round_robin" if ep > 1 and draw(st.booleans()) else "")


@given(st.sampled_from(sorted(MODELS)), engine_layouts(), st.sampled_from(["bf16", "fp8_channel", "fp8_tensor"]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_every_element_of_engine_memory_is_written_once_and_a_replica_takes_everything(family, layout, recipe):
    model = MODELS[family]
    try:
        sink = describe_sink(model, layout, ["h"] * engine_ranks(layout), recipe)
    except ConfigError:
        assume(False)
    replica = [rank for rank in sink.ranks if rank.replica == "engine-0"]
    tensors = [t for t in model.tensors if t.alias_of is None]
    recipes = {name: r for rank in replica for name, r in rank.recipes.items()}
    assert recipes.keys() == {t.name for t in tensors}
    taken = set()
    for rank in replica:
        found = memory(structs.replace(rank, recipes=recipes), tensors)
        for name, (_, held) in found.items():
            is_vocabulary = "embed" in name or "lm_head" in name
            written = held >= 0
            assert written.all() or is_vocabulary, name
            assert (np.diff(written.astype(int)) <= 0).all(), name  # padding is at the end
            taken.update(held[written].tolist())
    assert len(taken) == max(taken) + 1  # every element of every part


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_all_replicas_share_what_the_same_rank_of_each_has(family):
    sink = describe_sink(MODELS[family], "ep=4,replicas=3", ["h"] * 12, "bf16")
    assert len({id(rank.copies) for rank in sink.ranks}) == 4
    for rank in sink.ranks:
        first = sink.ranks[rank.rank]
        assert rank.copies is first.copies
        assert rank.storages is first.storages
        assert rank.recipes is first.recipes
    assert [rank.replica for rank in sink.ranks] == [f"engine-{i // 4}" for i in range(12)]


def test_tensors_that_are_laid_out_alike_share_their_shards():
    source = describe_source(MODELS["deepseek_v3"], "fsdp=4,tp=2", ["h"] * 8)
    assert len({id(s) for s in source.shards}) == len(set(source.shards))


# ---- layouts that do not fit


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("pp=2", "give the first and last stage another number with pp_first and pp_last"),
        ("pp=4,pp_first=5", "choose another pp_first than pp_first=5, or give pp_last, too"),
        ("pp=4,pp_last=1", "choose another pp_last than pp_last=1, or give pp_first, too"),
        ("pp=3,pp_first=3,pp_last=2", "choose pp_first=3 and pp_last=2 so that the stages between them"),
    ],
)
def test_the_hint_about_layers_of_stages_is_not_what_was_done_already(layout, said):
    with pytest.raises(ConfigError) as caught:
        describe_source(MODELS["qwen3_moe"], layout, ["h"] * trainer_ranks(layout))
    assert said in caught.value.hint


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("", "has the part '', which is not key=value"),
        ("tp", "has the part 'tp', which is not key=value"),
        ("tp=2,tp=4", "says tp twice: 2 and 4"),
        ("fspd=2", "unknown key 'fspd': FSDP2 has fsdp,"),
        ("fsdp=2,vpp=2", "unknown key 'vpp'; known are fsdp"),
        ("tp=0", "has tp=0, allowed are whole numbers from 1"),
        ("tp=-2", "has tp=-2"),
        ("tp=2.0", "has tp=2.0"),
        ("tp=99999999", "has tp=99999999"),
        ("tp=16", "number of heads is 8, which tp=16 does not divide"),
        ("tp=3", "number of heads is 8, which tp=3 does not divide"),
        ("pp=2", "5 layers, of which 5 do not divide over 2 equal pipeline stages"),
        ("pp=7,pp_first=1", "5 layers, of which 4 do not divide over 6"),
        ("pp=3,pp_first=3,pp_last=2", "5 layers, of which 0 do not divide over 1"),
        ("pp=2,pp_first=3,pp_last=3", "5 layers, but pp_first=3, pp_last=3 and pp=2"),
        ("ep=5,dp=5", "number of experts is 12, which ep=5 does not divide"),
        ("ep=4,dp=2", "a stage's number of ranks is 2, which ep \\* etp=4 does not divide"),
        ("fsdp=2,ep=4", "fsdp \\* tp is 2, which ep \\* etp=4 does not divide"),
        ("fsdp=10,ep=5", "number of experts is 12, which ep=5 does not divide"),
        ("fsdp=2,etp=2", "has etp=2, but no ep"),
        ("fsdp=2,pp=9", "5 layers, which are too few for pp=9"),
        ("fsdp=2,experts=some", "has experts=some, allowed are separate, stacked"),
    ],
)
def test_a_trainer_layout_that_does_not_fit_is_refused_with_both_values(layout, said):
    with pytest.raises(ConfigError, match=said):
        describe_source(MODELS["qwen3_moe"], layout, ["h"] * trainer_ranks(layout))


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("", "has the part '', which is not key=value"),
        ("fsdp=2", "unknown key 'fsdp'; known are tp, dp"),
        ("tp=3", "number of attention heads is 8, which tp=3 does not divide|vocabulary of .* is 128, which tp=3"),
        ("tp=2,ep=3", "tp \\* dp is 2, which ep=3 does not divide"),
        ("ep=16", "has ep=16, but qwen3_moe has 12 experts"),
        ("pp=6", "5 layers, which are too few for pp=6"),
        ("placement=round_robin", "has a placement of experts, but ep=1"),
        ("ep=2,placement=round_robin", "several groups of experts, but qwen3_moe has 1"),
        ("ep=2,placement=random", "has placement=random, allowed are linear, round_robin"),
    ],
)
def test_an_engine_layout_that_does_not_fit_is_refused_with_both_values(layout, said):
    with pytest.raises(ConfigError, match=said):
        describe_sink(MODELS["qwen3_moe"], layout, ["h"] * engine_ranks(layout), "bf16")


def test_a_world_of_another_size_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"has 8 ranks \(pp \* replicate \* fsdp \* tp\), but 7 hosts"):
        describe_source(MODELS["llama"], "fsdp=4,tp=2", ["h"] * 7)
    with pytest.raises(ConfigError, match=r"has 4 ranks \(replicas \* tp \* dp \* pp\), but 0 hosts"):
        describe_sink(MODELS["llama"], "tp=4", [], "bf16")
    with pytest.raises(ConfigError, match="the world size is 6, which tp \\* cp \\* pp=4 does not divide"):
        describe_source(MODELS["llama"], "tp=4", ["h"] * 6)


def test_every_dimension_is_counted():
    """The checks above would pass on empty models."""
    assert all(len(m.tensors) > 40 and math.prod(m.tensors[0].shape) == 83 * 32 for m in MODELS.values())
