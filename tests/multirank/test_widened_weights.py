"""A bf16 trainer and an engine that holds some weights in f32: exact, at the commit, and never half of it."""

from __future__ import annotations

import pytest
import torch

import wsync


@pytest.fixture
def key_file(tmp_path):
    return wsync.new_key_file(tmp_path / "wsync.key")


def test_an_engine_that_holds_a_bias_in_f32_serves_the_trainers_bf16_values(key_file):
    g = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(s, generator=g).bfloat16() for n, s in (("w", (64, 32)), ("bias", (96,)), ("top", (8,)))}
    live = {"w": torch.zeros(64, 32, dtype=torch.bfloat16), "bias": torch.zeros(2, 96)[1], "top": torch.zeros(10)[:8]}
    with wsync.Source(weights, store="tcp://127.0.0.1:0", key_file=key_file) as source:
        sink = wsync.Sink(live, store=source.store, key_file=key_file)
        try:
            sink.start()
            for version in (1, 2):
                for t in weights.values():
                    t.normal_(generator=g)
                before = {n: t.clone() for n, t in live.items()}
                publication = source.publish(version)
                ticket = sink.wait(version, 20)
                assert all(torch.equal(live[n], before[n]) for n in live)
                sink.commit(ticket)
                publication.wait_committed()
                for name, t in live.items():
                    assert torch.equal(t, weights[name].to(t.dtype)), name
        finally:
            sink.close()
