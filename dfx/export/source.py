"""A store in the terms of other tools: level-0 pixels, magnifications, features a few thousand rows at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfx.errors import StoreError
from dfx.export.output import Pool, plain_name
from dfx.store import Features, open_features

ROWS = 4096
"""Rows of features that are in memory at one time."""
SQUARE = 1.01
"""A patch whose sides at level 0 differ by more is not taken for a square."""


class Source:
    """A complete store that is to be exported. `encoder`: whose features; None: everyone's."""

    def __init__(self, path: Path, encoder: str | None = None, pool: Pool | None = None) -> None:
        found = open_features(path, encoder)
        if "patches" not in found.attrs:
            raise StoreError(f"{path} holds loose patches, which have no place on a slide: only slides are exported.")
        self.path = path
        self.pool = pool
        self.name = plain_name(path.name.removesuffix(".zarr"))
        self.attrs = found.attrs
        self.encoders = {
            plain_name(name): open_features(path, name) for name in ([encoder] if encoder else found.encoders)
        }
        scale = found.scale
        patches = found.attrs["patches"]
        boxes = found.to_baseline()
        self.exact: NDArray[np.float64] = boxes[:, :2]
        """(N, 2): top left corners in level-0 pixels, (x, y)."""
        self.corners = np.rint(self.exact).astype(np.int64)
        """int64 (N, 2): the same in whole pixels."""
        self.shape_yx: tuple[int, int] = tuple(patches.get("pixels", patches["shape"]))
        """Rows and columns of pixels that the encoder was given."""
        self.stride_yx: tuple[int, int] = tuple(patches["stride"])
        """From one patch to the next, in pixels at the requested resolution."""
        self.extent_xy = np.array(patches["shape"][::-1]) * scale
        """Width and height of a patch in level-0 pixels, float64."""
        slide = found.attrs["slide"]
        self.dimensions: tuple[int, int] = tuple(slide["dimensions"])
        """Width and height of level 0."""
        self.mpp: tuple[float, float] | None = slide["mpp"] and tuple(slide["mpp"])
        """Microns per level-0 pixel, (x, y)."""
        self.power: float | None = slide["power"]
        """Objective power of level 0."""

    def __len__(self) -> int:
        return len(self.corners)

    @property
    def one(self) -> Features:
        """The features of its only encoder; raises `StoreError` where there are several."""
        if len(self.encoders) > 1:
            raise StoreError(
                f"{self.path} holds features of {', '.join(self.encoders)}, and this format has a place for one: "
                "say whose with encoder= (--encoder)."
            )
        return next(iter(self.encoders.values()))

    @property
    def free(self) -> bool:
        """Whether patches lie anywhere, not on a lattice: `PatchGrid.from_h5` counts single pixels then."""
        return self.stride_yx == (1, 1)

    @property
    def overlap(self) -> int:
        """Pixels, as the encoder sees them, that neighbours share; 0 where there is no lattice."""
        stride, shape = self.stride_yx[0], self.attrs["patches"]["shape"][0]
        return 0 if self.free else round((shape - stride) * self.shape_yx[0] / shape)

    def square(self, tool: str) -> tuple[int, float]:
        """Side of a patch in its own pixels and in level-0 pixels; raises `StoreError` where it is no square."""
        (rows, columns), (width, height) = self.shape_yx, self.extent_xy.tolist()
        strides = self.stride_yx[0] == self.stride_yx[1]
        if rows != columns or not strides or max(width, height) > SQUARE * min(width, height):
            raise StoreError(
                f"{self.path} has patches of {rows} x {columns} pixels, {height:g} x {width:g} at level 0, "
                f"{self.stride_yx[0]} x {self.stride_yx[1]} apart; those of {tool} are squares: "
                "extract square ones, or export to anndata or spatialdata."
            )
        return rows, (width + height) / 2

    def microns(self, tool: str) -> tuple[float, float]:
        """Microns per level-0 pixel, (x, y); raises `StoreError` where they are not known."""
        if self.mpp is None:
            raise StoreError(
                f"{self.path} is of a slide without microns per pixel, which {tool} needs: extract again with "
                "the slide's own, wsireader_kwargs={'mpp': …} or --slide-mpp (another fingerprint: --overwrite)."
            )
        return self.mpp

    def magnifications(self, tool: str) -> tuple[float, float]:
        """Magnification of level 0 and of the patches; raises `StoreError` where nothing says them.

        The objective's where there is one. Patches asked for in µm, and slides that have no power, take 10 / mpp
        for both, as these tools do: 0.5 mpp is 20x then, on every scanner.
        """
        size, extent = self.square(tool)
        if self.mpp is not None and (self.power is None or self.attrs["patches"]["units"] == "mpp"):
            level0 = 20 / sum(self.mpp)
        elif self.power is not None:
            level0 = self.power
        else:
            raise StoreError(
                f"{self.path} is of a slide with neither microns per pixel nor objective power, and {tool} needs one: "
                "extract again with the slide's own (--slide-mpp, --slide-power; another fingerprint: --overwrite)."
            )
        return whole(level0), whole(level0 * size / extent)

    def rows(self, features: Features, dtype: Any = None) -> Iterator[tuple[slice, NDArray[Any]]]:
        """Give an encoder's features some thousand rows at a time, and which rows they are."""
        array = features.features
        for start in range(0, len(self), ROWS):
            part = array[start : start + ROWS].compute(scheduler="synchronous")
            with np.errstate(over="ignore"):
                cast = part.astype(dtype or part.dtype, copy=False)
            if (np.isinf(cast) & np.isfinite(part)).any():
                raise StoreError(f"{self.path} has features that are beyond {np.dtype(dtype)}, which the format has.")
            yield slice(start, start + len(part)), cast

    def pooled(self, features: Features) -> NDArray[np.float32]:
        """Mean or maximum of an encoder's features over the patches whose features are finite, float32 (D,).

        Warns of other patches; raises `StoreError` if there are no finite features.
        """
        mean = self.pool == "mean"
        found, count = np.full(features.features.shape[1], 0 if mean else -np.inf), 0
        for _, part in self.rows(features, np.float64):
            finite = part[np.isfinite(part).all(axis=1)]
            count += len(finite)
            found = found + finite.sum(axis=0) if mean else np.maximum(found, finite.max(axis=0, initial=-np.inf))
        if count < len(self):
            bad = f"{len(self) - count} of {len(self)} patches of {self.path} have features that are NaN or infinite"
            if not count:
                raise StoreError(f"{bad}, so the slide has no {self.pool}: extract them again, or leave pool out.")
            warnings.warn(f"{bad}: the slide's {self.pool} is taken over the other patches.", UserWarning, stacklevel=2)
        return (found / count if mean else found).astype(np.float32)


def whole(value: float) -> float:
    """Give a number that is whole but for rounding as an int."""
    return round(value) if abs(value - round(value)) < 1e-6 * max(1, abs(value)) else float(value)
