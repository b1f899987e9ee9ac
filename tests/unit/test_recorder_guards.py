"""What the recorder guards: single values, replaced parameters, coverage, verification, constants."""

import math

import pytest
import torch
from recorder_checks import check, param, raw
from torch import nn

from wsync.adapters.engines import record_loader, verify_recording
from wsync.errors import MissingTensorError, RecordError, StateError
from wsync.spec.manifest import TensorSpec

ONE = {"a": (4, 8)}


def table(shapes):
    return [TensorSpec(n, s, "bfloat16") for n, s in shapes.items()]


def loaded(params, weights):
    for name, t in weights:
        params[name].data.copy_(t)


# Single values.


def test_a_value_that_fills_memory_is_a_copy_of_its_tensor():
    params = {"s": param(3), "t": param(1)}

    def load(weights):
        for name, t in weights:
            if name == "t":
                params["t"].data.fill_(t.item())
            else:
                params["s"].data[int(name)] = t.item()

    recording = check(load, {"0": (), "1": (1,), "2": (), "t": ()}, params)
    assert recording.coverage.covered == 4
    assert recording.needs_verification


@pytest.mark.parametrize(
    ("use", "operation"),
    [
        (lambda v, p: p.data.fill_(1 / v), "__rtruediv__"),
        (lambda v, p: p.data.zero_() if v > 0.5 else None, "__gt__"),
        (lambda v, p: p.data.zero_() if v else None, "__bool__"),
        (lambda v, p: float(v), "__float__"),
        (lambda v, p: math.sqrt(v), "__float__"),
        (lambda v, p: {v: 1}, "__hash__"),
        (lambda v, p: torch.tensor([v]), "tensor"),
        (lambda v, p: p.data * v, "mul"),
        (lambda v, p: p.data.masked_fill_(torch.ones(1, dtype=torch.bool), v), "masked_fill_"),
    ],
)
def test_a_value_that_is_used_otherwise_is_refused_by_name_and_operation(use, operation):
    params = {"s": param(1), "i": param(1)}

    def load(weights):
        for name, t in weights:
            value = t.item()
            assert isinstance(value, float), name
            params["s"].data.fill_(value)
            use(value, params["i"])

    with pytest.raises(RecordError, match=rf"reads the value of 's' with item\(\) and uses it in {operation}"):
        record_loader(load, table({"s": ()}), params, None, allow_missing=["i"])


def test_a_value_that_the_engine_keeps_is_refused():
    params, held = {"s": param(1)}, {}

    def load(weights):
        for _, t in weights:
            held["scale"] = t.item()
            params["s"].data.fill_(held["scale"])

    with pytest.raises(RecordError, match=r"reads the value of 's' with item\(\) and keeps it"):
        record_loader(load, table({"s": ()}), params, None)


# Parameters that the engine replaces.


def test_a_parameter_that_the_engine_replaced_later_is_noticed_by_name():
    layer = nn.Linear(8, 4, bias=False).bfloat16()
    live = dict(layer.named_parameters())
    recording = record_loader(lambda ws: loaded(live, ws), table({"weight": (4, 8)}), live, None)
    recording.check_addresses(dict(layer.named_parameters()))
    old = layer.weight
    layer.weight = nn.Parameter(old.data.clone())
    recording.check_addresses()
    with pytest.raises(
        StateError, match=rf"'weight' was at address {old.data_ptr():#x} .*{layer.weight.data_ptr():#x}"
    ):
        recording.check_addresses(dict(layer.named_parameters()))
    layer.weight = nn.Parameter(old.data.t())
    with pytest.raises(StateError, match=r"shape \(4, 8\), strides \(8, 1\).*shape \(8, 4\), strides \(1, 8\)"):
        recording.check_addresses(dict(layer.named_parameters()))
    layer.weight = nn.Parameter(old.data.view(torch.float16))
    with pytest.raises(StateError, match=r"\(bfloat16 .*\(float16 "):
        recording.check_addresses(dict(layer.named_parameters()))
    with pytest.raises(StateError, match="new are 'scale', gone are 'weight'"):
        recording.check_addresses({"scale": old})


class Engine(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4, bias=False).bfloat16().requires_grad_(False)
        self.layer.weight.tag = "a tag"
        self.register_buffer("scale", torch.ones(4, 8, dtype=torch.bfloat16))


def assigned(engine, t):
    engine.layer.load_state_dict({"weight": t}, assign=True)


def registered(engine, t):
    engine.layer.weight = nn.Parameter(t, requires_grad=False)
    engine.scale = t.clone()


def data_replaced(engine, t):
    engine.layer.weight.data = t


def impl_swapped(engine, t):
    torch.utils.swap_tensors(engine.layer.weight, nn.Parameter(t.clone(), requires_grad=False))


def memory_moved(engine, t):
    with torch._C.DisableTorchFunction():
        engine.layer.weight.data = torch.zeros(4, 8, dtype=torch.bfloat16)


@pytest.mark.parametrize("replace", [assigned, registered, data_replaced, impl_swapped, memory_moved])
@pytest.mark.parametrize("copies", [False, True])
def test_a_refused_loader_leaves_the_engine_as_it_was(replace, copies):
    engine = Engine()
    weight, scale = engine.layer.weight, engine.scale
    address, bits = weight.data_ptr(), raw(weight).clone()

    def load(weights):
        for _, t in weights:
            if copies:
                engine.layer.weight.data.copy_(t)
                engine.scale.copy_(t)
            replace(engine, t)

    live = {"layer.weight": weight, "scale": scale}
    with pytest.raises((RecordError, MissingTensorError, StateError), match="weight"):
        record_loader(load, table(ONE), live, None, module=engine)
    assert engine.layer.weight is weight
    assert engine.scale is scale
    assert type(weight) is nn.Parameter
    assert (weight.tag, weight.requires_grad) == ("a tag", False)
    assert weight.data_ptr() == address
    assert torch.equal(raw(weight), bits)


# What is covered.


def test_interleaved_tensors_of_one_memory_count_each_of_their_elements():
    flat = torch.zeros(4, 4, dtype=torch.bfloat16)
    live = {n: nn.Parameter(v, requires_grad=False) for n, v in (("a", flat[:, ::3]), ("b", flat[:, 1:3]))}
    with pytest.raises(MissingTensorError, match="fills 8 of the 16 elements"):
        record_loader(lambda ws: loaded(live, ws), table({"a": (4, 2)}), live, None)
    recording = check(lambda ws: loaded(live, ws), {"a": (4, 2), "b": (4, 2)}, live)
    assert recording.coverage.complete
    overlapping = {"a": flat[:, :3], "b": flat[:, :2], "c": flat[:2, :3]}
    recording = check(lambda ws: loaded(overlapping, ws), {"a": (4, 3)}, overlapping)
    assert recording.coverage.total == 12


# Verification and constants.


def test_a_loader_of_plain_view_copies_needs_no_verification():
    qkv, embed, norm = param(12, 8), param(8, 4), param(8, dtype=torch.float32)

    def load(weights):
        for name, t in weights:
            if name == "embed":
                embed.data[:6].copy_(t)
                embed.data[6:] = 0
                embed.data[7:].fill_(0)
            elif name == "norm":
                norm.data.copy_(t)
            else:
                qkv.data.narrow(0, 4 * "qkv".index(name), 4).copy_(t.view(2, 4, 8)[1])

    shapes = {"embed": (6, 4), "norm": ((8,), "float32"), "q": (8, 8), "k": (8, 8), "v": (8, 8)}
    recording = check(load, shapes, {"qkv": qkv, "embed": embed, "norm": norm})
    assert recording.constants
    assert not recording.needs_verification


@pytest.mark.parametrize(
    "act",
    [
        lambda p, t: p.data.copy_(t.clone()),
        lambda p, t: p.data.copy_(torch.empty(4, 8, dtype=torch.bfloat16).copy_(t)),
        lambda p, t: p.data.copy_(t).copy_(torch.arange(32).view(4, 8)),
        lambda p, t: p.data.copy_(t).copy_(p.data),
    ],
)
def test_a_loader_that_goes_through_other_memory_needs_verification(act):
    p = param(4, 8)
    recording = record_loader(lambda ws: [act(p, t) for _, t in ws], table(ONE), {"p": p}, None)
    assert recording.needs_verification


@pytest.mark.parametrize("fails", [False, True])
def test_verification_restores_every_live_byte_and_address(fails):
    live = {"a": param(4, 8), "cache": torch.full((5,), math.nan), "unused": torch.ones(3)}
    calls = []

    def load(weights):
        for _, t in weights:
            calls.append(1)
            live["a"].data.copy_(t)
            if len(calls) > 1:
                live["cache"].fill_(1)
                live["a"].data = torch.zeros(4, 8, dtype=torch.bfloat16)
                if fails:
                    raise ValueError("no")

    recording = record_loader(load, table(ONE), live, None)
    before = {n: (t.data_ptr(), raw(t).clone()) for n, t in live.items()}
    with pytest.raises(
        ValueError if fails else RecordError, match="no" if fails else "different bytes in 'cache': 10 of 20"
    ):
        verify_recording(recording, load, table(ONE))
    for n, t in live.items():
        assert t.data_ptr() == before[n][0]
        assert torch.equal(raw(t), before[n][1])


@pytest.mark.parametrize(
    "fill",
    [
        lambda p: p.zero_(),
        lambda p: p.copy_(torch.arange(40).view(8, 5)),
        lambda p: p.t().copy_(torch.arange(40).view(5, 8)),
    ],
)
@pytest.mark.parametrize(
    "loaded_part",
    [lambda p: p[:4], lambda p: p[:, :3], lambda p: p[2:6, 1:4], lambda p: p[::2, 1:], lambda p: p[1:2, 2:4]],
)
def test_constants_touch_no_element_that_copies_write(fill, loaded_part):
    p = param(8, 5)

    def load(weights):
        fill(p.data)
        for _, t in weights:
            loaded_part(p.data).copy_(t)

    recording = check(load, {"a": tuple(loaded_part(p).shape)}, {"p": p})
    expected = raw(p).clone()
    loaded_part(p.data).fill_(9)
    recording.write_constants()
    assert bool((loaded_part(p) == 9).all())
    assert recording.coverage.constant == 40 - loaded_part(p).numel()
    assert int((raw(p) != expected).sum()) <= loaded_part(p).numel()
