"""Layout strings: ``fsdp=32,tp=8`` and the like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from wsync.errors import ConfigError

MAX_DEGREE = 1 << 20
MAX_RANKS = 1 << 17
"""Of one side; more than any cluster has."""
MAX_LAYOUT_CHARS = 1000
MAX_LISTS = 1 << 24
"""Of boxes, one for each rank and kind of tensor; more take minutes and all memory."""
MAX_COPIES = 1 << 22
"""Of one replica; likewise."""


def parse_layout(layout: str, known: Mapping[str, str]) -> dict[str, str]:
    """The keys of a layout string with their values, as they stand.

    Args:
        layout: ``key=value`` pairs, separated by commas.
        known: the keys that may occur -> what each means.

    Raises:
        ConfigError: no pairs, a key that is unknown or occurs twice, or a pair without a value.
    """
    check_length(layout)
    found: dict[str, str] = {}
    for pair in layout.split(","):
        key, equals, value = (text.strip() for text in pair.partition("="))
        if not equals or not key or not value:
            raise ConfigError(
                f"layout {layout!r} has the part {pair.strip()!r}, which is not key=value",
                hint="write it as in 'fsdp=32,tp=8'",
            )
        if key not in known:
            raise ConfigError(f"layout {layout!r} has the unknown key {key!r}; known are {', '.join(known)}")
        if key in found:
            raise ConfigError(f"layout {layout!r} says {key} twice: {found[key]} and {value}")
        found[key] = value
    return found


def check_length(layout: str) -> None:
    """Refuse what no one writes by hand.

    Raises:
        ConfigError: with both lengths.
    """
    if len(layout) > MAX_LAYOUT_CHARS:
        raise ConfigError(
            f"layout {layout[:40] + '...'!r} has {len(layout)} characters, allowed are {MAX_LAYOUT_CHARS}"
        )


def check_ranks(layout: str, num_ranks: int) -> int:
    """The number of ranks of a layout.

    Raises:
        ConfigError: there are too many.
    """
    if num_ranks > MAX_RANKS:
        raise ConfigError(f"layout {layout!r} has {num_ranks} ranks, allowed are {MAX_RANKS}")
    return num_ranks


class Degrees:
    """The numbers of a layout, checked as they are asked for."""

    def __init__(self, layout: str, known: Mapping[str, str]) -> None:
        self.layout = layout
        self.values = parse_layout(layout, known)

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def number(self, key: str, default: int = 1, least: int = 1) -> int:
        """The number of that key.

        Raises:
            ConfigError: it is none, or out of range.
        """
        text = self.values.get(key)
        if text is None:
            return default
        if not text.isdecimal() or not least <= int(text) <= MAX_DEGREE:
            raise ConfigError(
                f"layout {self.layout!r} has {key}={text}, allowed are whole numbers from {least} to {MAX_DEGREE}"
            )
        return int(text)

    def choice(self, key: str, allowed: Sequence[str]) -> str:
        """One of ``allowed``, by default the first.

        Raises:
            ConfigError: it is none of them.
        """
        text = self.values.get(key, allowed[0])
        if text not in allowed:
            raise ConfigError(f"layout {self.layout!r} has {key}={text}, allowed are {', '.join(allowed)}")
        return text

    def check_world(self, world: int, expected: int, factors: str) -> None:
        """Refuse a world of another size than the layout makes.

        Raises:
            ConfigError: with both values.
        """
        check_ranks(self.layout, expected)
        if world != expected:
            raise ConfigError(
                f"layout {self.layout!r} has {expected} ranks ({factors}), but {world} hosts are given, one per rank"
            )


def divided(value: int, by: int, what: str, by_what: str) -> int:
    """``value / by``.

    Raises:
        ConfigError: with both values, where that is not whole.
    """
    if value % by:
        raise ConfigError(f"{what} is {value}, which {by_what}={by} does not divide")
    return value // by
