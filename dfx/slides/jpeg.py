"""Usual JPEG tiles: decoded into a reused buffer, or to a half, quarter or eighth without computing the rest."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

_thread = threading.local()

SHRINKS = (8, 4, 2)
"""By how much libjpeg-turbo can shrink while it decodes, and patches may ask for."""
RGB_STORED = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
"""Adobe's APP14 segment with transform 0: the components are RGB."""


@dataclass(frozen=True, eq=False)
class UsualJpeg:
    """The tiles of a page of 8-bit JPEG with three components side by side."""

    shape: tuple[int, int, int]
    """(rows, columns, 3) of a tile."""
    tables: bytes | None
    """JPEG tables that the page's tiles share."""
    stored_rgb: bool
    """Whether components are RGB, as Aperio has them, though nothing in the tile says so."""

    @classmethod
    def of(cls, page: Any, keyframe: Any) -> UsualJpeg | None:
        """Describe a page's tiles; None where they are not usual."""
        usual = keyframe.compression == 7 and keyframe.is_tiled and page.dtype == np.uint8 and not page.extrasamples
        if not usual or (page.samplesperpixel, page.planarconfig) != (3, 1) or keyframe.photometric not in (2, 6):
            return None
        if getattr(page, "jpegheader", None):
            return None
        stored_rgb = bool(keyframe.photometric == 2 and not keyframe.is_jfif)
        return cls((keyframe.tilelength, keyframe.tilewidth, 3), page.jpegtables, stored_rgb)

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """Decode a tile into this thread's buffer, by the call that tifffile makes."""
        out: NDArray[np.uint8] = imagecodecs.jpeg8_decode(
            data,
            tables=self.tables,
            colorspace=2 if self.stored_rgb else None,
            outcolorspace=2,
            out=scratch_buffer(self.shape),
        )
        return out

    def shrunk(self, data: bytes, by: int) -> NDArray[np.uint8]:
        """Decode a tile to a half, quarter or eighth of its rows and columns, in the cosine domain.

        Each 8 x 8 block is transformed back from its low frequencies alone (libjpeg-turbo's scaling):
        close to the average of areas, and not the same.
        """
        import simplejpeg

        parts = [data[:2], RGB_STORED if self.stored_rgb else b"", (self.tables or b"")[2:-2], data[2:]]
        rows, columns, _ = self.shape
        out: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            b"".join(parts), "RGB", min_height=rows // by, min_width=columns // by, min_factor=by
        )
        if out.shape != (rows // by, columns // by, 3):
            raise ValueError(f"it shrinks to {out.shape}")
        return out


def scratch_buffer(shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Give this thread's buffer for a tile.

    It begins 16 bytes after a multiple of 32: libjpeg-turbo writes rows that are aligned to 32
    bytes past the cache, and what is copied right away is faster from the cache (a third a tile).
    """
    buffer: NDArray[np.uint8] | None = getattr(_thread, "buffer", None)
    if buffer is None or buffer.shape != shape:
        size = math.prod(shape)
        memory = np.empty(size + 64, np.uint8)
        start = (16 - memory.ctypes.data) % 32
        buffer = _thread.buffer = memory[start : start + size].reshape(shape)
    return buffer
