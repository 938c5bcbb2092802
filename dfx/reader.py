"""The pixels of many patches at once: each tile is decoded once, then copied or resampled into patches.

Patches at a level, or shrunk by a whole factor from one, are copied straight out of each tile. All others
are cut from a canvas of tiles that the thread reuses.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import cv2
import numpy as np
from numpy.typing import NDArray

from dfx.resolution import View
from dfx.slides import Slide
from dfx.slides.ahead import AHEAD
from dfx.slides.buffers import BufferPool, unwritten
from dfx.slides.jpeg import SHRINKS
from dfx.slides.level import Level
from dfx.slides.pixels import paste, shrink

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
    return unwritten(buffer[:size]).reshape(rows, columns, 3)


POOL = BufferPool(256 * 2**20)
"""Patches that were read into arrays of their own."""


def read_patches(
    slide: Slide,
    view: View,
    origins_xy: NDArray[np.integer],
    shape_yx: tuple[int, int],
    out: NDArray[np.uint8] | None = None,
    *,
    pixels_yx: tuple[int, int] | None = None,
    stride_yx: tuple[int, int] | None = None,
    fast: bool = False,
    damaged: set[str] | None = None,
    following_xy: NDArray[np.integer] | None = None,
) -> NDArray[np.uint8]:
    """Read patches, uint8 RGB (N, rows, columns, 3).

    `origins_xy`: int (N, 2), top left corners (x, y) at the view's resolution, of patches of `shape_yx`
    there; `pixels_yx`: what they are resampled to, where not that; `stride_yx`: from one to the next where they
    are some of a grid, so that tiles on their border are kept for the others. Pixels beyond the slide are
    white (255). A patch that needs no resampling has the file's own pixels; shrinking averages areas,
    enlarging is cubic. `fast`: JPEG tiles that are shrunk by a whole factor are halved while they are
    decoded, as often as the factor allows. `following_xy`: patches that will be read next, whose tiles a
    remote slide fetches meanwhile. Raises
    `SlideError` when a tile can't be read; with `damaged`, tiles that can't be decoded are white, and
    their names are added there.
    """
    pixels_yx = pixels_yx or shape_yx
    if out is None:
        out = POOL.empty((len(origins_xy), *pixels_yx, 3))
    boxes, (w, h) = boxes_of(view, origins_xy, shape_yx)
    following = None
    if slide.source.prefetches and following_xy is not None and len(following_xy):
        following, _ = boxes_of(view, following_xy, shape_yx)
    pitch = None if stride_yx is None else (stride_yx[0] / view.read_scale_xy[1], stride_yx[1] / view.read_scale_xy[0])
    level = slide.levels[view.level]
    uncovered = ~level.covers(boxes)
    factor = whole_factor(boxes, (h, w), pixels_yx, level)
    if factor:
        out[uncovered] = 255
        divides = (n for n in SHRINKS if fast and factor % n == 0 and slide.can_shrink(view.level, n))
        by = next(divides, 1)
        corners_yx = (boxes[:, :2] // by).tolist()  # lists: an array costs more, a number at a time
        for tile, (y, x), touching in slide.tiles(
            view.level, boxes, rgb=True, pitch_yx=pitch, shrink=by, damaged=damaged, following=following
        ):
            spread(tile, (y // by, x // by), corners_yx, touching, out, factor // by)
        return out
    cuts = list(sub_blocks(boxes))
    for n, (start, stop) in enumerate(cuts):
        part = boxes[start:stop]
        then = boxes[slice(*cuts[n + 1])] if n + 1 < len(cuts) else following
        (y0, x0), (y1, x1) = part[:, :2].min(axis=0).tolist(), part[:, 2:].max(axis=0).tolist()
        pixels = canvas(y1 - y0, x1 - x0)
        if uncovered[start:stop].any():
            pixels.fill(255)
        for tile, (y, x), _ in slide.tiles(view.level, part, rgb=True, pitch_yx=pitch, damaged=damaged, following=then):
            paste(pixels, tile, (y - y0, x - x0))
        for patch, (top, left, bottom, right) in zip(out[start:stop], (part - [y0, x0, y0, x0]).tolist(), strict=True):
            resample(pixels[top:bottom, left:right], patch)
    return out


def boxes_of(
    view: View, origins_xy: NDArray[np.integer], shape_yx: tuple[int, int]
) -> tuple[NDArray[np.int64], tuple[int, int]]:
    """Give patches as (y0, x0, y1, x1) on the level, int (N, 4), and their width and height there."""
    corners, size_xy = view.rectangles(origins_xy, shape_yx)
    return np.concatenate([corners, corners + np.array(size_xy)], axis=1)[:, [1, 0, 3, 2]], size_xy


def working_memory(
    slide: Slide,
    view: View,
    origins_xy: NDArray[np.integer],
    shape_yx: tuple[int, int],
    pixels_yx: tuple[int, int],
) -> int:
    """Bytes that a thread takes to read these patches at once, the patches themselves not counted."""
    boxes, (w, h) = boxes_of(view, origins_xy, shape_yx)
    level = slide.levels[view.level]
    tile = 2 * int(np.prod(level.tile_yx)) * max(3, level.channels * level.dtype.itemsize)  # compressed and decoded
    tile += max(part.working_bytes for part in level.parts)
    tile += 2 * AHEAD if slide.source.prefetches else 0
    if whole_factor(boxes, (h, w), pixels_yx, level):
        return tile
    canvases = (
        boxes[start:stop, 2:].max(axis=0) - boxes[start:stop, :2].min(axis=0) for start, stop in sub_blocks(boxes)
    )
    return tile + max((int(yx[0]) * int(yx[1]) * 3 for yx in canvases), default=0)


def whole_factor(boxes: NDArray[np.int64], size_yx: tuple[int, int], shape_yx: tuple[int, int], level: Level) -> int:
    """By how much patches are shrunk, where each of their pixels is a square of pixels of one tile; else 0."""
    factor = size_yx[0] // shape_yx[0]
    squares = [boxes, *(np.array([*part.origin_yx, *part.tile_yx]) for part in level.parts)]
    if len(level.parts) > 1:  # at the end of a part, a pixel may also cover the next part
        squares += [np.array(part.shape_yx) for part in level.parts]
    whole = size_yx == (shape_yx[0] * factor, shape_yx[1] * factor) and factor > 0
    return factor if whole and not any((numbers % factor).any() for numbers in squares) else 0


def spread(
    tile: NDArray[np.uint8],
    at_yx: tuple[int, int],
    corners_yx: list[list[int]],
    touching: list[int],
    out: NDArray[np.uint8],
    factor: int,
) -> None:
    """Copy a tile to the patches that it touches, shrunk by a whole factor.

    While it is in the processor's cache: through a canvas, each pixel would go to memory and back.
    """
    if factor > 1:
        tile = shrink(tile, factor)
    y, x = at_yx
    for i in touching:
        top, left = corners_yx[i]
        paste(out[i], tile, ((y - top) // factor, (x - left) // factor))


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
