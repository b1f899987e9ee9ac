"""Tables of documents, made from committed records: ``python -m wsync.bench.markdown RECORD DOCUMENT...``.

A document has ``<!-- table: e2e -->`` and ``<!-- end: e2e -->``; what stands between them is replaced. A test compares.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import msgspec

from wsync.bench.result import Result, RowResult
from wsync.errors import ConfigError, FormatVersionError

_BEGIN, _END = "<!-- table: e2e -->", "<!-- end: e2e -->"


def load_record(path: Path) -> Result:
    """A record that ``wsync bench e2e --json`` wrote.

    Raises:
        ConfigError: it cannot be read.
        FormatVersionError: it has another format.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Result)
    except OSError as e:
        raise ConfigError(f"record {path} cannot be read: {e.strerror}") from e
    except msgspec.MsgspecError as e:
        raise FormatVersionError(f"record {path} is not of the format that this wsync reads: {e}") from e


def table_of(result: Result) -> str:
    """One row for each way of moving the weights, one column for each recipe, in Markdown."""
    recipes = list(dict.fromkeys(row.recipe for row in result.rows))
    titles = list(dict.fromkeys(row.title for row in result.rows))
    by_key = {(row.title, row.recipe): row for row in result.rows}
    lines = [
        "| publish to last replica committed | " + " | ".join(f"`{r}`" for r in recipes) + " |",
        "|---|" + "---:|" * len(recipes),
    ]
    for title in titles:
        name = f"**{title}**" if title == "wsync" else title
        lines.append(f"| {name} | " + " | ".join(_cell(by_key[(title, r)]) for r in recipes) + " |")
    limits = {row.recipe: row for row in result.rows if row.title == "wsync"}
    lines.append("| limit (memcpy) | " + " | ".join(f"{1000 * limits[r].limit_s:.0f} ms" for r in recipes) + " |")
    options, machine = result.options, result.machine
    verdict = "every byte of every row verified" if result.verdict == "ok" else "A VERDICT IS WRONG"
    lines += [
        "",
        f"{options.model_name} ({result.trainer_bytes / 1e9:.2f} GB in bf16), {options.num_trainers} FSDP2 trainer "
        f"processes to {options.num_engines} tensor-parallel engine processes on one machine, {machine['cpu']}, "
        f"{machine['num_cores']} cores, memcpy {result.memcpy.gbps:.1f} GB/s, no GPU; p50 of {options.repeats}; "
        f"{verdict}. `wsync bench e2e --preset {options.model_name}`, "
        "record `bench/records/e2e_qwen3_0.6b.json`.",
    ]
    return "\n".join(lines)


def _cell(row: RowResult) -> str:
    seconds = row.seconds.p50
    text = f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
    if row.title == "wsync":
        return f"**{text}** ({100 * row.limit_share:.0f} % of the limit)"
    return f"{text} ({row.ratio:.1f} x)"


def splice(document: str, table: str) -> str:
    """The document with its table replaced.

    Raises:
        ConfigError: it has no place for one.
    """
    pattern = re.compile(re.escape(_BEGIN) + r"\n.*?" + re.escape(_END), re.S)
    if not pattern.search(document):
        raise ConfigError(f"the document has no {_BEGIN} ... {_END}")
    return pattern.sub(lambda _: f"{_BEGIN}\n{table}\n{_END}", document)


def main(argv: list[str]) -> int:
    """Put the record's table into the documents."""
    if len(argv) < 2:
        raise ConfigError(f"give a record and at least one document, got {len(argv)} arguments")
    table = table_of(load_record(Path(argv[0])))
    for name in argv[1:]:
        path = Path(name)
        path.write_text(splice(path.read_text(), table))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
