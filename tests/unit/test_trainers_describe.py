"""What describe says about plain tensors, arrays and modules, checked by reading memory at the addresses it gives."""

import ctypes

import numpy as np
import pytest
import torch
from torch import nn

from wsync.adapters.trainers import describe
from wsync.errors import ConfigError, DtypeMismatchError, ManifestError, StateError
from wsync.spec.box import Box
from wsync.spec.manifest import RankInfo

INFO = RankInfo("host", 1)


def described(source, **kwargs):
    return describe(source, rank=0, world_size=1, info=INFO, **kwargs)


def read(memory, dtype):
    """The elements of a box, read from raw memory."""
    item = np.dtype(dtype).itemsize
    found = np.empty(memory.box.shape, dtype)
    for index in np.ndindex(*memory.box.shape):
        address = memory.address + sum(i * s for i, s in zip(index, memory.strides, strict=True)) * item
        found[index] = np.frombuffer(ctypes.string_at(address, item), dtype)[0]
    return found


def spec_of(description, name):
    return next(t for t in description.manifest.tensors if t.name == name)


def test_a_tensor_is_described_where_it_lies_with_its_strides():
    base = torch.arange(48, dtype=torch.float32).view(6, 8)
    d = described({"plain": base, "transposed": base.t(), "narrowed": base[1:4, 2:5]})
    assert d.manifest.shards == ((Box((0, 0), (6, 8)),), (Box((0, 0), (8, 6)),), (Box((0, 0), (3, 3)),))
    for held, expected in zip(d.memory, (base, base.t(), base[1:4, 2:5]), strict=True):
        np.testing.assert_array_equal(read(held[0], np.float32), expected.numpy())


def test_an_expanded_tensor_is_read_through_its_zero_strides():
    d = described({"w": torch.arange(3, dtype=torch.int32).expand(4, 3)})
    np.testing.assert_array_equal(read(d.memory[0][0], np.int32), np.tile(np.arange(3), (4, 1)))


def test_scalars_have_one_element_and_empty_tensors_have_no_shard():
    d = described({"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "also": torch.empty(0, 4)})
    assert d.manifest.shards == ((Box((), ()),), (), ())
    assert read(d.memory[0][0], np.float32) == 2.5
    assert [t.alias_of for t in d.manifest.tensors] == [None, None, None]


def test_arrays_share_their_memory():
    class Other:
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **kwargs):
            return self.array.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    a = np.arange(12, dtype=np.float32).reshape(3, 4)
    frozen = np.arange(5, dtype=np.int64)
    frozen.flags.writeable = False
    other = Other(np.arange(4, dtype=np.float16))
    d = described({"numpy": a[:, ::2], "frozen": frozen, "other": other})
    assert [t.dtype for t in d.manifest.tensors] == ["float32", "int64", "float16"]
    assert d.memory[0][0].address == a.ctypes.data
    assert d.memory[1][0].address == frozen.ctypes.data
    assert d.memory[2][0].address == other.array.ctypes.data
    np.testing.assert_array_equal(read(d.memory[0][0], np.float32), a[:, ::2])
    assert any(kept is other for kept in d.keepalive)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight
        self.norm.bias.requires_grad_(False)
        self.register_buffer("bias_correction", torch.zeros(3))
        self.register_buffer("cache", torch.zeros(3), persistent=False)


def test_a_module_gives_the_names_of_its_state_dict_and_ties_are_sent_once():
    model = Tied()
    d = described(model)
    assert [t.name for t in d.manifest.tensors] == list(model.state_dict())
    assert spec_of(d, "head.weight").alias_of == "embed.weight"
    assert spec_of(d, "bias_correction").kind == "buffer"
    assert spec_of(d, "norm.bias").frozen
    assert not spec_of(d, "norm.weight").frozen
    position = [t.name for t in d.manifest.tensors].index("head.weight")
    assert d.manifest.shards[position] == ()
    assert d.memory[position] == []


def test_the_tensors_of_a_state_dict_are_not_taken_for_frozen_and_stay_tied():
    d = described(Tied().state_dict())
    assert not any(t.frozen for t in d.manifest.tensors)
    assert spec_of(d, "head.weight").alias_of == "embed.weight"


def test_two_shapes_of_one_memory_are_not_aliases():
    w = torch.zeros(4, 6)
    d = described({"w": w, "t": w.t(), "flat": w.view(-1), "again": w.view(4, 6)})
    assert [t.alias_of for t in d.manifest.tensors] == [None, None, None, "w"]


def test_wrappers_of_compile_and_checkpointing_leave_no_trace_in_names():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)), torch.compile(nn.Linear(2, 2)))
    names = [t.name for t in described(model).manifest.tensors]
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_names_are_mapped_and_two_of_one_name_are_refused():
    tensors = {"a.w": torch.zeros(1), "b.w": torch.zeros(1)}
    d = described(tensors, name_map=lambda name: "model." + name)
    assert [t.name for t in d.manifest.tensors] == ["model.a.w", "model.b.w"]
    with pytest.raises(ManifestError, match="two tensors have the name 'w'"):
        described(tensors, name_map=lambda name: "w")


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (torch.zeros(2, dtype=torch.complex64), DtypeMismatchError, "'w' is complex64"),
        (np.zeros(2, dtype="datetime64[s]"), DtypeMismatchError, r"'w' is an array of dtype datetime64\[s\]"),
        (np.arange(4)[::-1], ConfigError, "'w' has strides"),
        (torch.zeros(2, device="meta"), ConfigError, "'w' is on meta"),
        (torch.zeros(2, 2).to_sparse(), ConfigError, "'w' has the layout torch.sparse_coo"),
        ([1.0, 2.0], ConfigError, "'w' is a list"),
    ],
)
def test_what_cannot_be_read_in_place_is_refused_by_name(value, error, words):
    with pytest.raises(error, match=words):
        described({"w": value})


def test_a_parameter_that_zero3_partitioned_is_refused_by_name():
    model = nn.Linear(3, 2)
    model.weight.ds_shape = torch.Size((2, 3))
    described(model)
    model.weight.data = torch.empty(0)
    with pytest.raises(ConfigError, match=r"'weight' is partitioned by ZeRO-3: it holds shape \(0,\) of \(2, 3\)"):
        described(model)


def test_what_is_no_source_is_refused():
    with pytest.raises(ConfigError, match="got list"):
        described([torch.zeros(1)])
    with pytest.raises(ConfigError, match="holds no tensors"):
        described({})
    with pytest.raises(ConfigError, match="rank 2 is not inside a world of 2"):
        describe({"w": torch.zeros(1)}, rank=2, world_size=2, info=INFO)
    with pytest.raises(ConfigError, match="got 3"):
        described({3: torch.zeros(1)})


def test_a_tensor_that_moved_is_noticed_by_name():
    tensors = {"a": torch.zeros(4), "b": torch.zeros(4)}
    d = described(tensors)
    d.check_addresses()
    tensors["b"].data = torch.ones(4)
    with pytest.raises(StateError, match="'b' moved from address"):
        d.check_addresses()


def test_a_tensor_that_was_freed_is_noticed_by_name():
    model = nn.Linear(4, 4)
    d = described(model)
    model.bias.untyped_storage().resize_(0)
    with pytest.raises(StateError, match="'bias' was freed"):
        d.check_addresses()
    with pytest.raises(StateError, match="'bias' has shape"):
        described(model)


def test_a_parameter_that_was_replaced_in_its_module_is_noticed_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    d = described(model)
    model.load_state_dict({k: torch.ones_like(v) for k, v in model.state_dict().items()})
    d.check_addresses()
    model[1].weight = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(StateError, match=r"'1.weight' was replaced"):
        d.check_addresses()


def test_a_hugging_face_model_is_a_source():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    d = described(model)
    assert [t.name for t in d.manifest.tensors] == list(model.state_dict())
    assert spec_of(d, "lm_head.weight").alias_of == "model.embed_tokens.weight"
    for spec, held in zip(d.manifest.tensors, d.memory, strict=True):
        if spec.alias_of is None:
            bits = model.state_dict()[spec.name].view(torch.int16).numpy()
            assert spec.dtype == "bfloat16"
            assert held[0].box == Box.whole(bits.shape)
            first = (0,) * bits.ndim
            last = tuple(n - 1 for n in bits.shape)
            for index in (first, last):
                address = held[0].address + 2 * sum(i * s for i, s in zip(index, held[0].strides, strict=True))
                assert np.frombuffer(ctypes.string_at(address, 2), np.int16)[0] == bits[index]
