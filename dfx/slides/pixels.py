"""Copying and averaging the pixels of tiles. Pure functions of arrays."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray


def paste(canvas: NDArray[Any], tile: NDArray[Any], at_yx: tuple[int, int]) -> None:
    """Copy the part of a tile that lies on the canvas; the tile's corner lies at `at_yx`."""
    (top, left), (rows, columns, _) = at_yx, canvas.shape
    part = tile[max(-top, 0) : max(rows - top, 0), max(-left, 0) : max(columns - left, 0)]
    top, left = max(top, 0), max(left, 0)
    canvas[top : top + part.shape[0], left : left + part.shape[1]] = part


def shrink(tile: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Shrink an RGB tile by a whole factor, by area averaging; white fills the area beyond its last pixels."""
    rows, columns = (-(-size // factor) for size in tile.shape[:2])
    if tile.shape[:2] != (rows * factor, columns * factor):
        white = np.full((rows * factor, columns * factor, 3), 255, np.uint8)
        paste(white, tile, (0, 0))
        tile = white
    small = cv2.resize(np.ascontiguousarray(tile), (columns, rows), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.uint8).reshape(rows, columns, 3)


def area_averages(image: NDArray[Any], edges: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Average an image along an axis between consecutive edges, which may lie within pixels."""
    image = np.moveaxis(image, axis, 0)
    whole = np.minimum(edges.astype(np.intp), len(image) - 1)
    sums = np.zeros((len(image) + 1, *image.shape[1:]))
    np.cumsum(image, axis=0, out=sums[1:])
    column = (-1, *[1] * (image.ndim - 1))
    until = sums[whole] + image[whole] * (edges - whole).reshape(column)
    return np.moveaxis(np.diff(until, axis=0) / np.diff(edges).reshape(column), 0, axis)
