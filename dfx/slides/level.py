"""A level of the pyramid as plain data: where its tiles lie, and what their channels are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Decode: TypeAlias = Callable[[bytes, int], NDArray[Any]]
Colour: TypeAlias = Literal["rgb", "rgba", "rgba-associated", "grey", "other"]


@dataclass(frozen=True, eq=False)
class TileGrid:
    """A rectangle of equal tiles, as the file stores them."""

    origin_yx: tuple[int, int]
    """Where the rectangle's first pixel lies on the level."""
    shape_yx: tuple[int, int]
    """Its rows and columns of pixels; the last tiles may be padded beyond."""
    tile_yx: tuple[int, int]
    """Rows and columns of a tile."""
    offsets: NDArray[np.int64]
    """(planes, rows, columns) byte offset of each tile; 0 where the file has none."""
    counts: NDArray[np.int64]
    """(planes, rows, columns) bytes of each tile; 0 where the file has none."""
    decoders: tuple[Decode, ...]
    """One a plane: (bytes, index of the tile in its plane) -> (rows, columns, channels) array."""

    @cached_property
    def present(self) -> NDArray[np.bool_]:
        """(rows, columns): which tiles the file has."""
        return np.asarray(((self.counts > 0) & (self.offsets > 0)).all(axis=0))


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
    """Baseline pixels per pixel, the mean of both axes."""
    codec: str
    """How tiles are compressed."""
    colour: Colour
    """What the channels are; patches can be made of all but "other"."""
    parts: tuple[TileGrid, ...] = field(repr=False)
    """The rectangles of tiles that make up the level."""

    @property
    def dimensions(self) -> tuple[int, int]:
        """(width, height)."""
        return self.shape_yx[::-1]

    @property
    def tile_yx(self) -> tuple[int, int]:
        """Rows and columns of a tile."""
        return self.parts[0].tile_yx

    @cached_property
    def has_gaps(self) -> bool:
        """Whether some pixels have no tile."""
        return len(self.parts) > 1 or not bool(self.parts[0].present.all())

    @property
    def background(self) -> int:
        """What stands where the file has no tile: white in a picture, 0 in other channels."""
        return 255 if self.dtype == np.uint8 and self.colour != "other" else 0


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
