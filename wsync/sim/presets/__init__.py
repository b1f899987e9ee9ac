"""Named scenarios: what peers have published, and what breaks planners."""

from __future__ import annotations

from wsync.errors import ConfigError
from wsync.sim.options import nearest, shown
from wsync.sim.presets.preset import Preset, Published
from wsync.sim.presets.published import PUBLISHED
from wsync.sim.presets.shapes import SHAPES

PRESETS: dict[str, Preset] = {preset.name: preset for preset in (*PUBLISHED, *SHAPES)}
"""Name -> preset."""


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigError: there is none; the hint names the nearest.
    """
    if name in PRESETS:
        return PRESETS[name]
    raise ConfigError(
        f"{shown(name)} is neither a preset nor a file; presets are {', '.join(PRESETS)}", hint=nearest(name, PRESETS)
    )


__all__ = ["PRESETS", "Preset", "Published", "find_preset"]
