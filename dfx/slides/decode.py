"""From a tile's bytes to its pixels: a page's decoder, and what its library gets wrong or leaves unsaid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from dfx.errors import SlideError
from dfx.slides import jpeg, jpeg2000
from dfx.slides.codestream import is_whole_jpegxr, zstd_frames
from dfx.slides.jpeg import JpegTiles
from dfx.slides.jpeg2000 import Jpeg2000Tiles, ycc_to_rgb
from dfx.slides.layout import Layout
from dfx.slides.level import Colour, Decode
from dfx.tiff_rules import palette_colours

JPEGXR, ZSTD = (22610, 34934), (34926, 50000)
UNFRAMED: dict[int, Callable[..., bytes | bytearray]] = {5: imagecodecs.lzw_decode, 32773: imagecodecs.packbits_decode}
"""Codecs whose data, cut short, decode to less without an error; tifffile fills the rest with 0."""


def colour_of(page: Any, pages: int) -> Colour:
    """Return the meaning of a page's samples once decoded, "other" if dfx is not sure of their colours."""
    photometric, samples = int(page.photometric), page.samplesperpixel
    if photometric == 3:
        return "rgb" if is_palette(page) and pages == 1 else "other"
    if page.dtype != np.uint8 or pages > 1 or page.bitspersample != 8:
        return "other"
    if photometric in (0, 1):
        return "grey" if samples == 1 else "other"
    converted = samples == 3 and page.compression in (*jpeg.COMPRESSIONS, *jpeg2000.COMPRESSIONS)
    if photometric == 2 or (photometric == 6 and converted):
        alpha = int(page.extrasamples[0]) if samples == 4 and page.extrasamples else 0
        return "rgb" if samples == 3 else {1: "rgba-associated", 2: "rgba"}.get(alpha, "other")  # type: ignore[return-value]
    return "other"


def is_palette(page: Any) -> bool:
    """Whether a page's samples are indices that become RGB."""
    return bool(page.photometric == 3 and page.samplesperpixel == 1 and page.bitspersample <= 8)


def decoder(page: Any, keyframe: Any, base: int) -> Decode:
    """Make a page's decoder: a pure function of bytes, so safe in threads."""
    after: Callable[[NDArray[Any]], NDArray[Any]] | None = None
    if keyframe.photometric == 0 and keyframe.dtype == np.uint8 and keyframe.bitspersample == 8:
        after = inverted
    elif is_palette(keyframe):
        after = Palette(palette_colours(keyframe.colormap))
    tiles = JpegTiles.of(page, keyframe) or Jpeg2000Tiles.of(keyframe)
    decode = tiles.decode if tiles else tifffile_decoder(page, keyframe, base)
    if not after:
        return decode

    def decode_tile(data: bytes, index: int, *, scratch: bool) -> NDArray[Any]:
        return after(decode(data, index, scratch=scratch))

    return decode_tile


def tifffile_decoder(page: Any, keyframe: Any, base: int) -> Decode:
    """Make the decoder of a page with any other compression, from tifffile's decoder."""
    decode = keyframe.decode
    decode(None, 0)  # an unknown compression or layout is an error now, not at the first tile
    compression, layout = int(keyframe.compression), Layout.of(keyframe)
    tables = page.jpegtables
    shortest = samples_of(keyframe)

    def decode_tile(data: bytes, index: int, *, scratch: bool) -> NDArray[Any]:
        if compression in ZSTD:
            data = zstd_frames(data)
        # These codecs' libraries fill the missing part of a cut tile without an error.
        cut = compression in JPEGXR and not is_whole_jpegxr(data)
        if cut or (compression in UNFRAMED and len(UNFRAMED[compression](data)) < shortest):
            raise ValueError("it is cut short")
        segment, _, _ = decode(data, base + index, jpegtables=tables)
        return layout.checked(segment[0])

    return decode_tile


def samples_of(keyframe: Any) -> int:
    """Bytes that a tile or the shortest strip decodes to."""
    samples = keyframe.samplesperpixel if keyframe.planarconfig == 1 else 1
    rows = keyframe.imagelength % keyframe.rowsperstrip or keyframe.rowsperstrip if not keyframe.is_tiled else 0
    pixels = keyframe.tilelength * keyframe.tilewidth if keyframe.is_tiled else rows * keyframe.imagewidth
    return int(pixels * samples * keyframe.bitspersample // 8)


def joiner(page: Any) -> Callable[[list[NDArray[Any]]], NDArray[Any]] | None:
    """Return a function that converts three YCbCr planes to RGB; None for other planes. Raises `SlideError`."""
    if page.photometric != 6 or colour_of(page, 1) != "rgb":
        return None
    usual = {529: (0.299, 0.587, 0.114), 532: (0, 255, 128, 255, 128, 255)}
    for (code, values), name in zip(usual.items(), ("YCbCrCoefficients", "ReferenceBlackWhite"), strict=True):
        stored = rationals(page.tags.valueof(code, None)) or values
        if not np.allclose(stored, values, atol=0.002):
            raise SlideError(
                f"its {name} are {', '.join(f'{value:g}' for value in stored)} and not the usual "
                f"{', '.join(f'{value:g}' for value in values)}, so its colours are not known: export it as RGB"
            )
    return lambda planes: ycc_to_rgb(np.concatenate(planes, axis=2))


def rationals(value: Any) -> list[float] | None:
    """Give the rationals of a tag, stored as pairs, as their quotients."""
    return None if value is None else [a / (b or 1) for a, b in zip(value[::2], value[1::2], strict=True)]


def inverted(tile: NDArray[Any]) -> NDArray[Any]:
    """Turn a "white is zero" tile the usual way round."""
    return 255 - tile


@dataclass(frozen=True, eq=False)
class Palette:
    """Turns indices into RGB."""

    colours: NDArray[np.uint8]
    """(indices, 3)."""

    def __call__(self, tile: NDArray[Any]) -> NDArray[Any]:
        """Look the indices (rows, columns, 1) up. Raises `ValueError` where the palette has no such entry."""
        indices = tile[..., 0].astype(np.uint8)  # of 1 bit they are bool
        if (highest := int(indices.max())) >= len(self.colours):
            raise ValueError(f"it has colour {highest}, but its palette has {len(self.colours)} colours")
        return np.asarray(self.colours[indices])
