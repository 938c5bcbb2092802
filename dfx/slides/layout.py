"""The layout of a TIFF page's tiles or strips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Layout:
    """Shape and data type of each decoded tile or strip of one plane of a page."""

    rows: int
    columns: int
    samples: int
    """Samples per pixel; of one plane, if a page has several planes."""
    dtype: np.dtype[Any]
    tiled: bool

    @classmethod
    def of(cls, page: Any) -> Layout:
        """Take it from a page's tags."""
        samples = page.samplesperpixel if page.planarconfig == 1 else 1
        if page.is_tiled:
            return cls(page.tilelength, page.tilewidth, samples, np.dtype(page.dtype), True)
        return cls(min(page.rowsperstrip, page.imagelength), page.imagewidth, samples, np.dtype(page.dtype), False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(rows, columns, samples)."""
        return self.rows, self.columns, self.samples

    def checked(self, tile: NDArray[Any]) -> NDArray[Any]:
        """Return a decoded tile as (rows, columns, samples); raises `ValueError` if it does not fit the page.

        A tile on the border may have only the pixels of the image. The last strip may have more rows than the image.
        """
        tile = tile if tile.ndim == 3 else tile[..., None]
        rows, columns, samples = tile.shape
        fits = rows <= self.rows and columns <= self.columns if self.tiled else columns == self.columns
        if not fits or samples != self.samples:
            raise ValueError(f"it has {tile.shape} rows, columns and samples, not {self.shape}")
        if (tile.dtype.kind, tile.dtype.itemsize) != (self.dtype.kind, self.dtype.itemsize):
            raise ValueError(f"it has samples of {tile.dtype}, not of {self.dtype}")
        return tile
