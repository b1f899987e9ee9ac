"""Where the recorded fixtures are. Not part of the project: tests that read them skip where they are absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def find_fixtures() -> Path | None:
    """``$WSYNC_TOPO_FIXTURES``, or ``shared/topo_fixtures`` beside the checkout or above it."""
    named = os.environ.get("WSYNC_TOPO_FIXTURES")
    above = [parent / "shared" / "topo_fixtures" for parent in Path(__file__).resolve().parents]
    places = [Path(named)] if named else above
    return next((p for p in places if (p / "MANIFEST.tsv").is_file()), None)


FIXTURES = find_fixtures()
needs_fixtures = pytest.mark.skipif(FIXTURES is None, reason="no recorded fixtures (WSYNC_TOPO_FIXTURES)")


def recorded(name: str) -> Path:
    """Path of a fixture."""
    if FIXTURES is None:
        pytest.skip("no recorded fixtures (WSYNC_TOPO_FIXTURES)")
    return FIXTURES / name


def manifest() -> dict[str, dict[str, str]]:
    """Rows of the manifest by file."""
    if FIXTURES is None:
        return {}
    head, *rows = [line.split("\t") for line in (FIXTURES / "MANIFEST.tsv").read_text().splitlines() if line]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}
