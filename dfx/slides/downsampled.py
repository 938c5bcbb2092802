"""Tiles that a level lacks, drawn from the next finer level, as OpenSlide's driver does for Aperio's slides.

Some encoders leave single tiles without data. Where a tile of the baseline is missing, the tiles of lower levels
that cover it are there, and some hold garbage (openslide-vendor-aperio.c, `propagate_missing_tile`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfx.slides.level import Level, StoredTiles, TileGrid, as_rgb
from dfx.slides.pixels import area_averages, paste
from dfx.slides.pixels import shrink as shrink_tile
from dfx.slides.source import ByteSource

MOST_SAMPLES = 2**22
"""Samples of the finer level that are averaged at once; sums of them take 8 bytes each."""


def fill_from_finer(levels: Sequence[Level]) -> tuple[list[Level], tuple[str, ...]]:
    """Return levels, and notes. Tiles that are missing, or cover a missing tile of the finer level, are drawn from it.

    The given levels, finest first, have one part each. Tiles that the baseline lacks stay missing.
    """
    notes = []
    filled = [levels[0]]
    gaps = ~levels[0].parts[0].present
    for n, level in enumerate(levels[1:]):
        (part,), finer = level.parts, filled[n]
        assert isinstance(part, StoredTiles)
        (x, y), (finer_x, finer_y) = (one.downsample_xy or (one.downsample,) * 2 for one in (level, finer))
        factor = y / finer_y, x / finer_x
        gaps = ~part.present | covering(gaps, finer.parts[0], part, factor)
        if gaps.any():
            stored = replace(part, counts=np.where(gaps, 0, part.counts))
            drawn = DownsampledTiles(part.origin_yx, part.shape_yx, part.tile_yx, gaps, finer, n, factor)
            level = replace(level, parts=(stored, drawn))
            count = f"{gaps.sum()} tiles of level {n + 1}"
            notes.append(f"{count} are missing or cover a missing tile; they are drawn from level {n}")
        filled.append(level)
    return filled, tuple(notes)


def covering(
    gaps: NDArray[np.bool_], finer: TileGrid, coarser: TileGrid, factor_yx: tuple[float, float]
) -> NDArray[np.bool_]:
    """Return which tiles of a coarser level have pixels that lie on missing tiles of the finer level, bool.

    The centre of a pixel decides where it lies: with a factor of 4.0002, a tile covers no tiles of its neighbours.
    """
    for axis, (count, factor) in enumerate(zip(coarser.present.shape, factor_yx, strict=True)):
        edges = np.minimum(np.arange(gaps.shape[axis] + 1) * finer.tile_yx[axis], finer.shape_yx[axis])
        pixels = np.minimum(np.ceil(edges / factor - 0.5).astype(int), coarser.shape_yx[axis])
        source = np.moveaxis(gaps, axis, 0)
        found = np.zeros((count, source.shape[1]), np.bool_)
        for gap, start, stop in zip(source, pixels, pixels[1:], strict=False):
            if stop > start:
                found[start // coarser.tile_yx[axis] : -(-stop // coarser.tile_yx[axis])] |= gap
        gaps = np.moveaxis(found, 0, axis)
    return gaps


@dataclass(frozen=True, eq=False)
class DownsampledTiles(TileGrid):
    """Some tiles of a level, as averages of areas of the next finer level."""

    wanted: NDArray[np.bool_]
    """(rows, columns): which tiles are drawn."""
    finer: Level
    """The next finer level."""
    number: int
    """Its number."""
    factor_yx: tuple[float, float]
    """Pixels of the finer level per pixel."""

    @property
    def present(self) -> NDArray[np.bool_]:
        """(rows, columns): which tiles are drawn."""
        return self.wanted

    @property
    def can_shrink(self) -> bool:
        """Always: by area averaging."""
        return True

    @property
    def working_bytes(self) -> int:
        """Bytes that `tile` takes beside the tile."""
        return 16 * MOST_SAMPLES + max(part.working_bytes for part in self.finer.parts)

    def edges(self, row: int, column: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return where the rows and columns of a tile's pixels begin and end on the finer level."""
        (rows, columns), (height, width) = self.extent(row, column), self.tile_yx
        y, x = row * height + self.origin_yx[0], column * width + self.origin_yx[1]
        ys, xs = np.arange(y, y + rows + 1, dtype=np.float64), np.arange(x, x + columns + 1, dtype=np.float64)
        return ys * self.factor_yx[0], xs * self.factor_yx[1]

    def pieces(self, row: int, column: int) -> list[tuple[int, int]]:
        """Return where the bytes of the finer level's tiles lie."""
        boxes = np.array([box_between(*self.edges(row, column))])
        return [piece for part in self.finer.parts for at in part.touching(boxes) for piece in part.pieces(*at)]

    def tile(self, source: ByteSource, row: int, column: int, name: str, *, scratch: bool, shrink: int) -> NDArray[Any]:
        """Average the finer level, some rows at a time so that memory is bounded; errors name its tiles."""
        ys, xs = self.edges(row, column)
        per_row = self.factor_yx[0] * (xs[-1] - xs[0] + 2) * self.finer.channels
        step = max(1, int(MOST_SAMPLES / per_row))
        out = np.empty((len(ys) - 1, len(xs) - 1, self.finer.channels), self.finer.dtype)
        for top in range(0, len(out), step):
            some = ys[top : top + step + 1]
            box = box_between(some, xs)
            region = self.region(source, box)
            averages = area_averages(area_averages(region, some - box[0], 0), xs - box[1], 1)
            out[top : top + step] = averages.round() if out.dtype.kind in "iu" else averages
        return out if shrink == 1 else shrink_tile(out, shrink)

    def region(self, source: ByteSource, box: tuple[int, int, int, int]) -> NDArray[Any]:
        """Read pixels (y0, x0, y1, x1) of the finer level; background where it has no tile."""
        y0, x0, y1, x1 = box
        finer = self.finer
        canvas = np.full((y1 - y0, x1 - x0, finer.channels), finer.background, finer.dtype)
        for part in finer.parts:
            for row, column in part.touching(np.array([box])):
                at = part.origin_yx[0] + row * part.tile_yx[0] - y0, part.origin_yx[1] + column * part.tile_yx[1] - x0
                paste(canvas, finer.decode(source, self.number, part, row, column, scratch=True), at)
        if finer.colour == "rgba":  # colours with different alphas can't be averaged unless laid over white
            canvas[..., :3], canvas[..., 3] = as_rgb(canvas, finer.colour), 255
        return canvas


def box_between(ys: NDArray[np.float64], xs: NDArray[np.float64]) -> tuple[int, int, int, int]:
    """Return the box of pixels (y0, x0, y1, x1) that holds all edges."""
    return int(ys[0]), int(xs[0]), int(np.ceil(ys[-1])), int(np.ceil(xs[-1]))
