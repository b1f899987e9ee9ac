"""The record of ``pytest bench/test_simulator.py --benchmark-json``, and the table that a document makes of it."""

from __future__ import annotations

from typing import Any

import msgspec


class Stats(msgspec.Struct, frozen=True):
    """Of pytest-benchmark's figures the one that is used: ``mean``, seconds of wall time of a run."""

    mean: float


class Benchmark(msgspec.Struct, frozen=True):
    """One benchmark: its group, its parameter and what it has noted."""

    group: str
    param: str
    stats: Stats
    extra_info: dict[str, Any]


class SimulatorResult(msgspec.Struct, frozen=True):
    """A record, as pytest-benchmark writes it; what is not used is left out."""

    machine_info: dict[str, Any]
    benchmarks: tuple[Benchmark, ...]

    @property
    def measured(self) -> tuple[Benchmark, ...]:
        """Those that compare a prediction with a publish over shared memory."""
        return tuple(b for b in self.benchmarks if "ratio" in b.extra_info)

    @property
    def presets(self) -> tuple[Benchmark, ...]:
        """Those that plan and simulate a preset."""
        return tuple(b for b in self.benchmarks if "plan_score" in b.extra_info)


def simulator_table_of(result: SimulatorResult) -> str:
    """One row for each prediction that was measured, and one for each preset, in Markdown."""
    lines = ["| publish over shared memory | measured | predicted | ratio | within 25 % |", "|---|---:|---:|---:|---|"]
    for b in result.measured:
        info = b.extra_info
        what = b.param.replace("-", ", ", 1)
        figures = f"{_ms(info['measured_s'])} | {_ms(info['simulated_s'])} | **{info['ratio']:.2f}**"
        lines.append(f"| {what} | {figures} | {info['verdict']} |")
    lines += ["", "| preset (a prediction) | simulated | over its lower bound | simulated in |", "|---|---:|---:|---:|"]
    for b in result.presets:
        info = b.extra_info
        figures = f"{info['simulated_s']:.3g} s | **{info['score']:.3f}** | {b.stats.mean:.1f} s"
        lines.append(f"| {b.param} | {figures} |")
    cpu, python = result.machine_info["cpu"], result.machine_info["python_version"]
    lines += [
        "",
        f"{cpu['count']} cores of {cpu['brand_raw']}, Python {python}. `pytest bench/test_simulator.py "
        "--benchmark-only`, record `bench/records/simulator.json`.",
    ]
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"
