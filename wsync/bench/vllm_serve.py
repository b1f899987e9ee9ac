"""Becomes a vLLM server that ends with the benchmark: ``python -m wsync.bench.vllm_serve PARENT ARGUMENT...``."""

from __future__ import annotations

import os
import signal
import sys

from wsync.bench.cleanup import die_with


def main(argv: list[str]) -> None:
    """Replace this process by vLLM's own server. SIGTERM lets that one end its engine before it ends."""
    die_with(int(argv[0]), signal.SIGTERM)
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *argv[1:]])


if __name__ == "__main__":
    main(sys.argv[1:])
