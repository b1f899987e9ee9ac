"""How few bytes an optimizer step changes: a small language model is trained, and every publish is encoded.

    python bench/delta_training.py bench/records/delta_training.json

A Llama is pretrained on a synthetic language, then updated at reinforcement learning's rates with fresh AdamW state:
likelihood of sequences weighted by their normalised reward, f32 masters, bf16 published. Steps before ``--first`` are
not measured, so that Adam's moments are real. An int32 index and a bf16 value for each changed element is what TRL
ships (https://huggingface.co/blog/delta-weight-sync). Needs the extra ``bench``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import torch
import zstandard
from transformers import LlamaConfig, LlamaForCausalLM

import wsync
from wsync import kernels
from wsync.bench.delta_result import DeltaRate, DeltaResult, DeltaStep
from wsync.bench.machine import describe_machine, package_versions

BUCKET_BYTES = 4 << 20
RATES = (1e-6, 3e-6, 1e-5)
TARGET = 10.0
Array = np.ndarray


def make_model(hidden: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=4,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).float()


class Language:
    """A Markov chain in which every token has eight successors, the first ones more often."""

    def __init__(self, vocabulary: int) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.successors = torch.randint(0, vocabulary, (vocabulary, 8), generator=self.generator)
        self.shares = 1 / torch.arange(1, 9) ** 1.2

    def batch(self, rows: int, length: int) -> torch.Tensor:
        choice = torch.multinomial(self.shares.expand(rows, -1), length, replacement=True, generator=self.generator)
        tokens = torch.randint(0, len(self.successors), (rows, length), generator=self.generator)
        for at in range(1, length):
            tokens[:, at] = self.successors[tokens[:, at - 1], choice[:, at]]
        return tokens


def update(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def pretrain(model: LlamaForCausalLM, language: Language, num_steps: int) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    loss = torch.zeros(())
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = (
            1e-3 * min(1.0, (step + 1) / 20) * (0.55 + 0.45 * np.cos(np.pi * step / num_steps))
        )
        tokens = language.batch(8, 64)
        loss = model(input_ids=tokens, labels=tokens).loss
        update(model, optimizer, loss)
    return float(loss.detach())


def policy_steps(model: LlamaForCausalLM, language: Language, rate: float, num_steps: int) -> Iterator[int]:
    """Updates of a policy: sequences with many low tokens are rewarded, relative to their group."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.999), weight_decay=0.0)
    for step in range(num_steps):
        tokens = language.batch(16, 64)
        reward = (tokens < 512).float().mean(1)
        advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
        scores = torch.log_softmax(model(input_ids=tokens).logits[:, :-1], -1)
        chosen = scores.gather(-1, tokens[:, 1:, None])[..., 0]
        update(model, optimizer, -(advantage[:, None] * chosen).mean())
        yield step


class Version:
    """What a publish of the model holds: for each part its bytes and the bytes of an element."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.bf16: list[tuple[Array, int]] = []
        self.fp8: list[tuple[Array, int]] = []
        for weight in model.parameters():
            rounded = weight.detach().to(torch.bfloat16)
            whole = (as_bytes(rounded), 2)
            self.bf16.append(whole)
            if weight.ndim != 2:
                self.fp8.append(whole)
                continue
            parts = wsync.quantize(rounded, "fp8_block128")
            self.fp8 += [(as_bytes(parts["weight"]), 1), (as_bytes(parts["weight_scale_inv"]), 4)]

    def words(self) -> Array:
        return np.concatenate([part.view("<u2") for part, _ in self.bf16])


def as_bytes(tensor: torch.Tensor) -> Array:
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1).copy()


def delta_bytes(old: list[tuple[Array, int]], new: list[tuple[Array, int]]) -> int:
    """Bytes of this project's codes, as a publish sends them: parts follow each other in buckets."""
    total = 0
    for elem_bytes in sorted({size for _, size in old}):
        before, after = (np.concatenate([padded(p) for p, size in parts if size == elem_bytes]) for parts in (old, new))
        for at in range(0, len(before), BUCKET_BYTES):
            fresh, kept = after[at : at + BUCKET_BYTES].copy(), before[at : at + BUCKET_BYTES].copy()
            base, out = kept.copy(), np.zeros_like(fresh)
            cuts = kernels.delta_cuts([(len(fresh), elem_bytes)])
            made = kernels.delta_encode(fresh.ctypes.data, base.ctypes.data, out.ctypes.data, cuts, 1, 1)
            if made.num_bytes:
                kernels.delta_apply(kept.ctypes.data, len(kept), out.ctypes.data, made.num_bytes, 1, 1)
                if not np.array_equal(kept, fresh):
                    raise SystemExit("a code did not give the new bytes")
            total += made.num_bytes or len(fresh)
    return total


def padded(part: Array) -> Array:
    return np.concatenate([part, np.zeros(-len(part) % 256, np.uint8)])


def entropy_bits(counts: Array) -> float:
    counts = counts[counts > 0].astype(float)
    return float(-(counts * np.log2(counts / counts.sum())).sum()) if len(counts) else 0.0


def floor_bytes(old: Array, new: Array) -> int:
    """Bytes of an ideal code for the steps (0 for no change) that knows each one's share at every exponent."""
    from wsync.formats.delta import WORDS, _Kind

    kind = _Kind(WORDS)
    before, after = old.astype(np.int64), new.astype(np.int64)
    steps, exponents = kind.steps(before, after), kind.exponents(before)
    found = (np.unique(steps[exponents == e], return_counts=True)[1] for e in np.unique(exponents))
    return int(sum(entropy_bits(counts) for counts in found) / 8)


def measure(step: int, before: Version, after: Version) -> DeltaStep:
    old, new = before.words(), after.words()
    changed = np.flatnonzero(old != new)
    gaps = np.diff(changed, prepend=-1) - 1
    codes = [(a[0], b[0]) for a, b in zip(before.fp8, after.fp8, strict=True) if a[1] == 1]
    scales = [(a[0].view("<u4"), b[0].view("<u4")) for a, b in zip(before.fp8, after.fp8, strict=True) if a[1] == 4]
    one = np.abs(old[changed].astype(np.int64) - new[changed].astype(np.int64)) == 1
    return DeltaStep(
        step=step,
        bf16_changed=len(changed) / len(old),
        fp8_changed=share_of(codes),
        scales_changed=share_of(scales),
        one_step=float(one.mean()) if len(one) else 0.0,
        dense_bytes=2 * len(old),
        fp8_dense_bytes=sum(len(part) for part, _ in after.fp8),
        index_value_bytes=6 * len(changed),
        gap_value_bytes=int((gaps // 255 + 3).sum()),
        xor_zstd_bytes=len(zstandard.ZstdCompressor(level=3).compress((old ^ new).tobytes())),
        delta_bytes=delta_bytes(before.bf16, after.bf16),
        fp8_delta_bytes=delta_bytes(before.fp8, after.fp8),
        floor_bytes=floor_bytes(old, new),
    )


def share_of(pairs: list[tuple[Array, Array]]) -> float:
    return sum(int((a != b).sum()) for a, b in pairs) / max(1, sum(len(a) for a, _ in pairs))


def run(rate: float, start: dict[str, torch.Tensor], args: argparse.Namespace) -> DeltaRate:
    model, language = make_model(args.hidden), Language(1024)
    model.load_state_dict(start)
    before, steps = Version(model), []
    for step in policy_steps(model, language, rate, args.last + 1):
        after = Version(model)
        if step >= args.first:
            steps.append(measure(step, before, after))
        before = after
    return DeltaRate(rate, tuple(steps))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--pretrain", type=int, default=250)
    parser.add_argument("--first", type=int, default=20, help="first step that is measured")
    parser.add_argument("--last", type=int, default=39)
    args = parser.parse_args()
    model = make_model(args.hidden)
    loss = pretrain(model, Language(1024), args.pretrain)
    shape = {
        "name": "Llama",
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "hidden_size": args.hidden,
        "pretrain_steps": args.pretrain,
        "pretrain_loss": round(loss, 3),
        "optimizer": "AdamW, betas 0.9 and 0.999",
    }
    rates = tuple(run(rate, model.state_dict(), args) for rate in RATES)
    versions = package_versions(("zstandard",))
    result = DeltaResult(shape, rates, TARGET, describe_machine(), versions, "ok")
    args.record.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    for rate in rates:
        smaller = rate.times_smaller("delta_bytes"), rate.times_smaller("fp8_delta_bytes")
        sys.stdout.write(f"lr {rate.learning_rate:g}: {smaller[0]:.2f} x smaller in bf16, {smaller[1]:.1f} x in fp8\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
