"""Updates whose times peers have published, with the page that says so.

Lower bounds follow from the sizes by hand: unique wire bytes of a replica over what its nodes receive, or over what the
trainer's nodes send, at 400 GB/s per node of eight GPUs.
"""

from __future__ import annotations

from wsync.sim.options import SimOptions
from wsync.sim.presets.machines import GB200_GB, H20_GB, H200_GB, RDMA_ALPHA_S, gb200, h20, h100, h200
from wsync.sim.presets.preset import Preset, Published
from wsync.spec.cluster import Cluster, NodeGroup

_LAYOUT = "the trainer's layout is not published: {}"
_BF16_TRAINER = "the trainer holds bf16 and quantises while it packs"
_IN_PLACE = "engines write every bucket into live memory as it comes and do not serve meanwhile, as peers do"
_ATTENTION = "experts are cut over all ranks of a replica, and attention as far as blocks of 128 rows allow"
_APART = "trainers and engines run on different nodes of one fabric that does not block"


def _cluster(*groups: NodeGroup) -> Cluster:
    return Cluster(groups, alpha_s=RDMA_ALPHA_S)


def _kimi(name: str, title: str, engines: int, layout: str, bound_s: float, published: Published, *more: str) -> Preset:
    return Preset(
        name,
        title,
        "Kimi-K2",
        "tp=8,pp=8,ep=32,pp_first=7,pp_last=6",
        layout,
        "fp8_block128",
        _cluster(h100("trainer", 32), h100("engine", engines)),
        "trainer",
        "engine",
        (
            _LAYOUT.format("Megatron-Core with tp=8, pp=8, ep=32 is taken"),
            _BF16_TRAINER,
            _ATTENTION,
            _APART,
            _IN_PLACE,
            *more,
        ),
        published,
        bound_s,
    )


_PERPLEXITY = Published(
    1.3,
    "Perplexity, Weight Transfer for RL Post-Training in under 2 seconds, 2025-09-24: https://research.perplexity.ai/articles/weight-transfer-for-rl-post-training-in-under-2-seconds",
)

PUBLISHED: tuple[Preset, ...] = (
    Preset(
        "nemo-qwen3.5-397b",
        "NeMo-RL reshard: Qwen3.5-397B in bf16, 256 to 256 H100",
        "Qwen3.5-397B-A17B",
        "tp=2,pp=4,ep=32",
        "tp=16,ep=16,replicas=16",
        "bf16",
        _cluster(h100("trainer", 32), h100("engine", 32)),
        "trainer",
        "engine",
        (
            "the trainer is Megatron-Core with tp=2, pp=4, ep=32; the page has TP8, PP8, EP32",
            "16 replicas of 16 ranks (2 nodes), as on the page",
            "the text decoder only",
            _ATTENTION,
            _APART,
            _IN_PLACE,
        ),
        Published(1.97, "NeMo-RL, NCCL-Reshard refit, 1.97 to 2.17 s: https://github.com/NVIDIA-NeMo/RL/pull/2971"),
        0.99,
    ),
    Preset(
        "nemo-dsv3",
        "NeMo-RL reshard: DeepSeek-V3 in bf16, 256 to 256 H100",
        "DeepSeek-V3",
        "tp=8,pp=8,ep=32,pp_first=7,pp_last=6",
        "tp=32,ep=32,replicas=8",
        "bf16",
        _cluster(h100("trainer", 32), h100("engine", 32)),
        "trainer",
        "engine",
        (
            "the trainer is Megatron-Core with tp=8, pp=8, ep=32; the page has PP16, EP16",
            "8 replicas of 32 ranks (4 nodes), as on the page",
            "without the layer that predicts a second token",
            _ATTENTION,
            _APART,
            _IN_PLACE,
        ),
        Published(2.39, "NeMo-RL, NCCL-Reshard refit, 2.39 to 2.83 s: https://github.com/NVIDIA-NeMo/RL/pull/2971"),
        0.84,
    ),
    _kimi(
        "perplexity-kimi-k2-k4",
        "Perplexity: Kimi-K2 in fp8, 256 to 128 GPUs, replicas of 4 nodes",
        16,
        "tp=16,dp=2,ep=32,replicas=4",
        0.64,
        _PERPLEXITY,
        "the size of a replica is not published: here 32 ranks (4 nodes)",
    ),
    _kimi(
        "perplexity-kimi-k2-k2",
        "Perplexity: Kimi-K2 in fp8, 256 to 128 GPUs, replicas of 2 nodes",
        16,
        "tp=16,ep=16,replicas=8",
        1.29,
        _PERPLEXITY,
        "the size of a replica is not published: here 16 ranks (2 nodes)",
    ),
    Preset(
        "prime-rl-glm-5",
        "prime-rl: GLM-5.2 in bf16, 64 to 32 H200",
        "GLM-5",
        "fsdp=64",
        "tp=32,ep=32,replicas=1",
        "bf16",
        _cluster(h200("trainer", 8), h200("engine", 4)),
        "trainer",
        "engine",
        (
            "GLM-5.2's shapes are not published here: those of GLM-5 are taken",
            "the trainer is FSDP2 over all ranks",
            "one replica of 32 ranks: only its parts together fill 4 nodes",
            _ATTENTION,
            _APART,
            _IN_PLACE,
        ),
        Published(
            2.84, "prime-rl, pipelined NIXL weight pulls: https://github.com/PrimeIntellect-ai/prime-rl/pull/3341"
        ),
        sim=SimOptions(install="in_place", gpu_memory_gb=H200_GB),
    ),
    Preset(
        "vllm-rdt-qwen3-235b",
        "vLLM RDT: Qwen3-235B in bf16, 8 to 8 H100",
        "Qwen3-235B-A22B",
        "fsdp=8",
        "tp=8,ep=8,replicas=1",
        "bf16",
        _cluster(h100("trainer", 1), h100("engine", 1)),
        "trainer",
        "engine",
        ("the trainer is FSDP2 over all ranks", "one replica of 8 ranks", _APART, _IN_PLACE),
        Published(3.2, "vLLM, P2P RDT weight sync, 3.2 to 3.3 s: https://github.com/vllm-project/vllm/pull/43375"),
        1.18,
    ),
    _kimi(
        "miles-kimi-k2",
        "miles P2P: Kimi-K2 in fp8, 32 + 32 nodes",
        32,
        "tp=16,dp=2,ep=32,replicas=8",
        0.64,
        Published(
            7.2, "LMSYS, Updating 1T parameters in seconds, 2026-04-29: https://lmsys.org/blog/2026-04-29-p2p-update"
        ),
        "a replica has 32 ranks (4 nodes)",
        "nodes are those of H100",
    ),
    Preset(
        "checkpoint-engine-kimi-k2",
        "checkpoint-engine: Kimi-K2 in fp8, 256 H20",
        "Kimi-K2",
        "fsdp=256",
        "tp=16,ep=16,replicas=16",
        "fp8_block128",
        _cluster(h20("node", 32)),
        "node",
        "node",
        (
            "every GPU holds a 256th part of the new weights and serves as a rank of an engine as well",
            "a replica has 16 ranks (2 nodes)",
            "weights are quantised while they are packed; checkpoint-engine sends a checkpoint that is fp8 already",
            "a node need not receive the 32nd part that it holds itself, so the bound is 31/32 of 1.29",
            _ATTENTION,
            _IN_PLACE,
        ),
        Published(
            16.0,
            "checkpoint-engine, README, broadcast to 256 H20 in 16.04 s: https://github.com/MoonshotAI/checkpoint-engine",
        ),
        1.25,
        sim=SimOptions(install="in_place", gpu_memory_gb=H20_GB),
    ),
    Preset(
        "m2n-dsv3",
        "m2n: DeepSeek-V3 in bf16, 128 to 128 GB200",
        "DeepSeek-V3",
        "tp=4,ep=64",
        "tp=128,ep=128,replicas=1",
        "bf16",
        _cluster(gb200("trainer", 32), gb200("engine", 32)),
        "trainer",
        "engine",
        (
            _LAYOUT.format("Megatron-Core with tp=4, ep=64 is taken"),
            "one replica of 128 ranks",
            "NVL72 racks: each side fills one rack and 56 GPUs of a second",
            _ATTENTION,
            _APART,
            _IN_PLACE,
        ),
        Published(1.45, "NCCL M2N: https://github.com/NVIDIA/nccl-extensions/tree/main/nccl_m2n"),
        0.215,
        sim=SimOptions(install="in_place", gpu_memory_gb=GB200_GB),
    ),
)
