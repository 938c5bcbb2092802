"""Extraction in plain numpy, slow and whole-level: what dfx must give. Uses nothing of dfx and no image library."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def level_and_scale(
    downsamples: list[float], resolution: float, units: str, mpp: float, power: float
) -> tuple[int, float, float]:
    """The level to read, its scale against the resolution, and its downsample."""
    scales = []
    for ds in downsamples:
        if units == "mpp":
            scales.append(mpp * ds / resolution)
        elif units == "power":
            scales.append((1 / power) * ds / (1 / resolution))
        elif units == "baseline":
            scales.append(ds / (1 / resolution))
        else:
            scales.append(ds / downsamples[int(resolution)])
    fine = [n for n, s in enumerate(scales) if np.round(s, 3) <= 1]
    level = fine[-1] if fine else 0
    return level, scales[level], downsamples[level]


def positions(
    size_xy: tuple[int, int], shape: tuple[int, int], stride: tuple[int, int], mask: NDArray[Any] | None, ratio: float
) -> set[tuple[int, int]]:
    """Top left corners of the patches that a mask keeps, one look at a time."""
    kept = set()
    for y in range(0, size_xy[1], stride[0]):
        for x in range(0, size_xy[0], stride[1]):
            if mask is not None:
                rows, columns = mask.shape
                x0, x1 = (int(min(np.float32(v * (columns / size_xy[0])), columns)) for v in (x, x + shape[1]))
                y0, y1 = (int(min(np.float32(v * (rows / size_xy[1])), rows)) for v in (y, y + shape[0]))
                x0, y0 = min(x0, columns - 1), min(y0, rows - 1)
                window = mask[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
                if not window.any() or (not window.all() and window.mean() <= ratio):
                    continue
            kept.add((x, y))
    return kept


def own_factors(whole_xy: tuple[int, int], factors: tuple[float, float], downsample: float) -> tuple[float, float]:
    """The factors by which each axis of a level is read: the mean, unless it is a pixel of the level off at the end."""
    x, y = (f if abs(w / f - w / downsample) >= 1 else downsample for w, f in zip(whole_xy, factors, strict=True))
    return x, y


def patch_at(
    level: NDArray[np.uint8],
    x: int,
    y: int,
    shape: tuple[int, int],
    scale: float,
    downsample: float,
    own: tuple[float, float],
    to_baseline: tuple[float, float],
) -> NDArray[np.float64]:
    """One patch: cut from the level padded with white, then resampled. float64, unrounded.

    `own`: see `own_factors`; `to_baseline`: baseline pixels per requested pixel.
    """
    k = 1 / downsample * scale

    def on_level(value: int, axis: int) -> int:
        if own[axis] == downsample:
            return int(np.rint(np.ceil(value / k) / downsample))
        return int(np.rint(value * to_baseline[axis] / own[axis]))

    x0, y0 = on_level(x, 0), on_level(y, 1)
    w, h = max(1, on_level(shape[1], 0)), max(1, on_level(shape[0], 1))
    white = np.full((h, w, 3), 255.0)
    piece = level[y0 : y0 + h, x0 : x0 + w]
    white[: piece.shape[0], : piece.shape[1]] = piece
    return resize(resize(white, shape[0], axis=0, area=h >= shape[0]), shape[1], axis=1, area=w >= shape[1])


def resize(image: NDArray[np.float64], size: int, axis: int, area: bool) -> NDArray[np.float64]:
    """Resample one axis: by area averaging, or by cubic convolution with a = -0.75."""
    n = image.shape[axis]
    if n == size:
        return image
    weights = np.zeros((size, n))
    step = n / size
    for i in range(size):
        if area:
            start, stop = i * step, (i + 1) * step
            for j in range(int(start), min(n, int(np.ceil(stop)))):
                weights[i, j] = max(0.0, min(stop, j + 1) - max(start, j)) / step
        else:
            centre = (i + 0.5) * step - 0.5
            left = int(np.floor(centre))
            for j in range(left - 1, left + 3):
                d = abs(centre - j)
                a = -0.75
                near = (a + 2) * d**3 - (a + 3) * d**2 + 1
                far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
                weights[i, min(max(j, 0), n - 1)] += near if d <= 1 else far if d < 2 else 0
    return np.moveaxis(np.tensordot(weights, image, (1, axis)), 0, axis)
