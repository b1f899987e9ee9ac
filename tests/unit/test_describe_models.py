"""Models without weights: names and shapes are those of transformers, totals those that others publish."""

from __future__ import annotations

import json
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsync.describe import describe_sink, known_models, load_model, summarise
from wsync.describe.models.builtin import BUILTIN, find_builtin
from wsync.describe.models.facts import FAMILIES
from wsync.describe.models.headers import MAX_HEADER_BYTES
from wsync.describe.models.huggingface import tensors_of_config
from wsync.errors import ConfigError, DtypeMismatchError, ManifestError

FEW = {"num_hidden_layers": 4, "vocab_size": 96}


def few_layers(name):
    """The config of a built-in model with few layers and experts."""
    config = {**BUILTIN[name].config, **FEW}
    for key in ("num_experts", "n_routed_experts", "num_local_experts"):
        if key in config:
            config[key] = 8
    # transformers knows Kimi's type only through the checkpoint's own code, which is DeepSeek-V3's.
    return {**config, "model_type": config["model_type"].replace("kimi_k2", "deepseek_v3")}


def of_config(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return load_model(folder)


def theirs_of(config):
    """Names and shapes as transformers saves them."""
    if config["model_type"] != "qwen3_5_moe_text":
        return {t.name: t.shape for t in tensors_of_config(config, "a test")}
    # transformers would save its experts one by one; the published checkpoints have them stacked, as it computes.
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


@pytest.mark.parametrize("name", BUILTIN)
def test_names_and_shapes_are_those_of_transformers(tmp_path, name):
    pytest.importorskip("transformers")
    config = few_layers(name)
    ours = of_config(tmp_path, {k: v for k, v in config.items() if k != "architectures"})
    assert {t.name: t.shape for t in ours.tensors} == theirs_of(config)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen2", "num_key_value_heads": 2},
        {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
        {"model_type": "llama", "num_key_value_heads": 4, "attention_bias": True},
        {"model_type": "mistral", "num_key_value_heads": 1, "head_dim": 16},
        {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16, "attention_bias": True},
    ],
    ids=lambda c: "-".join(str(v) for v in c.values()),
)
def test_options_of_configs_are_read_as_transformers_reads_them(tmp_path, config):
    pytest.importorskip("transformers")
    config = {**FEW, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, **config}
    ours = of_config(tmp_path, config)
    theirs = tensors_of_config(config, "a test")
    assert {(t.name, t.shape, t.alias_of) for t in ours.tensors} == {(t.name, t.shape, t.alias_of) for t in theirs}


def test_a_config_of_another_architecture_goes_to_transformers(tmp_path):
    pytest.importorskip("transformers")
    config = {**FEW, "model_type": "olmo2", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    assert config["model_type"] not in FAMILIES
    model = of_config(tmp_path, config)
    assert model.facts is None
    assert "model.layers.3.post_feedforward_layernorm.weight" in {t.name for t in model.tensors}
    with pytest.raises(ConfigError, match="transformers cannot build the model"):
        of_config(tmp_path, {"model_type": "no such thing"})


@pytest.mark.parametrize(("name", "kind"), [("DeepSeek-V3", "DeepseekV3Config"), ("gpt-oss-120b", "GptOssConfig")])
def test_sizes_are_the_defaults_of_transformers(name, kind):
    transformers = pytest.importorskip("transformers")
    defaults = getattr(transformers, kind)()
    config = {k: v for k, v in BUILTIN[name].config.items() if k != "model_type"}
    assert config == {key: getattr(defaults, key) for key in config}


@pytest.mark.parametrize("name", BUILTIN)
def test_the_number_of_parameters_is_the_published_one(name):
    """Published by others than the config: `Builtin.confirmed` says by whom."""
    model = load_model(name)
    assert model.num_parameters == BUILTIN[name].num_parameters
    assert model.source.startswith(f"https://huggingface.co/{BUILTIN[name].repo}/blob/main/config.json; ")


def test_qwen3_5_has_the_tensors_and_bytes_of_its_published_files():
    """Source: a public audit of the headers of Qwen/Qwen3.5-397B-A17B: 1038 tensors of text, 948 in bf16, 90 in f32."""
    model = load_model("Qwen3.5-397B-A17B")
    assert len(model.tensors) == 1038
    assert sum(t.dtype == "float32" for t in model.tensors) == 90
    assert model.nbytes == 792_692_717_952


def test_kimi_k2_in_fp8_has_the_bytes_of_its_published_files():
    """Source: a public audit of the headers of moonshotai/Kimi-K2-Instruct: 1 029 173 256 720 bytes in 139 644 tensors.

    That is a tensor for every weight and every scale, and another one in each layer (61) that is no parameter.
    """
    sink = describe_sink(load_model("Kimi-K2"), "tp=1", ["h"], "fp8_block128")
    found = summarise(sink)
    parts = {(copy.tensor, copy.role) for copy in sink.ranks[0].copies}
    assert len(parts) + 61 == 139_644
    buffers = 1_029_173_256_720 - sum(found.bytes_by_dtype.values())
    assert 0 <= buffers <= 61 * 128


def test_a_model_is_found_by_any_of_its_names():
    for name in ("Kimi-K2", "kimi-k2", "moonshotai/Kimi-K2-Instruct", "Kimi-K2-Instruct"):
        assert find_builtin(name)[0] == "Kimi-K2"
    assert find_builtin("Kimi") is None
    assert {name for name, _, _ in known_models()} == set(BUILTIN)


def test_layers_that_predict_further_tokens_come_on_request():
    """Source: a public memory calculator for GLM-4.7, which has the same sizes: 358 337 791 296 parameters."""
    assert load_model("GLM-4.5", mtp=True).num_parameters == 358_337_791_296
    without, with_mtp = load_model("DeepSeek-V3"), load_model("DeepSeek-V3", mtp=True)
    assert with_mtp.tensors[: len(without.tensors)] == without.tensors
    assert "model.layers.61.eh_proj.weight" in {t.name for t in with_mtp.tensors}


# ---- bad configs


CONFIG = {**FEW, "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": -32}, "hidden_size -32"),
        ({"hidden_size": 1 << 40}, "hidden_size 1099511627776"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000"),
        ({"num_hidden_layers": 4.5}, "num_hidden_layers 4.5"),
        ({"vocab_size": "many"}, "vocab_size 'many'"),
        ({"vocab_size": None}, "no 'vocab_size'"),
        ({"num_key_value_heads": 3}, "4 attention heads, which do not divide into 3"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings 'yes'"),
    ],
)
def test_a_config_with_an_impossible_number_is_refused_by_key_and_value(tmp_path, change, said):
    with pytest.raises(ConfigError, match=said):
        of_config(tmp_path, {**CONFIG, **change})


def test_a_config_that_is_truncated_at_any_length_is_refused(tmp_path):
    whole = json.dumps(CONFIG)
    for length in range(len(whole)):
        (tmp_path / "config.json").write_text(whole[:length])
        with pytest.raises(ConfigError):
            load_model(tmp_path)


def test_what_is_neither_a_model_nor_a_file_is_refused_with_the_models_that_are(tmp_path):
    with pytest.raises(ConfigError, match=r"neither a built-in model nor a file; built in are Qwen3-0.6B, "):
        load_model("Qwen9")
    with pytest.raises(ConfigError, match=r"neither a config\.json nor safetensors files"):
        load_model(tmp_path)


# ---- safetensors headers


def header_file(path, entries, data_bytes=None, header_bytes=None):
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    data = max((e["data_offsets"][1] for e in entries.values()), default=0) if data_bytes is None else data_bytes
    path.write_bytes(struct.pack("<Q", len(raw) if header_bytes is None else header_bytes) + raw + b"\0" * data)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@given(
    st.dictionaries(
        st.text("abc.", min_size=1, max_size=5),
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(["float32", "bfloat16", "int8", "uint8"])),
        max_size=5,
    )
)
@settings(max_examples=40)
def test_headers_are_read_as_safetensors_writes_them(tmp_path_factory, tensors):
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("files") / "model.safetensors"
    save_file({name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, (shape, dtype) in tensors.items()}, path)
    found = {t.name: (list(t.shape), t.dtype) for t in load_model(path).tensors} if tensors else {}
    assert found == tensors


def test_an_index_gives_the_tensors_of_all_files(tmp_path):
    header_file(tmp_path / "a.safetensors", {"x": entry([2], 0, 8)})
    header_file(tmp_path / "b.safetensors", {"y": entry([3], 0, 12)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"y": "b.safetensors", "x": "a.safetensors"}}))
    assert [t.name for t in load_model(index).tensors] == ["y", "x"] == [t.name for t in load_model(tmp_path).tensors]
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "z": "b.safetensors"}}))
    with pytest.raises(ManifestError, match=r"says that 'z' is in 'b.safetensors', but its header does not have it"):
        load_model(index)
    index.write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))
    with pytest.raises(ConfigError, match="not in its own folder"):
        load_model(index)
    header_file(tmp_path / "b.safetensors", {"x": entry([3], 0, 12)})
    index.unlink()
    with pytest.raises(ManifestError, match=r"'x' is in .* and again in"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("entries", "options", "error", "said"),
    [
        ({"x": entry([2], 0, 8)}, {"header_bytes": 1 << 40}, ConfigError, "1099511627776 bytes itself"),
        ({"x": entry([2], 0, 8)}, {"header_bytes": MAX_HEADER_BYTES + 1}, ConfigError, "at most 100000000"),
        ({"x": entry([2], 0, 8)}, {"header_bytes": 0}, ConfigError, "is not that of a safetensors file"),
        ({"x": entry([2], 0, 8)}, {"data_bytes": 7}, ConfigError, "describes 8 bytes of tensors, but the file has 7"),
        ({"x": entry([2], 0, 8)}, {"data_bytes": 9}, ConfigError, "describes 8 bytes of tensors, but the file has 9"),
        ({"x": entry([2], 0, 8), "y": entry([2], 4, 12)}, {}, ConfigError, "'y' at bytes 4 to 12, .* ends at 8"),
        ({"x": entry([2], 0, 8), "y": entry([2], 12, 20)}, {}, ConfigError, "'y' at bytes 12 to 20, .* ends at 8"),
        ({"x": entry([2], 8, 0)}, {}, ConfigError, "'x' at bytes 8 to 0"),
        ({"x": entry([-2], 0, 8)}, {}, ManifestError, r"shape \(-2,\)"),
        ({"x": entry([-2, -1], 0, 8)}, {}, ManifestError, r"shape \(-2, -1\)"),
        ({"x": entry([3], 0, 8)}, {}, ConfigError, "which is 12 bytes, but 8 bytes of data"),
        ({"x": entry([1 << 40, 1 << 40], 0, 8)}, {}, ManifestError, "bytes, allowed are"),
        ({"x": entry([1] * 40, 0, 4)}, {}, ManifestError, "40 dimensions"),
        ({"x": entry([2], 0, 8, "F4")}, {}, DtypeMismatchError, "'x' .* is F4"),
        ({"x": {"dtype": "F32", "shape": [2]}}, {"data_bytes": 8}, ConfigError, "not that of a safetensors file"),
        (b'{"x": ' + b"[" * 100_000, {"data_bytes": 0}, ConfigError, "not that of a safetensors file"),
        (b"\xff\xfe", {"data_bytes": 0}, ConfigError, "not that of a safetensors file"),
    ],
)
def test_an_absurd_header_is_refused(tmp_path, entries, options, error, said):
    with pytest.raises(error, match=said):
        load_model(header_file(tmp_path / "x.safetensors", entries, **options))


def test_a_file_that_is_truncated_at_any_length_is_refused(tmp_path):
    whole = header_file(tmp_path / "x.safetensors", {"x": entry([2], 0, 8), "y": entry([1], 8, 12)}).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "x.safetensors").write_bytes(whole[:length])
        with pytest.raises(ConfigError):
            load_model(tmp_path / "x.safetensors")


def test_no_layer_of_a_built_in_model_is_counted_twice():
    for name in BUILTIN:
        model = load_model(name)
        assert len({t.name for t in model.tensors}) == len(model.tensors)
        assert sum(math.prod(t.shape) for t in model.tensors if t.alias_of is None) == model.num_parameters
