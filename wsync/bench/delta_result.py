"""The record of ``bench/delta_training.py``, and the table that documents make of it."""

from __future__ import annotations

from typing import Any

import msgspec


class DeltaStep(msgspec.Struct, frozen=True):
    """Bytes of one optimizer step's publish.

    Attributes:
        step: since the learning rate was set.
        bf16_changed: share of the bf16 elements that differ.
        fp8_changed, scales_changed: share of the fp8 codes, and of the scales of the blocks.
        one_step: share of the changed bf16 elements that moved to a neighbouring code.
        dense_bytes, fp8_dense_bytes: all of the weights, in bf16 and in ``fp8_block128``.
        index_value_bytes: int32 index and bf16 value of each changed element.
        gap_value_bytes: one byte for each gap (255 carries on) and the bf16 value.
        xor_zstd_bytes: xor of the two versions, compressed with zstd level 3.
        delta_bytes, fp8_delta_bytes: this project's codes, headers and tables included.
        floor_bytes: entropy of which elements change and by how many codes, given the exponent of the old value, over
            the whole model: what no code without memory of earlier versions can beat.
    """

    step: int
    bf16_changed: float
    fp8_changed: float
    scales_changed: float
    one_step: float
    dense_bytes: int
    fp8_dense_bytes: int
    index_value_bytes: int
    gap_value_bytes: int
    xor_zstd_bytes: int
    delta_bytes: int
    fp8_delta_bytes: int
    floor_bytes: int


class DeltaRate(msgspec.Struct, frozen=True):
    """All measured steps of one learning rate."""

    learning_rate: float
    steps: tuple[DeltaStep, ...]

    def mean(self, field: str) -> float:
        """Mean of a field over the steps."""
        return sum(float(getattr(step, field)) for step in self.steps) / len(self.steps)

    def times_smaller(self, field: str, than: str = "index_value_bytes") -> float:
        """Mean bytes of ``than`` over those of ``field``."""
        return self.mean(than) / self.mean(field)


class DeltaResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole run.

    Attributes:
        model: its shape and how it was trained.
        rates: by learning rate.
        target: how many times smaller than index and value the codes should be at 3e-6.
        machine, versions: what it ran on.
        verdict: ``"ok"`` where every code gave the new bytes.
    """

    model: dict[str, Any]
    rates: tuple[DeltaRate, ...]
    target: float
    machine: dict[str, Any]
    versions: dict[str, str | None]
    verdict: str


def delta_table_of(result: DeltaResult) -> str:
    """One column for each learning rate, in Markdown."""
    rates = result.rates
    lines = [
        "| mean of a step | " + " | ".join(f"lr {rate.learning_rate:g}" for rate in rates) + " |",
        "|---|" + "---:|" * len(rates),
    ]

    def row(title: str, cells: list[str]) -> None:
        lines.append(f"| {title} | " + " | ".join(cells) + " |")

    row("bf16 elements that change", [f"{rate.mean('bf16_changed'):.2%}" for rate in rates])
    row("of these to a neighbouring code", [f"{rate.mean('one_step'):.1%}" for rate in rates])
    row("fp8 codes, block scales that change", [_two(rate) for rate in rates])
    row("int32 index + bf16 value", [_kilobytes(rate.mean("index_value_bytes")) for rate in rates])
    for title, field in (
        ("byte gap + bf16 value", "gap_value_bytes"),
        ("xor + zstd", "xor_zstd_bytes"),
        ("**wsync, bf16**", "delta_bytes"),
        ("floor (see text)", "floor_bytes"),
        ("**wsync, fp8_block128**", "fp8_delta_bytes"),
    ):
        row(title, [f"{_kilobytes(r.mean(field))} ({r.times_smaller(field):.1f} x smaller)" for r in rates])
    row("bits for each changed element, bf16", [f"{_bits(rate, 'delta_bytes'):.2f}" for rate in rates])
    row("the floor's", [f"{_bits(rate, 'floor_bytes'):.2f}" for rate in rates])
    model, machine = result.model, result.machine
    verdict = "every code gave the new bytes" if result.verdict == "ok" else "A VERDICT IS WRONG"
    lines += [
        "",
        f"{model['name']} with {model['num_parameters'] / 1e6:.1f} M parameters "
        f"({rates[0].steps[0].dense_bytes / 1e6:.1f} MB in bf16), f32 masters, AdamW, steps "
        f"{rates[0].steps[0].step} to {rates[0].steps[-1].step}; {verdict}. {machine['cpu']}. `make record-delta`, "
        "record `bench/records/delta_training.json`.",
    ]
    return "\n".join(lines)


def _two(rate: DeltaRate) -> str:
    return f"{rate.mean('fp8_changed'):.3%}, {rate.mean('scales_changed'):.3%}"


def _kilobytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e3:.1f} kB"


def _bits(rate: DeltaRate, field: str) -> float:
    return 48 * rate.mean(field) / rate.mean("index_value_bytes")
