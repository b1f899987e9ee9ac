"""What the Triton kernels compile to, as JSON and as a table: ``python -m wsync.bench.aot_triton [record.json]``."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

HEADER = (
    "| kernel | registers | shared B | programs per SM | instructions per byte | of the issue budget | "
    "predicted share of the memory roof |\n|---|---|---|---|---|---|---|"
)


def markdown(record: dict[str, Any], arch: str = "sm_90a") -> str:
    """The rows of one architecture; every figure is a prediction from the compiled code."""
    rows = [HEADER]
    for row in record["kernels"]:
        if row["arch"] != arch:
            continue
        share = row["per_16_bytes"]["issue"] / record["budget"]["issue"]
        rows.append(
            f"| {row['kernel']} | {row['registers']} | {row['shared_bytes']} | {row['blocks_per_sm']} | "
            f"{row['instructions_per_byte']} | {share:.0%} | {row['predicted_roof_share']:.0%} |"
        )
    return "\n".join(rows)


def main(argv: list[str]) -> None:
    """Compiles, writes the record where a path is given, and the table to stdout."""
    import triton

    from wsync.kernels.triton import aot

    record = {
        "what": "predicted from compiled code; nothing ran on a GPU",
        "triton": triton.__version__,
        "python": platform.python_version(),
        "budget": aot.BUDGET,
        "kernels": aot.table(),
    }
    if argv:
        Path(argv[0]).write_text(json.dumps(record, indent=1) + "\n")
    sys.stdout.write(markdown(record) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
