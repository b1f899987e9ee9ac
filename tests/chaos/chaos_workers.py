"""Processes of the chaos tests: ranks that stop at a chosen place, so that the test can kill them there."""

from __future__ import annotations

import time

import torch

import wsync
from wsync.plan import PlanOptions

NUM_ROWS = 512


def weights(version: int) -> dict[str, torch.Tensor]:
    """What version ``version`` is made of."""
    g = torch.Generator().manual_seed(version)
    return {f"layer{i}.weight": torch.randn(NUM_ROWS, 256, generator=g).to(torch.bfloat16) for i in range(3)}


def _stop_at(report, module, name, when=lambda *_: True):
    """Replace ``module.name`` by one that, once ``when`` holds, reports and then hangs."""
    original = getattr(module, name)

    def hang(*args, **kwargs):
        if not when(*args):
            return original(*args, **kwargs)
        report(f"at {name}")
        time.sleep(120)

    setattr(module, name, hang)


def replica_a_voted(round_):
    """Whether the only thing that replica ``a`` lacks is the decision."""
    return len(round_.packed) == 2 and "a" in round_.replicas and len(round_.replicas["a"].voted) == 2


def trainer(report, rank, world_size, store, key_file, stop, transport, deadline_s):
    """Publishes version 1 in peace, then version 2, stopping at ``stop``."""
    from wsync.session import round as round_module
    from wsync.session import source as source_module

    # Plain tensors count as replicated: the planner balances whole buckets between the ranks.
    tensors = weights(1)
    source = wsync.Source(
        tensors,
        store=store,
        key_file=key_file,
        rank=rank,
        world_size=world_size,
        transport=transport,
        peer_timeout_s=3.0,
        options=PlanOptions(bucket_bytes=256 << 10),
    )
    source.publish(1, min_replicas=2, deadline_s=30).wait_committed()
    for name, value in weights(2).items():
        tensors[name].copy_(value)
    if stop == "pack":
        _stop_at(report, source_module.kernels, "pack")
    elif stop == "decide":
        _stop_at(report, round_module.Round, "_decide", replica_a_voted)
    elif stop == "publish":
        report("at publish")
        time.sleep(120)
    began = time.monotonic()
    try:
        result = source.publish(2, deadline_s=deadline_s).wait_committed()
    except wsync.WsyncError as e:
        replicas = getattr(e, "replicas", {})
        return {"error": type(e).__name__, "message": str(e), "replicas": replicas, "seconds": time.monotonic() - began}
    finally:
        source.close()
    return {"error": None, "committed": result.committed, "replicas": result.replicas, "dropped": result.dropped}


def engine(report, replica, rank, world_size, store, key_file, stop, deadline_s):
    """Commits version 1 in peace, then version 2, stopping at ``stop``."""
    from wsync.session import install as install_module

    live = {name: torch.zeros_like(t) for name, t in weights(1).items()}
    sink = wsync.Sink(
        live, store=store, key_file=key_file, replica=replica, rank=rank, world_size=world_size, peer_timeout_s=3.0
    )
    sink.commit(sink.prepare(30))
    if stop == "verify":
        _stop_at(report, install_module.kernels, "digest")
    elif stop == "install":
        _stop_at(report, install_module.kernels, "unpack")
    began = time.monotonic()
    error = None
    replicas: dict[str, str] = {}
    try:
        sink.commit(sink.prepare(deadline_s))
    except wsync.WsyncError as e:
        error = type(e).__name__
        replicas = getattr(e, "replicas", {})
    seconds = time.monotonic() - began
    holds = [v for v in (1, 2) if all(torch.equal(live[n], t) for n, t in weights(v).items())]
    result = {
        "error": error,
        "replicas": replicas,
        "state": sink.state,
        "version": sink.version,
        "holds": holds,
        "seconds": seconds,
    }
    sink.close()
    return result
