"""Arithmetic between the baseline, a pyramid level and a requested resolution. Pure.

The choice of level, the slide's size and the rounding of positions are those of TIAToolbox 2.1.3
(`WSIReader._find_optimal_level_and_downsample`, `find_read_bounds_params`), so that the patches of
both lie on the same pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dfx.errors import CallError, CallTypeError, ResolutionError

Units: TypeAlias = Literal["mpp", "power", "level", "baseline"]
UNITS: tuple[Units, ...] = ("mpp", "power", "level", "baseline")


def pair(value: Any, name: str) -> tuple[float, float]:
    """Give a positive number, or a pair (x, y) of them, as a pair.

    Raises `CallTypeError` for what is no number or pair, `CallError` for one that is not positive
    and finite; `name` says whose value it is.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    items = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value] * 2
    if len(items) != 2 or any(isinstance(i, bool) or not isinstance(i, int | float | np.number) for i in items):
        raise CallTypeError(f"{name} must be a number or a pair (x, y) of numbers, not {value!r}.")
    try:
        x, y = (float(i) for i in items)
    except OverflowError:
        x = y = math.inf
    if not all(1e-9 < i < 1e9 for i in (x, y)):
        raise CallError(f"{name} must be a positive number that can be meant, not {value!r}.")
    return x, y


def one(value: Any, name: str) -> float:
    """Give a positive number as a float; raises as `pair` does, also for a pair."""
    if isinstance(value, Sequence | np.ndarray):
        raise CallTypeError(f"{name} must be a number, not {value!r}.")
    return pair(value, name)[0]


def check_resolution(resolution: Any, units: object) -> None:
    """Refuse a resolution that is wrong for any slide: an unknown unit, or no positive number."""
    if not isinstance(units, str) or units not in UNITS:
        raise CallError(f"units must be one of {', '.join(UNITS)}, not {units!r}.")
    if units != "level":
        pair(resolution, f"resolution in {units}")
        return
    is_number = isinstance(resolution, int | float | np.number) and not isinstance(resolution, bool)
    if not is_number or not 0 <= resolution < 1000 or resolution != int(resolution):
        raise CallError(
            f"a level is a whole number from 0 (the baseline), not {resolution!r}; "
            "for a scale between levels use units='baseline' or 'mpp'."
        )


def plain(resolution: Any) -> float | tuple[float, float]:
    """Give a resolution as Python numbers, which JSON has."""
    if isinstance(resolution, np.generic):
        return resolution.item()  # type: ignore[no-any-return]
    if isinstance(resolution, Sequence | np.ndarray):
        return float(resolution[0]), float(resolution[1])
    return resolution  # type: ignore[no-any-return]


@dataclass(frozen=True)
class View:
    """How a slide is read at one resolution."""

    level: int
    """The pyramid level that is read: the coarsest one that is at least as fine as asked."""
    scale_xy: tuple[float, float]
    """Requested pixels per pixel of that level; above 1 where the slide itself is coarser."""
    downsample: float
    """Baseline pixels per pixel of that level."""
    size_xy: tuple[int, int]
    """Width and height of the whole slide at the requested resolution."""
    resolution: float | tuple[float, float]
    """The requested value."""
    units: Units
    """Its units."""
    downsample_xy: tuple[float, float] | None = None
    """Baseline pixels per pixel of that level in x and y, if `downsample` is not true; None: it is true on both axes.

    It counts as true on an axis if it moves the slide's far end by less than a pixel of the level.
    """

    @property
    def resolution_json(self) -> float | list[float]:
        """The requested value as JSON has it: a pair is a list."""
        return list(self.resolution) if isinstance(self.resolution, tuple) else self.resolution

    @property
    def to_baseline(self) -> tuple[float, float]:
        """(x, y) factors from positions at the requested resolution to baseline pixels."""
        x, y = self.downsample, self.downsample
        if self.units == "level" and self.downsample_xy:  # positions are pixels of a level, so its own factors hold
            x, y = self.downsample_xy
        return x / self.scale_xy[0], y / self.scale_xy[1]

    @property
    def read_scale_xy(self) -> tuple[float, float]:
        """Requested pixels per pixel of the level: `scale_xy`, but by the true factors of each axis."""
        if self.downsample_xy is None:
            return self.scale_xy
        (x, y), (to_x, to_y) = self.downsample_xy, self.to_baseline
        return x / to_x, y / to_y

    def rectangles(
        self, origins_xy: NDArray[np.integer], shape_yx: tuple[int, int]
    ) -> tuple[NDArray[np.int64], tuple[int, int]]:
        """Where patches lie on the level that is read.

        `origins_xy`: int (N, 2), top left corners at the requested resolution. Gives the corners
        on the level, int64 (N, 2) as (x, y), and the size (width, height) that each patch covers
        there. Rounding follows the reference: up to whole baseline pixels, then to the nearest pixel of the level.
        Along an axis whose factor is not `downsample`, the true position is rounded to the nearest pixel of the level.
        """
        # 1 / downsample first, then divide: another order rounds some positions the other way.
        from_baseline = 1 / self.downsample * np.asarray(self.scale_xy)
        if self.to_baseline == (1.0, 1.0):  # what is whole already stays so
            from_baseline = np.ones(2)
        corner = np.rint(np.ceil(origins_xy / from_baseline) / self.downsample).astype(np.int64)
        size = np.rint(np.ceil(np.array(shape_yx[::-1]) / from_baseline) / self.downsample).astype(np.int64)
        for axis, factor in enumerate(self.downsample_xy or ()):
            if factor != self.downsample:
                scale = self.read_scale_xy[axis]
                corner[:, axis] = np.rint(origins_xy[:, axis] / scale)
                size[axis] = np.rint(shape_yx[1 - axis] / scale)
        return corner, (max(1, int(size[0])), max(1, int(size[1])))


def level_scales(
    downsamples: Sequence[float],
    resolution: float | tuple[float, float],
    units: Units,
    *,
    mpp: tuple[float, float] | None,
    power: float | None,
    name: str,
) -> NDArray[np.float64]:
    """Scale of each level against the resolution, float64 (levels, 2) as (x, y).

    Below 1 the level is finer than asked. Raises `ResolutionError` when the slide (`name`) lacks
    what the units need.
    """
    ds = np.asarray(downsamples, np.float64)[:, None]
    if units == "mpp":
        if mpp is None:
            guess = f" (its objective of {power:g}x suggests about {10 / power:g})" if power else ""
            raise ResolutionError(
                f"{name} has no microns per pixel, so {resolution} mpp can't be placed: "
                f"give the slide's own{guess} with open_slide(path, mpp=…), wsireader_kwargs={{'mpp': …}} "
                "or --slide-mpp, or use units='baseline' or 'level'."
            )
        return np.asarray(np.array(mpp) * ds / np.array(pair(resolution, "resolution")))
    if units == "power":
        if power is None:
            raise ResolutionError(
                f"{name} has no objective power, so {resolution}x can't be placed: "
                "give the slide's own with open_slide(path, power=…), wsireader_kwargs={'power': …} or --slide-power, "
                "or use units='mpp', 'baseline' or 'level'."
            )
        return np.asarray(np.array([1 / power] * 2) * ds / (1.0 / np.array(pair(resolution, "resolution"))))
    if units == "baseline":
        return np.asarray(ds / (1.0 / np.array(pair(resolution, "resolution"))))
    index = int(resolution)  # type: ignore[arg-type]  # check_resolution has seen to it
    if index >= len(downsamples):
        raise ResolutionError(f"{name} has levels 0 to {len(downsamples) - 1}, so level {index} can't be read.")
    return np.asarray(ds / np.array([downsamples[index]] * 2))


def view(
    downsamples: Sequence[float],
    baseline_size_xy: tuple[int, int],
    resolution: float | tuple[float, float],
    units: Units,
    *,
    mpp: tuple[float, float] | None = None,
    power: float | None = None,
    name: str = "the slide",
    downsamples_xy: Sequence[tuple[float, float] | None] | None = None,
) -> View:
    """Choose the level for a resolution and work out the slide's size there.

    `downsamples`: the mean factor of each level, by which the reference chooses and rounds. `downsamples_xy`: the
    factors that place its pixels on the baseline; None: the mean factor.
    """
    check_resolution(resolution, units)
    resolution = plain(resolution)
    scales = level_scales(downsamples, resolution, units, mpp=mpp, power=power, name=name)
    fine_enough = np.flatnonzero((np.round(scales, 3) <= 1).all(axis=1))
    level = int(fine_enough[-1]) if len(fine_enough) else 0
    scale = scales[level]
    mean = float(downsamples[level])
    own = (downsamples_xy[level] if downsamples_xy else None) or (mean, mean)
    off = [abs(length / factor - length / mean) >= 1 for length, factor in zip(baseline_size_xy, own, strict=True)]
    true = tuple(factor if far else mean for factor, far in zip(own, off, strict=True))
    size = np.rint(np.rint(np.array(baseline_size_xy) / (true if units == "level" else mean)) * scale).astype(np.int64)
    if (size < 1).any():
        raise ResolutionError(
            f"{name} is smaller than one pixel at {resolution} {units}: "
            f"it has {baseline_size_xy[0]} x {baseline_size_xy[1]} pixels at the baseline; ask for a finer resolution."
        )
    return View(
        level=level,
        scale_xy=(float(scale[0]), float(scale[1])),
        downsample=mean,
        size_xy=(int(size[0]), int(size[1])),
        resolution=resolution,
        units=units,
        downsample_xy=(true[0], true[1]) if any(off) else None,
    )
