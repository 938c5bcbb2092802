"""Factors of a level along each axis, and whether an image can be a level of the baseline. Pure arithmetic.

The sizes of images alone do not give the factors: a level may have lost odd rows, or may be padded to whole tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from dfx.slides.vendors import plausible

Pair: TypeAlias = tuple[float, float]

TILES_OF_PADDING = 2
"""A level is padded by less than this number of tiles: its own padding, and half of its finer neighbour's padding."""
IMPRECISE = 0.02
"""Relative error of a pixel size that a file states in few digits."""
ROUNDED = 1e-6
"""Error of floating point, in pixels."""


@dataclass(frozen=True)
class Image:
    """An image of a file, as its tags describe it. All pairs are (x, y)."""

    size_xy: tuple[int, int]
    """Width and height as they are stored."""
    tile_xy: tuple[int, int] | None = None
    """Width and height of a tile; None where it has strips."""
    pixel_xy: Pair | None = None
    """Width and height of a pixel in microns; None where the file does not say."""


def said_downsample(whole: Image, level: Image) -> Pair | None:
    """Return the ratios of pixel sizes; None if the sizes are not known, or if no slide has such sizes (72 dpi)."""
    if whole.pixel_xy is None or level.pixel_xy is None or plausible(*whole.pixel_xy) is None:
        return None
    return level.pixel_xy[0] / whole.pixel_xy[0], level.pixel_xy[1] / whole.pixel_xy[1]


def agrees(whole: Image, level: Image) -> bool:
    """Return whether the sizes of pixels and of images agree that one image is a smaller version of the other."""
    said = said_downsample(whole, level)
    return said is not None and max(said) > 1 and _fits(whole, level, said)


def contradicts(whole: Image, level: Image, *, marked: bool) -> bool:
    """Return whether the sizes of pixels say that one image is no smaller version of the other.

    Some writers copy the baseline's resolution to its levels: for a level that is `marked`, that is no contradiction.
    """
    said = said_downsample(whole, level)
    if said is None or level.pixel_xy is None or agrees(whole, level):
        return False
    copied = max(abs(s - 1) for s in said) < IMPRECISE
    return plausible(*level.pixel_xy) is not None and not (marked and copied)


def downsample_xy(whole: Image, level: Image) -> Pair | None:
    """Return the baseline pixels per pixel of a level along x and y; None if they are doubtful.

    The first of these that applies:

    - a whole factor that gives the level's size on both axes, with any rounding, unless the file says that the level is
      padded to whole tiles;
    - the factors that the file states, if a padded level with these factors has that size;
    - the ratio of the sizes, if it is the same on both axes except for rounding, and no whole factor explains the sizes
      by padding.
    """
    whole_factor = _whole_factor(whole, level)
    said = said_downsample(whole, level)
    if said is not None and agrees(whole, level):
        if whole_factor and all(abs(s / whole_factor - 1) < IMPRECISE for s in said):
            return whole_factor, whole_factor
        axes = list(zip(whole.size_xy, level.size_xy, said, level.tile_xy or (0, 0), strict=True))
        padded = [(n, tile, s) for w, n, s, tile in axes if n > w / s and not _rounds(w, n, s)]
        if whole_factor and any(n % tile or not _neat(s).is_integer() for n, tile, s in padded):
            return None
        x, y = (_along(w, n, s) for w, n, s, _ in axes)
        return x, y
    if whole_factor:
        odd = not math.log2(whole_factor).is_integer()
        return None if odd and _may_be_padded(whole, level, in_tiles=True) else (whole_factor, whole_factor)
    x, y = ratio(whole.size_xy, level.size_xy)
    alike = _rounds(whole.size_xy[1], level.size_xy[1], x) or _rounds(whole.size_xy[0], level.size_xy[0], y)
    return (x, y) if min(x, y) > 1 and alike and not _may_be_padded(whole, level) else None


def ratio(whole_xy: tuple[int, int], level_xy: tuple[int, int]) -> Pair:
    """Return the ratio of two images' sizes along x and y."""
    return whole_xy[0] / level_xy[0], whole_xy[1] / level_xy[1]


def used_size(whole_xy: tuple[int, int], stored_xy: tuple[int, int], downsample: Pair) -> tuple[int, int]:
    """Return the width and height of a level that lie on the slide; pixels beyond them are padding."""
    x, y = (
        stored if stored < whole / factor + 1 - ROUNDED else max(1, math.floor(whole / factor + ROUNDED))
        for whole, stored, factor in zip(whole_xy, stored_xy, downsample, strict=True)
    )
    return x, y


def _rounds(whole: int, level: int, factor: float) -> bool:
    """Return whether a size divided by a factor gives a level's size, rounded down, up or to the nearest."""
    return abs(whole / factor - level) < 1 - ROUNDED


def _fits(whole: Image, level: Image, factors: Pair) -> bool:
    """Return whether a level of these factors, padded or not, can have its size."""
    room = level.tile_xy or (0, 0)
    return all(
        -TILES_OF_PADDING * tile < w / factor - n < 1 + IMPRECISE * n or _rounds(w, n, factor)
        for w, n, factor, tile in zip(whole.size_xy, level.size_xy, factors, room, strict=True)
    )


def _neat(factor: float) -> float:
    """Return the power of two or the whole number near a factor of few digits, else the factor."""
    power = 2.0 ** round(math.log2(factor))
    if abs(factor / power - 1) < IMPRECISE:
        return power
    return float(round(factor)) if abs(factor / round(factor) - 1) < 0.005 else factor


def _whole_factor(whole: Image, level: Image) -> float | None:
    """Return the whole factor by which both axes are smaller, a power of two where there are several; else None."""
    sizes = list(zip(whole.size_xy, level.size_xy, strict=True))
    low = max(w / (n + 1) for w, n in sizes)
    high = min(w / (n - 1) if n > 1 else math.inf for w, n in sizes)
    long, short = max(sizes, key=lambda size: size[1])
    nearest = max(1.0, long / short)
    powers = [2.0**n for n in (math.floor(math.log2(nearest)), math.ceil(math.log2(nearest)))]
    wholes = [float(n) for n in (round(nearest), math.floor(low) + 1, math.ceil(min(high, 2 * nearest)) - 1)]
    found = [f for f in (*powers, *wholes) if f > 1 and all(_rounds(w, n, f) for w, n in sizes)]
    return found[0] if found else None


def _along(whole: int, level: int, said: float) -> float:
    """Return the stated factor along an axis, neat or exact, if the sizes allow it; else the ratio of the sizes."""
    neat = _neat(said)
    if whole / neat - level < 1 - ROUNDED:
        return neat
    return said if whole / said - level < 1 - ROUNDED else whole / level


def _may_be_padded(whole: Image, level: Image, *, in_tiles: bool = False) -> bool:
    """Return whether a whole factor explains both axes by a size that is padded to whole tiles.

    With `in_tiles`, only if both sizes are whole tiles and the factor is a power of two.
    """
    tiles = level.tile_xy
    if tiles is None or (in_tiles and any(n % tile for n, tile in zip(level.size_xy, tiles, strict=True))):
        return False
    low, high = 1.0, math.inf
    for w, n, tile in zip(whole.size_xy, level.size_xy, tiles, strict=True):
        least, most = w / (n + 1), (w / (n - 1) if n > 1 else math.inf)
        if n % tile == 0:  # else its size is only rounded
            most = w / (n - tile) if n > tile else math.inf
        low, high = max(low, least), min(high, most)
    next_whole = math.floor(low) + 1
    return (2 ** math.ceil(math.log2(next_whole)) if in_tiles else next_whole) < high
