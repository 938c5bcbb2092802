"""The slide: its levels, its metadata, and the pixels of tiles. No file format is known here."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import cv2
import dask.array as da
import numpy as np
from numpy.typing import NDArray

from dfx import html
from dfx import resolution as res
from dfx.errors import CallError, CallTypeError, ResolutionError, SlideError, TileError
from dfx.masks import METHODS, Bounds, Segment, as_mask, has_dark_background, mask_of_image, method_name, segment_of
from dfx.slides.ahead import announced
from dfx.slides.buffers import unwritten
from dfx.slides.cache import OPENED, TILES
from dfx.slides.identity import checksum
from dfx.slides.jpeg import SHRINKS
from dfx.slides.level import Level, as_rgb
from dfx.slides.pixels import paste
from dfx.slides.source import ByteSource

COMMON_POWERS = (1, 1.25, 2, 2.5, 4, 5, 10, 20, 40, 60, 90, 100)
MOST_THUMBNAIL_PIXELS = 2**26
"""Larger levels are averaged to a thumbnail band by band, in bounded memory."""


@dataclass(frozen=True, eq=False)
class Slide:
    """A whole-slide image: plain data that pickles to its address, and the pixels behind it.

    Safe to use from several threads at once. `dfx.open_slide` makes it.
    """

    url: str
    """Absolute path or URL."""
    vendor: str
    """Scanner or format family: aperio, hamamatsu, leica, philips, ome, perkinelmer, trestle or generic-tiff, and
    what else OpenSlide knows."""
    mpp: tuple[float, float] | None
    """Microns per baseline pixel, (x, y); None where unknown."""
    power: float | None
    """Objective power of the baseline; None where unknown."""
    levels: tuple[Level, ...]
    """The pyramid, finest first."""
    notes: tuple[str, ...]
    """What a careful user should know of this file."""
    identity: str
    """Names the file's content, whatever its path; another one for each kind of reader."""
    source: ByteSource = field(repr=False)
    """The file; the one that was named, where there are several."""
    backend: str = "tiff"
    """What reads it: dfx itself ("tiff"), or "openslide" with its version."""
    kept: int = 0
    """Bytes of tiles that another reader than dfx keeps, for all slides of a process."""
    overrides: tuple[tuple[float, float] | None, float | None] = (None, None)
    """mpp and power that the user gave."""
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)
    bounds: Bounds | None = None
    """The scanned area, (x, y, width, height) at the baseline, if the file states it: Leica SCN, and slides for which
    OpenSlide has `openslide.bounds-*`. QuPath crops slides to it."""
    reopen: Callable[..., Slide] = field(default=None, repr=False)  # type: ignore[assignment]
    """Opens the same slide in another process."""

    def __reduce__(self) -> tuple[Any, ...]:
        known = self.identity, self.backend, self.source.version
        return _reopened, (self.reopen, self.source.address, *self.overrides, self.storage_options, *known)

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        # The whole address, which Dask hashes: two objects may have the same redacted address.
        return "dfx.Slide", self.identity, self.source.address, self.source.version, self.mpp, self.power

    def __repr__(self) -> str:
        width, height = self.dimensions
        return f"Slide({self.url!r}, {width} x {height}, {len(self.levels)} levels, mpp={self.mpp}, power={self.power})"

    def _repr_html_(self) -> str:
        unknown = "unknown"
        rows = {
            "vendor": self.vendor,
            "dimensions": f"{self.dimensions[0]} x {self.dimensions[1]}",
            "levels": ", ".join(f"{level.dimensions[0]} x {level.dimensions[1]}" for level in self.levels),
            "mpp": unknown if self.mpp is None else f"{self.mpp[0]:g} x {self.mpp[1]:g}",
            "power": unknown if self.power is None else f"{self.power:g}",
        }
        try:
            picture = self.thumbnail(256)
        except SlideError:  # channels that are no colours, a damaged tile
            picture = None
        return html.table(f"Slide {self.url}", rows | ({"note": "; ".join(self.notes)} if self.notes else {}), picture)

    @property
    def checksum(self) -> str:
        """SHA-256 of the whole file, if it is a local file of at most 64 MiB and is the whole slide; else ""."""
        return checksum(self.source) if self.backend == "tiff" else ""

    @property
    def dimensions(self) -> tuple[int, int]:
        """(width, height) of the baseline."""
        return self.levels[0].dimensions

    def view(self, resolution: float | tuple[float, float], units: res.Units) -> res.View:
        """Give the way in which the slide is read at a resolution; raises `ResolutionError`."""
        return self._view(resolution, units, self.power)

    def _view(self, resolution: float | tuple[float, float], units: res.Units, power: float | None) -> res.View:
        return res.view(
            [level.downsample for level in self.levels],
            self.dimensions,
            resolution,
            units,
            mpp=self.mpp,
            power=power,
            name=self.url,
            downsamples_xy=[level.downsample_xy for level in self.levels],
        )

    def level(self, n: int) -> da.Array:
        """Give a level as a lazy array (rows, columns, channels) in the file's own dtype.

        Chunks are whole tiles, about 2,048 pixels a side (whole strips where there are no tiles).
        """
        if isinstance(n, bool) or not isinstance(n, int | np.integer):
            raise CallTypeError(f"a level is a whole number, not {n!r}.")
        if not 0 <= n < len(self.levels):
            raise ResolutionError(f"{self.url} has levels 0 to {len(self.levels) - 1}, so level {n!r} can't be read.")
        level = self.levels[n]
        chunks = tuple(max(1, 2048 // tile) * tile for tile in level.tile_yx)
        pixels = LevelPixels(self, n)
        return da.from_array(
            pixels,
            chunks=(*(min(c, s) for c, s in zip(chunks, level.shape_yx, strict=True)), level.channels),
            inline_array=True,
            asarray=False,
            fancy=False,
            meta=np.empty((0, 0, 0), level.dtype),
            name=f"level-{da.core.tokenize(pixels)}",
        )

    def tiles(
        self,
        n: int,
        boxes: NDArray[np.int64],
        *,
        rgb: bool,
        pitch_yx: tuple[float, float] | None = None,
        shrink: int = 1,
        damaged: set[str] | None = None,
        following: NDArray[np.int64] | None = None,
    ) -> Iterator[tuple[NDArray[Any], tuple[int, int], list[int]]]:
        """Decode each tile that a box touches, once: its pixels, where they lie, and which boxes touch it.

        `boxes` is int (N, 4) as (y0, x0, y1, x1) on the level. Gives (rows, columns, channels)
        without what is padded beyond the level, which may be overwritten when the next is asked for;
        (y, x) on the level; and indices of `boxes`. `pitch_yx`: pixels of the level from one box to the next,
        where the boxes are some of a lattice: tiles that others of it touch are kept for them. `shrink`:
        tiles are decoded to so small a part of their size, where `can_shrink` says so. `following`: boxes of
        the next call, whose tiles a remote file fetches while these are decoded. Raises `TileError`
        that names the tile; with `damaged`, its name is added there instead, and the tile is background.
        """
        level = self.levels[n]
        if rgb:
            self.check_picture(n)
        which = self.source.serial, n, rgb, shrink
        for p, part in enumerate(level.parts):
            touching = part.touching(boxes)
            shared = set() if pitch_yx is None else part.shared(touching, boxes, pitch_yx)
            order: Iterable[tuple[int, int]] = touching
            if self.source.prefetches and touching:
                later = [] if following is None else [at for at in part.touching(following) if at not in shared]
                held = {at for at in (*touching, *later) if pitch_yx is not None and (*which, p, *at) in TILES}
                order = announced(self.source, part, touching, later, held)
            for r, c in order:
                key = *which, p, r, c
                at = part.origin_yx[0] + r * part.tile_yx[0], part.origin_yx[1] + c * part.tile_yx[1]
                tile = TILES.get(key) if (r, c) in shared else None
                if tile is None:
                    try:
                        tile = level.decode(self.source, n, part, r, c, scratch=True, shrink=shrink)
                    except TileError as e:
                        if damaged is None:
                            raise
                        damaged.add(e.tile)
                        rows, columns = (-(-size // shrink) for size in part.extent(r, c))
                        blank = np.full((rows, columns, 3 if rgb else level.channels), level.background, level.dtype)
                        yield blank, at, touching[r, c]
                        continue
                    tile = as_rgb(tile, level.colour) if rgb else tile
                    if (r, c) in shared:
                        TILES.put(key, tile)
                yield tile, at, touching[r, c]

    def can_shrink(self, n: int, by: int) -> bool:
        """Whether a level's tiles can be decoded to a part of their size."""
        level = self.levels[n]
        return level.colour == "rgb" and by in SHRINKS and all(part.can_shrink for part in level.parts)

    def check_picture(self, n: int = 0) -> None:
        """Raise `SlideError` when the level's channels are no colours that patches can be made of."""
        level = self.levels[n]
        if level.colour == "other" or level.dtype != np.uint8:
            raise SlideError(
                f"{self.url} has {level.channels} channel(s) of {level.dtype}, which are not 8-bit grey, RGB or RGBA: "
                "patches are RGB; choose and scale the channels first (slide.level(0) gives them as they are)."
            )

    def thumbnail(self, max_size: int = 1024) -> NDArray[np.uint8]:
        """Give the whole slide as uint8 RGB (rows, columns, 3), its longer side at most `max_size`."""
        scale = min(1.0, res.one(max_size, "max_size") / max(self.dimensions))
        return self.picture(self.view(scale, "baseline"))

    def picture(self, view: res.View) -> NDArray[np.uint8]:
        """Give the whole slide at a view, by area averaging; uint8 RGB (rows, columns, 3)."""
        level = self.levels[view.level]
        height, width = level.shape_yx
        columns, rows = view.size_xy
        how = cv2.INTER_AREA if rows <= height and columns <= width else cv2.INTER_CUBIC
        bands = 1 if height * width <= MOST_THUMBNAIL_PIXELS else -(-height * width * 4 // MOST_THUMBNAIL_PIXELS)
        edges = np.linspace(0, rows, min(bands, rows) + 1).round().astype(int)
        out = unwritten(np.empty((rows, columns, 3), np.uint8))
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            top, bottom = round(start * height / rows), round(stop * height / rows)
            band = self.region(view.level, (top, 0, bottom, width), rgb=True)
            same = band.shape[:2] == (stop - start, columns)
            out[start:stop] = band if same else cv2.resize(band, (columns, stop - start), interpolation=how)
        return out

    def region(self, n: int, box: tuple[int, int, int, int], *, rgb: bool) -> NDArray[Any]:
        """Read the pixels (y0, x0, y1, x1) of a level; background where there is no tile."""
        level = self.levels[n]
        y0, x0, y1, x1 = box
        canvas = np.full((y1 - y0, x1 - x0, 3 if rgb else level.channels), level.background, level.dtype)
        for tile, (y, x), _ in self.tiles(n, np.array([box]), rgb=rgb):
            paste(canvas, tile, (y - y0, x - x0))
        return canvas

    def tissue_mask(self, method: str | Segment = "otsu") -> NDArray[np.bool_]:
        """Find tissue on a thumbnail: bool (rows, columns) over the whole slide.

        `method`: "otsu" (darker than Otsu's threshold, as TIAToolbox has it), "hsv" (stained, and no pen mark), a
        function of a thumbnail, uint8 RGB (H, W, 3), that gives (H, W), or "module:function", which names one.
        The thumbnail is at 1.25x as TIAToolbox has it (6 mpp where only `mpp=` was given), or at the function's
        `mpp` where it has one. If the slide states no resolution, it is a sixteenth of the baseline. Raises `CallError`
        for an unknown method, `ResolutionError` if the slide lacks the metadata for an `mpp`, and `SlideError` if
        "otsu" or "hsv" would take a dark background for tissue, as in fluorescence.
        """
        segment = segment_of(method)
        mpp: float | None = getattr(segment, "mpp", None)
        thumbnail = self.picture(self._mask_view() if mpp is None else self.view(mpp, "mpp"))
        if segment in METHODS.values() and has_dark_background(self._within_bounds(thumbnail)):
            raise SlideError(
                f"{self.url} has a dark background, as in fluorescence, and {method_name(method)!r} finds tissue that "
                "is darker than its surroundings: give mask=None for every patch, a mask, or a function that finds "
                "bright tissue."
            )
        return as_mask(segment(thumbnail))

    def _within_bounds(self, thumbnail: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if self.bounds is None:
            return thumbnail
        scale = np.array(thumbnail.shape[1::-1]) / self.dimensions
        x0, y0 = np.floor(self.bounds[:2] * scale).astype(int)
        x1, y1 = np.ceil(np.add(self.bounds[:2], self.bounds[2:]) * scale).astype(int)
        return thumbnail[y0:y1, x0:x1]

    def as_mask(self) -> NDArray[np.bool_]:
        """Give the slide's own pixels as a mask, bool (rows, columns): its file is read by `dfx.masks.read_mask`."""
        if self.backend != "tiff":
            raise CallError(
                f"{self.url} is read through OpenSlide and can't be a mask: give an image file or an array."
            )
        with self.source.open() as file:
            return mask_of_image(file, f"mask {self.url}")

    def _mask_view(self) -> res.View:
        power = self.power
        if power is None and self.mpp is not None and self.overrides[0] is None:
            mean = (self.mpp[0] + self.mpp[1]) / 2
            power = min(COMMON_POWERS, key=lambda common: abs(10 / mean - common))
        if power is not None:
            return self._view(1.25, "power", power)
        if self.mpp is not None:
            return self.view(6.0, "mpp")
        return self.view(min(1.0, max(1 / 16, 512 / max(self.dimensions))), "baseline")


@dataclass(frozen=True, eq=False)
class LevelPixels:
    """What a lazy level reads from: slicing decodes the tiles under the slice."""

    slide: Slide
    n: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(rows, columns, channels)."""
        level = self.slide.levels[self.n]
        return (*level.shape_yx, level.channels)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The file's own."""
        return self.slide.levels[self.n].dtype

    @property
    def ndim(self) -> int:
        """Always 3."""
        return 3

    def __getitem__(self, index: tuple[slice, ...]) -> NDArray[Any]:
        rows, columns = (
            range(size)[i] if isinstance(i, slice) else range(i, i + 1)
            for i, size in zip(index[:2], self.shape, strict=False)
        )
        if not len(rows) or not len(columns):
            return np.broadcast_to(np.zeros((), self.dtype), self.shape)[index].copy()
        y0, y1 = sorted((rows[0], rows[-1]))
        x0, x1 = sorted((columns[0], columns[-1]))
        pixels = self.slide.region(self.n, (y0, x0, y1 + 1, x1 + 1), rgb=False)
        within = [slice(None, None, i.step) if isinstance(i, slice) else 0 for i in index[:2]]
        return pixels[(*within, *index[2:])]

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return *self.slide.__dask_tokenize__(), self.n


def _reopened(
    reopen: Callable[..., Slide],
    url: str,
    mpp: tuple[float, float] | None,
    power: float | None,
    storage_options: Mapping[str, Any] | None,
    identity: str,
    backend: str,
    version: str,
) -> Slide:
    def build() -> Slide:
        slide = reopen(url, mpp=mpp, power=power, storage_options=storage_options)
        if slide.backend != backend:
            raise SlideError(
                f"{slide.url} was opened by {backend} and is read by {slide.backend} here: install the same."
            )
        if slide.identity != identity:
            raise SlideError(f"{slide.url} changed since it was opened: open it again, or restore the file.")
        return slide

    access = pickle.dumps(storage_options)  # credentials and servers change within a process's life
    # By the file's version, too: tiles that were read before the file was written again must not be used.
    slide: Slide = OPENED.get((url, mpp, power, identity, version, access), build)
    return slide
