"""A level of the pyramid as plain data: where its tiles lie, and what their channels are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dfx.errors import SlideError, TileError
from dfx.slides import pixels
from dfx.slides.codestream import ColourConflict
from dfx.slides.source import ByteSource

Colour: TypeAlias = Literal["rgb", "rgba", "rgba-associated", "grey", "other"]


class Decode(Protocol):
    """Decodes the tiles of one plane. Safe in threads."""

    def __call__(self, data: bytes, index: int, *, scratch: bool) -> NDArray[Any]:
        """Give tile `index` of the plane as (rows, columns, channels).

        With `scratch` it may lie in a buffer of this thread, which the next call overwrites.
        """
        ...


@dataclass(frozen=True, eq=False)
class TileGrid(ABC):
    """A rectangle of equal tiles: the seam between a slide and what gives its pixels."""

    origin_yx: tuple[int, int]
    """Where the rectangle's first pixel lies on the level."""
    shape_yx: tuple[int, int]
    """Its rows and columns of pixels; the last tiles may be padded beyond."""
    tile_yx: tuple[int, int]
    """Rows and columns of a tile."""

    @property
    @abstractmethod
    def present(self) -> NDArray[np.bool_]:
        """(rows, columns): which tiles there are."""

    @property
    def can_shrink(self) -> bool:
        """Whether tiles can be decoded to a part of their size."""
        return False

    @property
    def working_bytes(self) -> int:
        """Bytes that `tile` takes at once, besides the stored tile and the decoded tile."""
        return 0

    @abstractmethod
    def tile(self, source: ByteSource, row: int, column: int, name: str, *, scratch: bool, shrink: int) -> NDArray[Any]:
        """Give a tile's pixels (rows, columns, channels), those beyond `shape_yx` where it is padded too.

        `source`: the slide's file. `scratch`: they may lie in a buffer of this thread, which the next
        call overwrites. `shrink`: to so small a part of its size, where `can_shrink`. Safe in threads.
        Raises `TileError`, which calls the tile by `name`, when it is damaged; `SlideError` when it can't be read.
        """

    def pieces(self, row: int, column: int) -> list[tuple[int, int]]:
        """Where the bytes of a tile lie, that they may be fetched ahead: (offset, count); none where nobody knows."""
        return []

    def extent(self, row: int, column: int) -> tuple[int, int]:
        """Rows and columns of a tile that are not padded."""
        (height, width), (rows, columns) = self.tile_yx, self.shape_yx
        return min(height, rows - row * height), min(width, columns - column * width)

    @cached_property
    def _end_yx(self) -> NDArray[np.int64]:
        """Where the pixels of the tiles end, from the rectangle's first pixel on."""
        return np.minimum(self.shape_yx, np.multiply(self.present.shape, self.tile_yx)).astype(np.int64)

    def _cells(self, boxes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows and columns of tiles that each box touches, int (N, 4) as (r0, c0, r1, c1), maybe empty."""
        local = boxes - np.tile(self.origin_yx, 2)
        start, stop = np.maximum(local[:, :2], 0), np.minimum(local[:, 2:], self._end_yx)
        low = start // self.tile_yx
        return np.concatenate([low, np.where(stop > start, -(-stop // self.tile_yx), low)], axis=1)

    def touching(self, boxes: NDArray[np.int64]) -> dict[tuple[int, int], list[int]]:
        """Which boxes touch each tile that is present: (row, column) -> indices, row after row.

        `boxes`: int (N, 4) as (y0, x0, y1, x1) on the level.
        """
        found: dict[tuple[int, int], list[int]] = {}
        for i, (r0, c0, r1, c1) in enumerate(self._cells(boxes).tolist()):
            for r in range(r0, r1):
                for c in range(c0, c1):
                    found.setdefault((r, c), []).append(i)
        return {at: found[at] for at in sorted(found) if self.present[at]}

    @cached_property
    def _summed(self) -> NDArray[np.int64]:
        """How many tiles are present above and left of each corner of a tile."""
        rows, columns = self.present.shape
        table = np.zeros((rows + 1, columns + 1), np.int64)
        table[1:, 1:] = self.present.cumsum(axis=0).cumsum(axis=1)
        return table

    def covers(self, boxes: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each box lies within the rectangle, and every tile that it touches is present; bool (N,).

        So each pixel of such a box is copied from a tile: `touching` uses the same arithmetic.
        """
        local = boxes - np.tile(self.origin_yx, 2)
        inside = (local[:, :2] >= 0).all(axis=1) & (local[:, 2:] <= self._end_yx).all(axis=1)
        r0, c0, r1, c1 = np.where(inside[:, None], self._cells(boxes), 0).T
        table = self._summed
        present = table[r1, c1] - table[r0, c1] - table[r1, c0] + table[r0, c0]
        return np.asarray(inside & (present == (r1 - r0) * (c1 - c0)))

    def shared(
        self, touching: dict[tuple[int, int], list[int]], boxes: NDArray[np.int64], pitch_yx: tuple[float, float]
    ) -> set[tuple[int, int]]:
        """Which of the tiles are touched by other boxes of the lattice that these are part of.

        The lattice's boxes begin every `pitch_yx` pixels from the level's first one on. (It is endless
        here, so a tile at the slide's end may seem shared that is not.)
        """
        if not touching:
            return set()
        size = (boxes[0, 2:] - boxes[0, :2]).tolist()

        def along(axis: int) -> dict[int, int]:
            tile, pitch, places = self.tile_yx[axis], pitch_yx[axis], {at[axis] for at in touching}
            starts = {n: self.origin_yx[axis] + n * tile for n in places}
            return {
                n: math.ceil((start + tile) / pitch) - max(math.floor((start - size[axis]) / pitch) + 1, 0)
                for n, start in starts.items()
            }

        rows, columns = along(0), along(1)
        return {(r, c) for (r, c), found in touching.items() if len(found) < rows[r] * columns[c]}


@dataclass(frozen=True, eq=False)
class StoredTiles(TileGrid):
    """Tiles that dfx itself finds in a file and decodes."""

    offsets: NDArray[np.int64]
    """(planes, rows, columns) byte offset of each tile; 0 where the file has none."""
    counts: NDArray[np.int64]
    """(planes, rows, columns) bytes of each tile; 0 where the file has none."""
    decoders: tuple[Decode, ...]
    """One a plane."""
    shrunk: Callable[[bytes, int], NDArray[np.uint8] | None] | None = None
    """Decodes a tile at a half, quarter or eighth of its size (see `JpegTiles`), or returns None if this tile must be
    decoded whole; None: no tile of the page can be shrunk."""
    joined: Callable[[list[NDArray[Any]]], NDArray[Any]] | None = None
    """Makes colours of the planes of a tile; None: planes are the channels."""

    @cached_property
    def present(self) -> NDArray[np.bool_]:
        """(rows, columns): which tiles the file has."""
        return np.asarray(((self.counts > 0) & (self.offsets > 0)).all(axis=0))

    @property
    def can_shrink(self) -> bool:
        """Whether its JPEG tiles can be."""
        return self.shrunk is not None

    def pieces(self, row: int, column: int) -> list[tuple[int, int]]:
        """Where the bytes of a tile lie: (offset, count) of each plane."""
        planes = range(len(self.decoders))  # item: a tile at a time, indexing costs more than reading
        return [(self.offsets.item(p, row, column), self.counts.item(p, row, column)) for p in planes]

    def tile(self, source: ByteSource, row: int, column: int, name: str, *, scratch: bool, shrink: int) -> NDArray[Any]:
        """Read a tile's bytes and decode them."""
        at = self.pieces(row, column)
        if any(offset < 0 or count < 0 or offset + count > source.size for offset, count in at):
            raise TileError(
                name, f"{name} lies past the end of the file, which has {source.size} bytes: copy the slide again."
            )
        index = row * self.offsets.shape[2] + column
        stored = source.read(at)
        rows, columns = extent = self.extent(row, column)
        # A tile on the border is decoded whole: it may be cut there, or its padding would be mixed in.
        if shrink > 1 and extent == self.tile_yx and self.shrunk:
            small = self.shrunk(stored[0], shrink)
            if small is not None:
                return small
        planes = []
        for data, decode in zip(stored, self.decoders, strict=True):
            try:
                planes.append(decode(data, index, scratch=scratch and len(at) == 1))
            except ColourConflict as e:
                raise conflict(name, e) from e
            except Exception as e:  # codecs raise many kinds; none of them says which tile
                raise TileError(
                    name, f"{name} can't be decoded ({e}): the file is damaged; copy or export it again."
                ) from e
        if len({plane.shape[:2] for plane in planes}) > 1:
            sizes = ", ".join(f"{plane.shape[0]} x {plane.shape[1]}" for plane in planes)
            raise conflict(name, f"its planes have {sizes} pixels, and dfx does not enlarge subsampled planes")
        if len(planes) == 1:
            tile = planes[0]
        else:
            tile = self.joined(planes) if self.joined else np.concatenate(planes, axis=2)
        return tile if shrink == 1 else pixels.shrink(tile[:rows, :columns], shrink)


def conflict(name: str, reason: object) -> SlideError:
    """Return the error for a tile with unknown colours; it is not a damaged tile, which may be filled."""
    return SlideError(f"The colours of {name} are not known: {reason}. Export it again as RGB, or as plain JPEG.")


@dataclass(frozen=True, eq=False)
class Level:
    """One resolution of the pyramid."""

    shape_yx: tuple[int, int]
    """Rows and columns of pixels."""
    channels: int
    """Channels as the file has them."""
    dtype: np.dtype[Any]
    """Data type as the file has it."""
    downsample: float
    """Baseline pixels per pixel: the mean of both axes' size ratios, as TIAToolbox has it. Positions are rounded by
    it."""
    codec: str
    """How tiles are compressed."""
    colour: Colour
    """What the channels are; patches can be made of all but "other"."""
    parts: tuple[TileGrid, ...] = field(repr=False)
    """The rectangles of tiles that make up the level."""
    downsample_xy: tuple[float, float] | None = None
    """Baseline pixels per pixel along x and y, which place the level's pixels on the baseline; None: `downsample`."""

    @property
    def dimensions(self) -> tuple[int, int]:
        """(width, height)."""
        return self.shape_yx[::-1]

    @property
    def tile_yx(self) -> tuple[int, int]:
        """Rows and columns of a tile."""
        return self.parts[0].tile_yx

    def covers(self, boxes: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each box is copied whole from tiles; bool (N,). All other boxes have to be filled beforehand.

        `boxes`: int (N, 4) as (y0, x0, y1, x1). True where a box lies within the level and within one of its
        parts, whose tiles there are all present.
        """
        inside = (boxes[:, :2] >= 0).all(axis=1) & (boxes[:, 2:] <= self.shape_yx).all(axis=1)
        return np.asarray(inside & np.any([part.covers(boxes) for part in self.parts], axis=0))

    @property
    def background(self) -> int:
        """What stands where the file has no tile: white in a picture, 0 in other channels."""
        return 255 if self.dtype == np.uint8 and self.colour != "other" else 0

    def decode(
        self, source: ByteSource, n: int, part: TileGrid, row: int, column: int, *, scratch: bool, shrink: int = 1
    ) -> NDArray[Any]:
        """Decode a tile of one of the parts of this level, which is level `n` of the slide, without its padding.

        The parameters and errors are those of `TileGrid.tile`. Raises `TileError` as well where pixels are missing.
        """
        name = f"tile {row * part.present.shape[1] + column} (row {row}, column {column}) of level {n} of {source.url}"
        tile = part.tile(source, row, column, name, scratch=scratch, shrink=shrink)
        rows, columns = (-(-size // shrink) for size in part.extent(row, column))
        if tile.shape[0] < rows or tile.shape[1] < columns or tile.shape[2] != self.channels:
            raise TileError(name, f"{name} has {tile.shape} pixels, not {part.tile_yx}: the file is damaged.")
        return tile[:rows, :columns]


def as_rgb(tile: NDArray[np.uint8], colour: Colour) -> NDArray[np.uint8]:
    """Give a tile as RGB: grey is repeated, alpha is laid over white."""
    if colour == "rgb":
        return tile
    if colour == "grey":
        return np.broadcast_to(tile, (*tile.shape[:2], 3))
    alpha = tile[..., 3:].astype(np.uint16)
    if (alpha == 255).all():
        return tile[..., :3]
    if colour == "rgba-associated":  # already multiplied by alpha
        return np.asarray(np.minimum(tile[..., :3] + (255 - alpha), 255).astype(np.uint8))
    over_white: NDArray[np.uint8] = ((tile[..., :3] * alpha + (255 - alpha) * 255 + 127) // 255).astype(np.uint8)
    return over_white
