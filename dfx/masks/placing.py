"""Placing a mask on a slide that has bounds."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dfx.errors import CallError
from dfx.masks.image_file import MOST_PIXELS

Origin: TypeAlias = Literal["slide", "bounds"]
"""The corner at which a mask begins: the slide's, or the corner of its bounds."""
Bounds: TypeAlias = tuple[int, int, int, int]
"""(x, y, width, height) of the scanned area, in level-0 pixels."""


def origin_of(outlines: list[NDArray[np.float64]], bounds: Bounds | None, origin: Origin | None, name: str) -> Origin:
    """Find the corner from which coordinates (n, 2) of polygons count; raises `CallError` if only the user can know.

    OpenSlide and dfx count from the corner of the whole slide. QuPath crops slides for which OpenSlide gives bounds
    (Leica SCN, MIRAX), and counts from the corner of the bounds. If no origin is given, the origin with which some
    polygon overlaps the bounds is taken, if no polygon does so with the other origin.
    """
    if origin is not None:
        return origin
    if bounds is None or bounds[:2] == (0, 0):
        return "slide"
    corner, size = np.array(bounds[:2]), np.array(bounds[2:])
    low = np.array([outline.min(axis=0) for outline in outlines])
    high = np.array([outline.max(axis=0) for outline in outlines])
    slide, cropped = (
        bool(((high > start) & (low < start + size)).all(axis=1).any()) for start in (corner, np.zeros(2, np.int64))
    )
    if slide != cropped:
        return "slide" if slide else "bounds"
    x, y = bounds[:2]
    raise CallError(
        f"{name} has polygons that lie {'in' if slide else 'outside'} the scanned part of the slide, whether they "
        f"count from the corner of the slide or from the corner of its bounds, which begin at ({x}, {y}): pass "
        "mask_origin='bounds' (--mask-origin bounds) for polygons of QuPath, which crops such slides to their bounds, "
        "or mask_origin='slide' for coordinates of OpenSlide or dfx."
    )


def on_slide(
    cells: NDArray[np.bool_], size_xy: tuple[int, int], *, bounds: Bounds | None, origin: Origin | None, name: str
) -> NDArray[np.bool_]:
    """Give a mask (rows, columns) of a slide or of its bounds as a mask of the slide.

    Without an origin, it is taken as a mask of the slide. Raises `CallError` if it has the shape of the bounds and not
    of the slide.
    """
    if bounds is None or bounds == (0, 0, *size_xy) or origin == "slide":
        return cells
    if origin == "bounds":
        return over_slide(cells, bounds, size_xy)
    if has_shape_of(cells, bounds[2:]) and not has_shape_of(cells, size_xy):
        raise CallError(
            f"{name} has {cells.shape[1]} x {cells.shape[0]} cells, the shape of the slide's bounds "
            f"({bounds[2]} x {bounds[3]} pixels) and not of the slide ({size_xy[0]} x {size_xy[1]}): "
            "pass mask_origin='bounds' (--mask-origin bounds) where it covers the bounds, as images from QuPath do, "
            "or mask_origin='slide' where it covers the whole slide."
        )
    return cells


def has_shape_of(cells: NDArray[np.bool_], size_xy: tuple[int, int]) -> bool:
    """Whether a mask has the aspect ratio of an area, except for rounding to whole cells."""
    rows, columns = cells.shape
    width, height = size_xy
    return bool(abs(columns * height / width - rows) <= 1 or abs(rows * width / height - columns) <= 1)


def over_slide(cells: NDArray[np.bool_], bounds: Bounds, size_xy: tuple[int, int]) -> NDArray[np.bool_]:
    """Place a mask of a slide's bounds on the whole slide; cells become no larger, so that no cell is lost."""
    axes = list(zip(size_xy[::-1], bounds[1::-1], bounds[:1:-1], cells.shape, strict=True))
    shape = [math.ceil(whole * n / part) for whole, _, part, n in axes]
    if math.prod(shape) > MOST_PIXELS:
        raise CallError(
            f"a mask of {cells.shape[1]} x {cells.shape[0]} cells over the bounds has {shape[1]} x {shape[0]} cells "
            f"over the slide, more than {MOST_PIXELS:,}: make it coarser."
        )
    inside, index = [], []
    for count, (whole, start, part, n) in zip(shape, axes, strict=True):
        at = np.floor(((np.arange(count) + 0.5) * whole / count - start) * n / part).astype(np.int64)
        inside.append(np.flatnonzero((at >= 0) & (at < n)))
        index.append(at[inside[-1]])
    found = np.zeros(shape, np.bool_)
    found[np.ix_(*inside)] = cells[np.ix_(*index)]
    return found
