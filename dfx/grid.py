"""Where the patches of a slide lie: positions, mask filter, order."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dfx import html
from dfx.coords import read_coords
from dfx.errors import CallError, CallTypeError
from dfx.masks import (
    Bounds,
    Mask,
    Origin,
    Segment,
    as_mask,
    draw,
    is_annotation,
    is_method,
    method_name,
    on_slide,
    read_mask,
)
from dfx.remote import shown
from dfx.resolution import Units, View

STRIP = 16
"""Width, in patches, of the vertical strips that order a grid: 256 patches then cover a square."""


MOST = 2**26
"""Positions that a grid may have before its mask: more is a mistake, and would not fit in memory."""


MOST_PIXELS = 2**28
"""Pixels that a patch may have."""


@runtime_checkable
class HasMask(Protocol):
    """What a grid asks of a slide that serves as a mask."""

    def as_mask(self) -> NDArray[np.bool_]:
        """Give the slide's own pixels as a mask."""
        ...


@runtime_checkable
class HasViews(Protocol):
    """What a grid asks of a slide."""

    @property
    def identity(self) -> str:
        """Names the slide's content."""
        ...

    @property
    def bounds(self) -> Bounds | None:
        """The scanned area, where it is not the whole slide: (x, y, width, height) at the baseline."""
        ...

    def view(self, resolution: float | tuple[float, float], units: Units) -> View:
        """Give the way in which the slide is read at a resolution."""
        ...

    def tissue_mask(self, method: str | Segment = "otsu") -> NDArray[np.bool_]:
        """Give a mask over the whole slide, true on tissue."""
        ...


def whole_pair(value: Any, name: str) -> tuple[int, int]:
    """Give a whole positive number, or a pair (rows, columns) of them, as a pair."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    items = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value] * 2
    if len(items) != 2 or any(isinstance(i, bool) or not isinstance(i, int | np.integer) for i in items):
        raise CallTypeError(f"{name} must be a whole number or a pair (rows, columns) of them, not {value!r}.")
    if min(items) < 1 or max(items) >= 2**31:
        raise CallError(f"{name} must be at least 1 pixel each way and below {2**31}, not {value!r}.")
    return int(items[0]), int(items[1])


def patch_shape(shape: Any) -> tuple[int, int]:
    """Give the shape of a patch as (rows, columns); raises `CallError` for one that is too large."""
    rows, columns = whole_pair(shape, "patch shape")
    if rows * columns > MOST_PIXELS:
        raise CallError(f"a patch of {rows} x {columns} pixels is more than {MOST_PIXELS:,}: use a smaller one.")
    return rows, columns


def check_ratio(ratio: object) -> float:
    """Give `min_mask_ratio` as a float from 0 to 1."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float | np.number):
        raise CallTypeError(f"min_mask_ratio must be a number from 0 to 1, not {ratio!r}.")
    if not 0 <= ratio <= 1:
        raise CallError(f"min_mask_ratio must be from 0 to 1, not {ratio!r}.")
    return float(ratio)


def check_origin(origin: object) -> Origin | None:
    """Give `mask_origin`; raises `CallError` for another value."""
    if origin is not None and origin not in get_args(Origin):
        raise CallError(f"mask_origin must be 'slide', 'bounds' or None, not {origin!r}.")
    return origin  # type: ignore[return-value]


def covered(
    origins_xy: NDArray[np.integer],
    shape_yx: tuple[int, int],
    size_xy: tuple[int, int],
    mask: NDArray[np.bool_],
    min_mask_ratio: float = 0.0,
) -> NDArray[np.bool_]:
    """Which patches the mask keeps, bool (N,).

    The mask is stretched over the whole slide (`size_xy`). A patch is kept when some of the mask
    under it is true and the true share is above `min_mask_ratio` (or 1). The window under a patch
    is truncated to whole cells in float32 as TIAToolbox does, but is never less than one cell, so
    that patches finer than the mask are kept.
    """
    cells = np.array(mask.shape[::-1])
    scale = cells / np.array(size_xy)
    ends = origins_xy + np.array(shape_yx[::-1])
    start = np.clip((origins_xy * scale).astype(np.float32), 0, cells.astype(np.float32)).astype(np.int64)
    stop = np.clip((ends * scale).astype(np.float32), 0, cells.astype(np.float32)).astype(np.int64)
    start = np.minimum(start, cells - 1)
    stop = np.maximum(stop, start + 1)
    total = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int32 if mask.size < 2**31 else np.int64)
    inner = total[1:, 1:]
    np.cumsum(mask, axis=0, out=inner)
    np.cumsum(inner, axis=1, out=inner)
    (x0, y0), (x1, y1) = start.T, stop.T
    true = total[y1, x1].astype(np.int64) - total[y0, x1] - total[y1, x0] + total[y0, x0]
    area = (x1 - x0) * (y1 - y0)
    return np.asarray((true > 0) & ((true == area) | (true > area * min_mask_ratio)))


def mask_over(
    slide: HasViews,
    mask: Any,
    storage_options: Mapping[str, Any] | None = None,
    origin: Origin | None = None,
) -> Mask:
    """Give a mask over a slide as `PatchGrid.over` takes it; raises `CallError` or `CallTypeError`."""
    if isinstance(mask, str) and mask == "tissue":
        mask = "otsu"
    if is_method(mask):
        return Mask(slide.tissue_mask(mask), method_name(mask))
    size_xy, bounds = slide.view(1.0, "baseline").size_xy, slide.bounds
    if is_annotation(mask):
        method = "GeoJSON" if isinstance(mask, Mapping) else shown(str(mask))
        cells, used = draw(mask, size_xy, storage_options, bounds=bounds, origin=origin)
        return Mask(cells, method if used == "slide" else f"{method}, from the corner of the bounds")
    if isinstance(mask, str | Path):
        cells, method = read_mask(mask, storage_options), shown(str(mask))
    elif isinstance(mask, HasMask):
        cells, method = mask.as_mask(), "slide"
    else:
        cells, method = as_mask(mask), "array"
    whole = on_slide(cells, size_xy, bounds=bounds, origin=origin, name=f"the mask ({method})")
    return Mask(whole, method if whole is cells else f"{method}, over the bounds")


@dataclass(frozen=True, eq=False)
class PatchGrid:
    """The patches of one slide at one resolution, in the order of the rows of the output."""

    shape_yx: tuple[int, int]
    """Rows and columns of a patch at the requested resolution."""
    stride_yx: tuple[int, int]
    """Rows and columns from one patch to the next."""
    view: View
    """How the slide is read."""
    steps_xy: NDArray[np.unsignedinteger[Any]]
    """(N, 2): each patch's position in strides, (x, y)."""
    slide: str = ""
    """Identity of the slide that it was made for."""
    resampled_yx: tuple[int, int] | None = None
    """Rows and columns that a patch is resampled to, where they are not `shape_yx`."""
    mask: Mask | None = None
    """What chose the patches; None: nothing did."""

    @classmethod
    def over(
        cls,
        slide: HasViews,
        *,
        shape: int | tuple[int, int] = (224, 224),
        resolution: float | tuple[float, float] = 0.5,
        units: Units = "mpp",
        stride: int | tuple[int, int] | None = None,
        mask: str | Path | NDArray[Any] | Mapping[str, Any] | HasMask | Segment | None = "tissue",
        min_mask_ratio: float = 0.0,
        mask_origin: Origin | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> PatchGrid:
        """Lay a grid over a slide and keep the patches under the mask.

        `shape` and `stride` (default: the shape) are (rows, columns) at the requested resolution;
        the grid starts at the slide's top left corner and its last patches may overhang.

        `mask`: "tissue" (Otsu), "hsv" or a function (see `Slide.tissue_mask`); None (every patch); a mask of the whole
        slide: an array, the path or URL of an image or .npy file (`storage_options` as in `open_slide`;
        `dfx.masks.read_mask` lists the wanted cells), or a `Slide`, whose file is read as a mask; or polygons in
        level-0 pixels: GeoJSON as QuPath exports it (a mapping, or a path that ends with .geojson or .json).

        `mask_origin` matters for slides with bounds (`Slide.bounds`): "slide" for masks of the whole slide, and for
        polygons that count from its corner; "bounds" for masks of QuPath, which crops such slides to their bounds.
        Without it, a mask of uncertain origin is a `CallError`.

        `min_mask_ratio`: the share of a patch under the mask must be above this. Raises `ResolutionError` when
        the slide lacks the metadata that the units need, `CallError` for a bad value.

        The order is by vertical strips of 16 patches, rows from top to bottom within a strip, so
        that a run of 256 patches lies close together; it depends on nothing but the grid.
        """
        if not isinstance(slide, HasViews):
            raise CallTypeError(f"a grid lies over a Slide, not a {type(slide).__name__}: open it with dfx.open_slide.")
        shape_yx = patch_shape(shape)
        stride_yx = whole_pair(shape if stride is None else stride, "stride")
        min_mask_ratio = check_ratio(min_mask_ratio)
        mask_origin = check_origin(mask_origin)
        view = slide.view(resolution, units)
        columns, rows = (-(-size // step) for size, step in zip(view.size_xy, stride_yx[::-1], strict=True))
        if rows * columns > MOST:
            raise CallError(
                f"a stride of {stride_yx} over {view.size_xy[0]} x {view.size_xy[1]} pixels makes "
                f"{rows * columns:,} patches, more than {MOST:,}: use a larger stride or a coarser resolution."
            )
        iy, ix = np.indices((rows, columns)).reshape(2, -1)
        steps = np.stack([ix, iy], axis=1)
        used = None if mask is None else mask_over(slide, mask, storage_options, mask_origin)
        if used is not None:
            origins = steps * np.array(stride_yx[::-1])
            steps = steps[covered(origins, shape_yx, view.size_xy, used.cells, min_mask_ratio)]
        order = np.lexsort((steps[:, 0], steps[:, 1], steps[:, 0] // STRIP))
        dtype = np.uint16 if max(rows, columns) <= 2**16 else np.uint32
        return cls(shape_yx, stride_yx, view, steps[order].astype(dtype), slide.identity, mask=used)

    @classmethod
    def from_h5(cls, path: str | Path, slide: HasViews) -> PatchGrid:
        """Take the patches that TRIDENT or CLAM laid over a slide: their level-0 squares, resampled to their size.

        `path`: an h5 file with `coords` and its attributes, of `patches/` or TRIDENT's features. The grid is at the
        baseline, so `coordinates` are level-0 pixels; `pixels_yx` is what the encoder is given. Rows are ordered as
        those of `over`, not as the file's, and `stride_yx` is 1 where corners lie on no lattice. Raises `CallError`
        for what is no such file, or is another slide's.
        """
        if not isinstance(slide, HasViews):
            raise CallTypeError(f"a grid lies over a Slide, not a {type(slide).__name__}: open it with dfx.open_slide.")
        found = read_coords(path, lambda level: sum(slide.view(level, "level").to_baseline) / 2)
        baseline = slide.view(1.0, "baseline").size_xy
        corners = found.corners_xy
        if found.dimensions not in (None, baseline) or (corners >= baseline).any():
            whose = " x ".join(map(str, found.dimensions or corners.max(axis=0) + found.size))
            raise CallError(
                f"{path} is of a slide of {whose} pixels, but {baseline[0]} x {baseline[1]} are given: "
                "give the file of this slide."
            )
        read = slide.view(min(1.0, found.pixels / found.size), "baseline")
        scale = (read.downsample,) * 2
        patch_shape(math.ceil(found.size / min(read.downsample_xy or scale)))  # the size to read is checked, too
        # Positions are baseline pixels whichever level they are read from: steps of 1 hold any corner exactly.
        view = View(read.level, scale, read.downsample, baseline, 1.0, "baseline", read.downsample_xy)
        stride = found.stride if not (corners % found.stride).any() else 1
        order = np.lexsort((corners[:, 0], corners[:, 1], corners[:, 0] // (STRIP * found.stride)))
        steps = corners[order] // stride
        dtype = np.uint16 if steps.max(initial=0) < 2**16 else np.uint32
        return cls(
            (found.size, found.size),
            (stride, stride),
            view,
            steps.astype(dtype),
            slide.identity,
            None if found.pixels == found.size else patch_shape(found.pixels),
        )

    @property
    def pixels_yx(self) -> tuple[int, int]:
        """Rows and columns of what the encoder is given."""
        return self.resampled_yx or self.shape_yx

    def __len__(self) -> int:
        return len(self.steps_xy)

    def __repr__(self) -> str:
        view, (h, w) = self.view, self.shape_yx
        return f"PatchGrid({len(self)} patches of {h} x {w} at {view.resolution} {view.units}, stride {self.stride_yx})"

    def _repr_html_(self) -> str:
        view, mask = self.view, self.mask
        rows = {
            "patches": f"{len(self)} of {self.shape_yx[0]} x {self.shape_yx[1]}",
            "stride": f"{self.stride_yx[0]} x {self.stride_yx[1]}",
            "resolution": f"{view.resolution} {view.units}, {view.size_xy[0]} x {view.size_xy[1]} pixels",
            "read from": f"level {view.level}, scaled by {view.read_scale_xy[0]:g} x {view.read_scale_xy[1]:g}",
            "mask": "none" if mask is None else f"{mask.method}, {mask.cells.mean():.0%} of the slide",
        }
        return html.table("PatchGrid", rows)

    def origins(self, steps_xy: NDArray[Any]) -> NDArray[np.int64]:
        """Top left corners, int64 (n, 2) as (x, y) at the requested resolution."""
        return np.asarray(steps_xy.astype(np.int64) * np.array(self.stride_yx[::-1]))

    @cached_property
    def coordinates(self) -> NDArray[np.int64]:
        """int64 (N, 4): [x0, y0, x1, y1] at the requested resolution, end exclusive."""
        start = self.origins(self.steps_xy)
        return np.concatenate([start, start + np.array(self.shape_yx[::-1])], axis=1)

    def to_baseline(self) -> NDArray[np.float64]:
        """float64 (N, 4): the coordinates in baseline (level 0) pixels."""
        return np.asarray(self.coordinates * np.tile(self.view.to_baseline, 2))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the coordinates: equal grids have equal digests."""
        return hashlib.sha256(self.coordinates.tobytes()).hexdigest()
