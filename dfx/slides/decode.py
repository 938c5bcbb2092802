"""From a tile's bytes to its pixels: a page's decoder, and what its library gets wrong or leaves unsaid."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import imagecodecs
import numpy as np
from numpy.typing import NDArray

from dfx.slides.jpeg import UsualJpeg
from dfx.slides.level import Colour, Decode

JPEG, JPEG2000, JPEGXR = (6, 7), (33003, 33004, 33005, 34712), (22610, 34934)
UNFRAMED: dict[int, Callable[..., bytes | bytearray]] = {5: imagecodecs.lzw_decode, 32773: imagecodecs.packbits_decode}
"""Codecs whose data, cut short, decode to less without an error; tifffile fills the rest with 0."""
YCC_TO_RGB = np.array([[1, 0, 1.402, -179.456], [1, -0.344136, -0.714136, 135.458816], [1, 1.772, 0, -226.816]])
"""ITU-T T.871 (JFIF), full range."""


def colour_of(page: Any, pages: int) -> Colour:
    """Say what a page's samples are, "other" where they are no colours that dfx is sure of."""
    photometric, samples = int(page.photometric), page.samplesperpixel
    if page.dtype != np.uint8 or pages > 1 or page.bitspersample != 8:
        return "rgb" if photometric == 3 and page.bitspersample <= 8 else "other"
    if photometric in (0, 1):
        return "grey" if samples == 1 else "other"
    if photometric == 3:
        return "rgb"
    converted = page.compression in (*JPEG, 33003)
    if photometric == 2 or (photometric == 6 and converted):
        alpha = int(page.extrasamples[0]) if page.extrasamples else 0
        return "rgb" if samples == 3 else {1: "rgba-associated", 2: "rgba"}.get(alpha, "other")  # type: ignore[return-value]
    return "other"


def decoder(page: Any, keyframe: Any, base: int) -> Decode:
    """Make a page's decoder: a pure function of bytes, so safe in threads."""
    decode = keyframe.decode
    usual = UsualJpeg.of(page, keyframe)
    decode(None, 0)  # an unknown compression or layout is an error now, not at the first tile
    compression, photometric = int(keyframe.compression), int(keyframe.photometric)
    tables, header = page.jpegtables, getattr(page, "jpegheader", None)  # frames have no header of their own
    after: Callable[[NDArray[Any], bytes], NDArray[Any]] | None = None
    if compression == 33003:
        after = ycc_to_rgb
    elif photometric == 0 and keyframe.dtype == np.uint8 and keyframe.bitspersample == 8:
        after = inverted
    elif photometric == 3:
        after = Palette(np.asarray(keyframe.colormap))
    # These codecs' libraries fill what is missing of a cut tile without an error; NDPI's pieces have no end mark.
    complete: Callable[[bytes], bool] | None = None
    if compression in (*JPEG, *JPEG2000) and not header:
        complete = has_end_mark
    elif compression in JPEGXR:
        complete = has_all_of_jpegxr
    elif compression in UNFRAMED:
        shortest = samples_of(keyframe)

        def complete(data: bytes) -> bool:
            return len(UNFRAMED[compression](data)) >= shortest

    def decode_tile(data: bytes, index: int, *, scratch: bool) -> NDArray[Any]:
        if complete and not complete(data):
            raise ValueError("it is cut short")
        if usual and scratch:
            with contextlib.suppress(ValueError):  # another size than the page's: left to tifffile
                return usual.decode(data)
        segment, _, _ = decode(data, base + index, jpegtables=tables, jpegheader=header)
        tile: NDArray[Any] = segment[0]
        return after(tile, data) if after else tile

    return decode_tile


def samples_of(keyframe: Any) -> int:
    """Bytes that a tile or the shortest strip decodes to."""
    samples = keyframe.samplesperpixel if keyframe.planarconfig == 1 else 1
    rows = keyframe.imagelength % keyframe.rowsperstrip or keyframe.rowsperstrip if not keyframe.is_tiled else 0
    pixels = keyframe.tilelength * keyframe.tilewidth if keyframe.is_tiled else rows * keyframe.imagewidth
    return int(pixels * samples * keyframe.bitspersample // 8)


def has_end_mark(data: bytes) -> bool:
    """Whether a JPEG or JPEG 2000 codestream ends as it must; scanners pad tiles with zeros."""
    return data.endswith(b"\xff\xd9") or data.rstrip(b"\0").endswith(b"\xff\xd9")


def has_all_of_jpegxr(data: bytes) -> bool:
    """Whether a JPEG XR container is as long as its ImageOffset and ImageByteCount say (ITU-T T.832, annex A)."""
    start = int.from_bytes(data[4:8], "little")
    entries = (data[at : at + 12] for at in range(start + 2, start + 2 + 12 * data[start], 12))
    tags = {int.from_bytes(e[:2], "little"): int.from_bytes(e[8:12], "little") for e in entries}
    return 0xBCC0 in tags and 0xBCC1 in tags and tags[0xBCC0] + tags[0xBCC1] <= len(data)


def ycc_to_rgb(tile: NDArray[Any], data: bytes) -> NDArray[Any]:
    """Convert an Aperio 33003 tile, which is YCbCr whatever its tags say.

    OpenJPEG converts by itself when the chroma is subsampled, as the codestream's SIZ segment says.
    """
    siz = data.find(b"\xff\x51")
    components = int.from_bytes(data[siz + 38 : siz + 40], "big")
    steps = [data[siz + 40 + 3 * i + 1 : siz + 40 + 3 * i + 3] for i in range(components)]
    if siz < 0 or any(step != b"\x01\x01" for step in steps):
        return tile
    return cv2.transform(tile, YCC_TO_RGB)


def inverted(tile: NDArray[Any], data: bytes) -> NDArray[Any]:
    """Turn a "white is zero" tile the usual way round."""
    return 255 - tile


@dataclass(frozen=True, eq=False)
class Palette:
    """Turns indices into RGB."""

    colormap: NDArray[Any]

    def __call__(self, tile: NDArray[Any], data: bytes) -> NDArray[Any]:
        """Look the indices (rows, columns, 1) up."""
        table: NDArray[np.uint8] = (self.colormap >> 8).astype(np.uint8).T
        return np.asarray(table[tile[..., 0]])
