"""The pixels of many patches at once: each tile decoded once into a reused canvas, then resampled."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import cv2
import numpy as np
from numpy.typing import NDArray

from dfx.resolution import View
from dfx.slides import Slide

MOST_PATCHES = 64
MOST_CANVAS_BYTES = 24 * 2**20
"""A sub-block's canvas stays about this small, so that it is warm in cache when patches are cut from it."""

_thread = threading.local()


def canvas(rows: int, columns: int) -> NDArray[np.uint8]:
    """Give this thread's canvas as uint8 (rows, columns, 3); what it held before is still on it.

    Fresh large buffers cost more than half of the reading speed (page faults), so each thread keeps one.
    """
    size = rows * columns * 3
    buffer: NDArray[np.uint8] | None = getattr(_thread, "canvas", None)
    if buffer is None or buffer.size < size:
        buffer = np.empty(size, np.uint8)
        if size <= 2 * MOST_CANVAS_BYTES:  # one huge patch must not hold its memory for ever
            _thread.canvas = buffer
    return buffer[:size].reshape(rows, columns, 3)


def read_patches(
    slide: Slide,
    view: View,
    origins_xy: NDArray[np.integer],
    shape_yx: tuple[int, int],
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Read patches, uint8 RGB (N, rows, columns, 3).

    `origins_xy`: int (N, 2), top left corners (x, y) at the view's resolution. Pixels beyond the
    slide are white (255). A patch that needs no resampling has the file's own pixels; shrinking
    averages areas, enlarging is cubic. Raises `SlideError` when a tile can't be read.
    """
    h, w = shape_yx
    if out is None:
        out = np.empty((len(origins_xy), h, w, 3), np.uint8)
    corners, size = view.rectangles(origins_xy, shape_yx)
    level = slide.levels[view.level]
    height, width = level.shape_yx
    boxes = np.concatenate([corners, corners + size], axis=1)[:, [1, 0, 3, 2]]  # y0 x0 y1 x1
    for start, stop in sub_blocks(boxes):
        part = boxes[start:stop]
        y0, x0 = part[:, :2].min(axis=0).tolist()
        y1, x1 = part[:, 2:].max(axis=0).tolist()
        pixels = canvas(y1 - y0, x1 - x0)
        if level.has_gaps or y1 > height or x1 > width or y0 < 0 or x0 < 0:
            pixels.fill(255)
        slide.read_tiles(view.level, pixels, (y0, x0), part, rgb=True)
        for patch, (top, left, bottom, right) in zip(out[start:stop], (part - [y0, x0, y0, x0]).tolist(), strict=True):
            resample(pixels[top:bottom, left:right], patch)
    return out


def sub_blocks(boxes: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Cut a sequence of (y0, x0, y1, x1) into runs whose common canvas is small."""
    start, bound = 0, (0, 0, 0, 0)
    for i, (y0, x0, y1, x1) in enumerate(boxes.tolist()):
        top, left, bottom, right = min(bound[0], y0), min(bound[1], x0), max(bound[2], y1), max(bound[3], x1)
        small = (bottom - top) * (right - left) * 3 <= MOST_CANVAS_BYTES
        if start < i < start + MOST_PATCHES and small:
            bound = top, left, bottom, right
            continue
        if i:
            yield start, i
        start, bound = i, (y0, x0, y1, x1)
    if len(boxes):
        yield start, len(boxes)


def resample(region: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Bring a region to the size of `out`, in place: the same pixels where it has it already."""
    (rows, columns), (h, w) = region.shape[:2], out.shape[:2]
    if (rows, columns) == (h, w):
        out[...] = region
        return
    if (rows < h and columns > w) or (rows > h and columns < w):  # shrink one axis first, then enlarge the other
        region = np.asarray(cv2.resize(region, (min(columns, w), min(rows, h)), interpolation=cv2.INTER_AREA), np.uint8)
    how = cv2.INTER_AREA if rows >= h and columns >= w else cv2.INTER_CUBIC
    cv2.resize(region, (w, h), dst=out, interpolation=how)
