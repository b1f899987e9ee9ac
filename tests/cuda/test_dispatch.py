"""``backend=`` and a device become the name of the kernels that run, or an error that says what to use."""

from __future__ import annotations

import pytest
import torch

import wsync
from wsync.errors import ConfigError
from wsync.kernels import dispatch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_cpu_memory_goes_to_the_compiled_kernels_unless_the_reference_is_asked_for():
    assert dispatch.resolve_backend("auto", CPU) == "cpu"
    assert dispatch.resolve_backend("cpu", CPU) == "cpu"
    assert dispatch.resolve_backend("reference", CPU) == "reference"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gpu_memory_is_refused_by_cpu_kernels(backend):
    with pytest.raises(
        ConfigError, match=rf"backend '{backend}' takes tensors in CPU memory, but this one is on cuda:0"
    ):
        dispatch.resolve_backend(backend, GPU)


def test_cpu_memory_is_refused_by_gpu_kernels(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    for backend in ("cuda", "triton"):
        with pytest.raises(ConfigError, match=r"takes tensors on a GPU, but this one is on cpu[\s\S]*backend 'cpu'"):
            dispatch.resolve_backend(backend, CPU)


def test_the_interpreter_takes_cpu_memory(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    assert dispatch.resolve_backend("triton", CPU) == "triton"


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    for device in (CPU, GPU):
        with pytest.raises(ConfigError, match="needs the package triton"):
            dispatch.resolve_backend("triton", device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_auto_on_a_gpu_without_the_cuda_library_is_triton_or_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    assert dispatch.resolve_backend("auto", GPU) == "triton"
    with pytest.raises(ConfigError, match="backend 'cuda' needs a GPU"):
        dispatch.resolve_backend("cuda", GPU)
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    with pytest.raises(ConfigError, match="backend 'cuda' needs a GPU"):
        dispatch.resolve_backend("auto", GPU)


def test_unknown_names_and_devices_are_refused():
    with pytest.raises(ConfigError, match="'gpu' is unknown; known are auto, cpu, cuda, triton, reference"):
        wsync.quantize(torch.zeros(2, 2), "bf16", backend="gpu")
    with pytest.raises(ConfigError, match="is on meta"):
        wsync.quantize(torch.zeros(2, 2, device="meta"), "bf16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_where_auto_means_triton_weights_are_dequantised_by_torch(monkeypatch):
    parts = wsync.quantize(torch.randn(128, 128), "fp8_block128")
    want = wsync.dequantize(parts, "fp8_block128", backend="reference")
    monkeypatch.setattr("wsync.kernels.weights.resolve_backend", lambda backend, device: "triton")
    assert torch.equal(wsync.dequantize(parts, "fp8_block128"), want)
    with pytest.raises(ConfigError, match="'triton' does not dequantize"):
        wsync.dequantize(parts, "fp8_block128", backend="triton")
    assert torch.equal(wsync.dequantize({"weight": want}, "raw", backend="triton"), want)
