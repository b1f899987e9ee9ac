"""The transformers engine and the recording of its loader, on tiny models that are made here."""

import numpy as np
import pytest
import torch

from wsync.adapters.engines import record_loader, verify_recording
from wsync.adapters.trainers import describe
from wsync.errors import ConfigError, DtypeMismatchError, ShapeMismatchError, StateError, UnknownTensorError
from wsync.spec.manifest import RankInfo, TensorSpec
from wsync.spec.recipes import recipe_parts

transformers = pytest.importorskip("transformers")

from wsync.adapters.engines.transformers import TransformersEngine  # noqa: E402

SMALL = {
    "vocab_size": 150,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
WIDE = SMALL | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 128, "num_hidden_layers": 1}

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama_biased": lambda: transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=4),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, tie_word_embeddings=False),
    "qwen3_tied": lambda: transformers.Qwen3Config(**SMALL, head_dim=32, tie_word_embeddings=True),
    "qwen3_one_kv_head": lambda: transformers.Qwen3Config(**{**SMALL, "num_key_value_heads": 1}, head_dim=16),
}
WIDE_CONFIGS = {
    "qwen2": lambda: transformers.Qwen2Config(
        **{k: v for k, v in WIDE.items() if k != "head_dim"} | {"num_attention_heads": 2}
    ),
    "qwen3": lambda: transformers.Qwen3Config(**WIDE, tie_word_embeddings=True),
}


def plain_model(config, dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            # Norms and biases that are all ones or zeros would hide a wrong layout.
            p.copy_(torch.randn(p.shape) * 0.05 + (1 if p.dim() == 1 else 0))
    return model


def name_table(model):
    return describe(model, rank=0, world_size=1, info=RankInfo("host")).manifest.tensors


def bits(tensor):
    return (
        tensor.detach()
        .contiguous()
        .view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])
        .numpy()
    )


def executed(recording, checkpoint):
    """Clones of the storages after constants and copies, by NumPy."""
    found = [bits(recording.storage_view(i)).copy() for i in range(len(recording.storages))]

    def place(storage_idx, offset, shape, strides):
        flat = found[storage_idx]
        return np.lib.stride_tricks.as_strided(flat[offset:], shape, [s * flat.itemsize for s in strides])

    for c in recording.constants:
        place(c.storage_idx, c.dst_offset, c.shape, c.dst_strides)[...] = bits(c.value.expand(c.shape))
    for c in recording.copies:
        box = tuple(slice(o, o + n) for o, n in zip(c.box.offset, c.box.shape, strict=True))
        place(c.storage_idx, c.dst_offset, c.box.shape, c.dst_strides)[...] = bits(checkpoint[c.tensor, c.role])[box]
    return found


def random_checkpoint(table, recipes):
    g = torch.Generator().manual_seed(1)
    found = {}
    for spec in table:
        for part in recipe_parts(spec.name, spec.shape, spec.dtype, recipes[spec.name]):
            value = torch.randn(part.shape, generator=g).to(getattr(torch, part.dtype))
            found[part.name] = found[spec.name, part.role] = value
    return found


def check_recording(engine, table):
    """Record, check that nothing live changed, load for real, compare every live byte with the replayed copies."""
    live = engine.live_tensors()
    with torch.no_grad():
        for t in live.values():
            t.copy_(torch.randn(t.shape))
    before = {n: bits(t).copy() for n, t in live.items()}
    recording = record_loader(engine.load_weights, table, live, engine.recipe_for)
    for n, t in live.items():
        np.testing.assert_array_equal(bits(t), before[n])
    checkpoint = random_checkpoint(table, recording.offered)
    replayed = executed(recording, checkpoint)
    engine.load_weights((n, t) for n, t in checkpoint.items() if isinstance(n, str))
    names = set()
    for i, covered in enumerate(recording.coverage.storages):
        np.testing.assert_array_equal(replayed[i], bits(recording.storage_view(i)), err_msg=covered.names[0])
        names.update(covered.names)
    assert names == set(live)
    assert recording.coverage.complete
    assert recording.coverage.missing == recording.coverage.not_loaded == ()
    assert recording.coverage.unused == (("lm_head.weight",) if engine.tied else ())
    return recording


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_are_those_of_the_plain_model(name, dtype):
    config = CONFIGS[name]()
    model = plain_model(config, dtype)
    engine = TransformersEngine(config, dtype=dtype)
    engine.load_weights(model.state_dict().items())
    ids = torch.randint(0, config.vocab_size, (2, 9))
    with torch.no_grad():
        expected = model(ids).logits
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(engine(ids), expected, atol=tolerance, rtol=tolerance)


def test_greedy_generation_is_that_of_the_plain_model():
    config = CONFIGS["qwen3_tied"]()
    model = plain_model(config, torch.float32)
    engine = TransformersEngine(config, dtype=torch.float32)
    engine.load_weights(model.state_dict().items())
    ids = torch.randint(0, config.vocab_size, (1, 5))
    ours = engine.generate_greedy(ids, 6)
    assert ours.shape == (1, 11)
    theirs = ids
    with torch.no_grad():
        for _ in range(6):
            theirs = torch.cat([theirs, model(theirs).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(ours, theirs)


def test_parameters_are_fused_sharded_padded_and_tied_as_in_an_engine():
    engine = TransformersEngine(CONFIGS["qwen3_tied"](), tp_rank=1, tp_size=2)
    live = engine.live_tensors()
    shapes = {n.removeprefix("model.layers.0."): tuple(t.shape) for n, t in live.items() if "layers.1" not in n}
    assert shapes == {
        "model.embed_tokens.weight": (96, 64),
        "self_attn.qkv_proj.weight": (2 * 32 + 32 + 32, 64),
        "self_attn.o_proj.weight": (64, 64),
        "self_attn.q_norm.weight": (32,),
        "self_attn.k_norm.weight": (32,),
        "mlp.gate_up_proj.weight": (96, 64),
        "mlp.down_proj.weight": (64, 48),
        "input_layernorm.weight": (64,),
        "post_attention_layernorm.weight": (64,),
        "model.norm.weight": (64,),
        "lm_head.weight": (96, 64),
    }
    assert live["lm_head.weight"].data_ptr() == live["model.embed_tokens.weight"].data_ptr()
    assert len(dict(engine.named_parameters())) == len(live) - 1


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_the_recorded_copies_do_what_the_loader_does(name, tp_size):
    config = CONFIGS[name]()
    table = name_table(plain_model(config))
    for tp_rank in range(tp_size):
        recording = check_recording(TransformersEngine(config, tp_rank=tp_rank, tp_size=tp_size), table)
        assert set(recording.recipes.values()) == {"bf16"}


def test_ranks_that_share_a_key_value_head_take_the_same_rows():
    config = CONFIGS["qwen3_one_kv_head"]()
    table = name_table(plain_model(config))
    taken = []
    for tp_rank in range(4):
        engine = TransformersEngine(config, tp_rank=tp_rank, tp_size=4)
        recording = check_recording(engine, table)
        taken.append({c.tensor.split(".")[-2]: c.box for c in recording.copies if "layers.0.self_attn" in c.tensor})
    assert len({t["k_proj"] for t in taken}) == len({t["v_proj"] for t in taken}) == 1
    assert [t["q_proj"].offset[0] for t in taken] == [0, 16, 32, 48]


def test_an_f32_trainer_feeds_a_bf16_engine_rounded_and_an_f32_engine_raw():
    config = CONFIGS["llama"]()
    table = name_table(plain_model(config, torch.float32))
    assert set(check_recording(TransformersEngine(config), table).recipes.values()) == {"bf16"}
    raw = check_recording(TransformersEngine(config, dtype=torch.float32), table)
    assert set(raw.recipes.values()) == {"raw"}


@pytest.mark.parametrize("name", WIDE_CONFIGS)
@pytest.mark.parametrize("recipe", ["fp8_block128", "fp8_block128_f32"])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_weights_and_scales_of_a_quantised_engine_are_recorded(name, recipe, tp_size):
    config = WIDE_CONFIGS[name]()
    table = name_table(plain_model(config))
    for tp_rank in range(tp_size):
        engine = TransformersEngine(config, tp_rank=tp_rank, tp_size=tp_size, quantization=recipe)
        recording = check_recording(engine, table)
        quantised = {n for n, r in recording.recipes.items() if r == recipe}
        assert quantised == {s.name for s in table if s.name.endswith("_proj.weight")}
        roles = [c.role for c in recording.copies if c.tensor == "model.layers.0.mlp.up_proj.weight"]
        assert roles == ["weight", "scale"]
        live = engine.live_tensors()
        assert live["model.layers.0.self_attn.qkv_proj.weight"].dtype == torch.float8_e4m3fn
        assert live["model.layers.0.mlp.gate_up_proj.weight_scale_inv"].shape == (2 * 4 // tp_size, 2)
        verify_recording(recording, engine.load_weights, table)


def test_a_quantised_engine_computes_with_dequantised_weights():
    config = WIDE_CONFIGS["qwen3"]()
    model = plain_model(config, torch.float32)
    engine = TransformersEngine(config, quantization="fp8_block128_f32", dtype=torch.float32)
    weights = []
    with torch.no_grad():
        for name, p in model.state_dict().items():
            if not name.endswith("_proj.weight"):
                weights.append((name, p))
                continue
            # Blocks by hand, so that the engine's own dequantisation is not its own witness.
            q, s = torch.empty(p.shape, dtype=torch.float8_e4m3fn), torch.empty(p.shape[0] // 128, p.shape[1] // 128)
            for i, j in np.ndindex(*s.shape):
                block = p[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
                s[i, j] = block.abs().max() / 448
                q[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] = (block / s[i, j]).to(torch.float8_e4m3fn)
                block.copy_(q[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)].float() * s[i, j])
            weights += [(name, q), (name.replace("weight", "weight_scale_inv"), s)]
        engine.load_weights(weights)
        ids = torch.randint(0, config.vocab_size, (2, 5))
        torch.testing.assert_close(engine(ids), model(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_folder_is_loaded(tmp_path):
    config = CONFIGS["llama"]()
    model = plain_model(config)
    model.save_pretrained(tmp_path)
    engine = TransformersEngine(tmp_path)
    written = engine.load_checkpoint(tmp_path)
    assert written == set(engine.live_tensors())
    ids = torch.randint(0, config.vocab_size, (1, 4))
    with torch.no_grad():
        torch.testing.assert_close(engine(ids), model(ids).logits, atol=2e-2, rtol=2e-2)
    with pytest.raises(ConfigError, match="has no safetensors files"):
        engine.load_checkpoint(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TransformersEngine(CONFIGS["llama"](), tp_rank=2, tp_size=2), "tp_rank 2 is not inside tp_size 2"),
        (lambda: TransformersEngine(CONFIGS["llama"](), tp_size=3), "heads of model.layers.0.self_attn is 4"),
        (
            lambda: TransformersEngine(transformers.Qwen2Config(**SMALL), quantization="fp8_block128"),
            r"qkv_proj \(q_proj\) would be cut at row 64, which is no multiple of the scale block of 128",
        ),
        (
            lambda: TransformersEngine(
                transformers.Qwen3Config(**{**WIDE, "intermediate_size": 384}), tp_size=2, quantization="fp8_block128"
            ),
            r"gate_up_proj \(gate_proj\) would be cut at row 192",
        ),
        (lambda: TransformersEngine(CONFIGS["llama"](), quantization="int3"), "'int3' is unknown"),
        (
            lambda: TransformersEngine(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2)),
            "no decoder of the Llama kind",
        ),
        (lambda: TransformersEngine("nowhere"), "has no config.json"),
    ],
)
def test_what_the_engine_cannot_shard_is_refused_by_name(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_the_loader_refuses_what_does_not_fit():
    engine = TransformersEngine(CONFIGS["llama"]())
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ShapeMismatchError, match=r"shape \(64, 64\), got \(64, 65\)"):
        engine.load_weights([(name, torch.zeros(64, 65))])
    with pytest.raises(
        ShapeMismatchError, match=r"model.norm.weight takes a checkpoint tensor of shape \(64,\), got \(65,\)"
    ):
        engine.load_weights([("model.norm.weight", torch.zeros(65))])
    with pytest.raises(UnknownTensorError, match=r"'model\.layers\.7\.mlp\.up_proj\.weight'"):
        engine.load_weights([("model.layers.7.mlp.up_proj.weight", torch.zeros(1))])
    with pytest.raises(DtypeMismatchError, match="float8_e4m3fn"):
        engine.load_weights([(name, torch.zeros(64, 64).to(torch.float8_e4m3fn))])
    table = [TensorSpec(name, (64, 65), "bfloat16")]
    with pytest.raises(ShapeMismatchError):
        record_loader(engine.load_weights, table, engine.live_tensors(), engine.recipe_for)


def test_a_sharded_engine_without_a_process_group_loads_but_does_not_run():
    engine = TransformersEngine(CONFIGS["llama"](), tp_rank=0, tp_size=2)
    with pytest.raises(StateError, match="needs a process group"):
        engine(torch.zeros(1, 2, dtype=torch.long))
