"""JPEG tiles: their colours, decoded into a reused buffer or to a half, quarter or eighth of their size."""

from __future__ import annotations

import math
import threading
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from dfx.slides.buffers import unwritten
from dfx.slides.codestream import ColourConflict, JpegHeader, is_whole_jpeg, jpeg_header, jpeg_tables
from dfx.slides.layout import Layout

_thread = threading.local()

SHRINKS = (8, 4, 2)
"""By how much libjpeg-turbo can shrink while it decodes, and patches may ask for."""
GREY, RGB, YCBCR = 1, 2, 3
"""Colour spaces by libjpeg's numbers."""
ADOBE = {space: b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([space == YCBCR]) for space in (RGB, YCBCR)}
"""Adobe's APP14 segment, which states that three components are RGB (transform 0) or YCbCr (1)."""
COMPRESSIONS = (6, 7, 34892)


class JpegTiles:
    """The tiles or strips of a page, each a JPEG stream of its own. Safe in threads.

    The colours of a page with three samples (PhotometricInterpretation RGB or YCbCr, which become RGB):

    | the tile's stream has | its colours |
    |---|---|
    | a JFIF segment, or Adobe's with transform 1 | YCbCr, whatever the tag says (Bio-Formats tags such tiles as RGB) |
    | Adobe's segment with transform 0 | RGB, whatever the tag says |
    | neither, but identifiers "R", "G", "B" | RGB |
    | neither, and subsampled components | YCbCr |
    | none of these | as the tag says (Aperio and libtiff write such tiles) |
    | one component | grey |
    | JFIF and Adobe's transform 0; Adobe's transform 2; another number of components | refused |

    Each tile is examined, since one page may have tiles of several kinds, and its first tile may be missing. Segments
    of the shared tables (tag 347) say nothing about colours, as in other readers. Conversion follows JFIF (ITU-T
    T.871), whatever YCbCrCoefficients and ReferenceBlackWhite say, as in libjpeg and the software that uses it.
    """

    def __init__(self, layout: Layout, photometric: int, tables: bytes | None) -> None:
        self.colours = layout.samples == 3 and photometric in (RGB, 6)
        """Whether tiles become RGB."""
        self._layout, self._photometric, self._tables = layout, photometric, tables
        self._segments = jpeg_tables(tables) if tables else b""
        self._last = JpegHeader((0, 0), 8, b"", False, False, None, b"no tile begins so")

    @classmethod
    def of(cls, page: Any, keyframe: Any) -> JpegTiles | None:
        """Describe the tiles of a page; None where they are not JPEG."""
        if keyframe.compression not in COMPRESSIONS:
            return None
        return cls(Layout.of(keyframe), int(keyframe.photometric), page.jpegtables)

    @property
    def can_shrink(self) -> bool:
        """Whether `shrunk` decodes these tiles."""
        return self.colours and self._layout.tiled and self._layout.dtype == np.uint8

    def header(self, data: bytes) -> JpegHeader:
        """Parse a tile's header, which is nearly always equal to the last tile's header."""
        last = self._last
        if not data.startswith(last.raw):
            last = self._last = jpeg_header(data)
        return last

    def space(self, header: JpegHeader) -> tuple[int | None, int | None]:
        """Return the colour space of a tile, and the space that it is converted to; None where nothing is converted.

        Raises `ColourConflict`.
        """
        components, samples = len(header.ids), self._layout.samples
        if components != samples and (components, self.colours) != (1, True):
            raise ColourConflict(f"its JPEG stream has {components} components, its page {samples} samples per pixel")
        if components == 1:
            return GREY, RGB if self.colours else GREY
        if self.colours:
            return {"rgb": RGB, "ycbcr": YCBCR}[header.stated or ("rgb" if self._photometric == RGB else "ycbcr")], RGB
        if components == 4 and header.adobe == 2 and self._photometric == RGB:
            raise ColourConflict("its JPEG stream is YCCK by its Adobe segment, its page RGB with alpha")
        return None, None

    def decode(self, data: bytes, index: int, *, scratch: bool) -> NDArray[Any]:
        """Decode a tile; with `scratch` into the buffer of this thread where it fits."""
        if not is_whole_jpeg(data):
            raise ValueError("it is cut short")
        header = self.header(data)
        space, out_space = self.space(header)
        whole = self._layout.shape
        usual = self.can_shrink and (*header.shape_yx, 3) == whole and header.bits == 8
        tile = imagecodecs.jpeg_decode(
            data,
            tables=self._tables,
            colorspace=space,
            outcolorspace=out_space,
            shape=header.shape_yx,
            out=scratch_buffer(whole) if scratch and usual else None,
        )
        return self._layout.checked(tile)

    def shrunk(self, data: bytes, by: int) -> NDArray[np.uint8] | None:
        """Decode a tile to a half, quarter or eighth of its rows and columns, in the cosine domain.

        Each 8 x 8 block is transformed back from its low frequencies alone (libjpeg-turbo's scaling):
        close to the average of areas, but not the same. Returns None if that can't be done: the tile has another size
        than the page's tiles, it is damaged, or libjpeg-turbo can't scale it. Decoding it whole then gives the error.
        """
        import simplejpeg

        rows, columns, _ = self._layout.shape
        try:
            header = self.header(data)
            if header.shape_yx != (rows, columns):
                return None
            space, _ = self.space(header)
            stated = ADOBE.get(space, b"") if space else b""
            stream = b"".join([data[:2], stated, self._segments, data[2:]])
            out: NDArray[np.uint8] = simplejpeg.decode_jpeg(
                stream, "RGB", min_height=rows // by, min_width=columns // by, min_factor=by
            )
        except (ValueError, ColourConflict):  # decoding the whole tile gives the error
            return None
        return out if out.shape == (rows // by, columns // by, 3) else None


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
    return unwritten(buffer)
