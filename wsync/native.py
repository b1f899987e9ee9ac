"""The compiled extension ``wsync._C``, looked up once, with a named error where it was not built."""

from __future__ import annotations

import importlib
from typing import Any

from wsync.errors import ConfigError


def load_extension() -> Any:
    """The module ``wsync._C``.

    Raises:
        ConfigError: it was not built for this Python, or cannot be loaded.
    """
    try:
        return importlib.import_module("wsync._C")
    except ImportError as e:
        raise ConfigError(
            f"the extension wsync._C cannot be loaded: {e}",
            hint="build it: make setup, or pip install -e . (needs g++)",
        ) from e
