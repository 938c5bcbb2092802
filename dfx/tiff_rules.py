"""Rules of TIFF that slides and masks share. Pure arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def palette_colours(colormap: Any) -> NDArray[np.uint8]:
    """Return the colours of a ColorMap (3, indices) of 16 bits: uint8 (indices, 3).

    Some writers store 8 bits, 0 to 255. If no value is larger, the values are taken as 8 bits, as libtiff does: as 16
    bits, all colours would be black.
    """
    table = np.asarray(colormap)
    return np.ascontiguousarray((table if table.max() < 256 else table >> 8).astype(np.uint8).T)


def has_aspect(size_yx: tuple[int, int], whole_yx: tuple[int, int]) -> bool:
    """Return whether an image can be a reduced version of another by its rows and columns, which may be rounded."""
    (rows, columns), step = size_yx, whole_yx[0] / whole_yx[1]
    return bool(abs(rows - step * columns) <= max(1.5, 0.02 * rows, 1.5 * step))
