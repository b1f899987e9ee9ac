"""What makes the highest of many levels count most."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def steep(levels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Levels to the power of 31: what they cost more by, so that the highest counts most.

    Products are the same bits on every machine; a library's power function is not.
    """
    out = power = levels
    for _ in range(4):
        power = power * power
        out = out * power
    return out
