"""JPEG 2000 tiles: their colours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import imagecodecs
import numpy as np
from numpy.typing import NDArray

from dfx.slides.codestream import ColourConflict, Jpeg2000Header, is_whole_jpeg2000, jpeg2000_header
from dfx.slides.layout import Layout

COMPRESSIONS = 33003, 33004, 33005, 34712
YCC_TO_RGB = np.array([[1, 0, 1.402, -179.456], [1, -0.344136, -0.714136, 135.458816], [1, 1.772, 0, -226.816]])
"""ITU-T T.871 (JFIF), full range."""


@dataclass(frozen=True)
class Jpeg2000Tiles:
    """The tiles or strips of a page, each a codestream or JP2 file of its own. Safe in threads.

    Three 8-bit samples become RGB. The codestream, the container around it, the tag (PhotometricInterpretation) and
    the vendor decide together, for each tile. The first row that fits decides. "Transform" is the multiple component
    transform of the codestream's COD segment: the encoder made YCbCr of RGB, and the decoder makes RGB again.

    | transform | container's colour space | components | compression, vendor | tag | colours |
    |---|---|---|---|---|---|
    | | other than sRGB and sYCC | | | | refused |
    | no | sRGB | subsampled | | | refused: only YCbCr is subsampled |
    | | sYCC | | | | YCbCr, converted by the decoder |
    | no | none | subsampled | | | YCbCr, converted by the decoder |
    | yes | | | 33003, Aperio | | refused: Aperio's are YCbCr, without a transform |
    | yes | | | other | | RGB; a tag YCbCr means the transform, as with JPEG |
    | no | sRGB | | 33003, Aperio | | refused |
    | no | sRGB | | other | RGB | RGB |
    | no | sRGB | | other | YCbCr | refused |
    | no | none | | 33003, Aperio | | YCbCr, whatever the tag says |
    | no | none | | any | YCbCr | YCbCr |
    | no | none | | 33003, other | RGB | refused: 33003 says YCbCr, the tag RGB |
    | no | none | | 33004, 33005, 34712 | RGB | RGB |

    Samples of 16 bits are never converted: they are no colours to dfx (`colour_of` gives "other").
    """

    layout: Layout
    compression: int
    photometric: int
    aperio: bool
    """Whether the vendor is Aperio, or Huron, which writes the same."""

    @classmethod
    def of(cls, keyframe: Any) -> Jpeg2000Tiles | None:
        """Describe the tiles of a page; None where they are not JPEG 2000."""
        if keyframe.compression not in COMPRESSIONS:
            return None
        aperio = bool(keyframe.parent.is_svs) or str(keyframe.tags.valueof(271, "")).startswith("Huron")
        return cls(Layout.of(keyframe), int(keyframe.compression), int(keyframe.photometric), aperio)

    def decode(self, data: bytes, index: int, *, scratch: bool) -> NDArray[Any]:
        """Decode a tile."""
        if not is_whole_jpeg2000(data):
            raise ValueError("it is cut short")
        colours = self.layout.samples == 3 and self.layout.dtype == np.uint8 and self.photometric in (2, 6)
        ycbcr = colours and self.is_ycbcr(jpeg2000_header(data))
        tile = self.layout.checked(imagecodecs.jpeg2k_decode(data))
        return ycc_to_rgb(tile) if ycbcr else tile

    def is_ycbcr(self, header: Jpeg2000Header) -> bool:
        """Whether the decoder gives YCbCr. Raises `ColourConflict`."""
        if header.components != 3:
            raise ColourConflict(f"its JPEG 2000 stream has {header.components} components, its page 3")
        ycbcr = self.compression == 33003 and self.aperio
        srgb = header.enumerated == 16
        if header.enumerated not in (None, 16, 18):
            raise ColourConflict(f"its JP2 container states colour space {header.enumerated}, not sRGB or sYCC")
        if srgb and header.subsampled:
            raise ColourConflict("its JP2 container states sRGB, and its components are subsampled, as only in YCbCr")
        if header.enumerated == 18 or header.subsampled:  # imagecodecs converts these
            return False
        if ycbcr and (header.transformed or srgb):
            raise ColourConflict("it has Aperio's compression 33003, which is YCbCr, and its codestream says RGB")
        if header.transformed:
            return False
        if srgb and self.photometric == 6:
            raise ColourConflict("its JP2 container states sRGB, and its PhotometricInterpretation YCbCr")
        if ycbcr or self.photometric == 6:
            return True
        if self.compression == 33003 and not srgb:
            raise ColourConflict(
                "it has compression 33003, which is YCbCr in Aperio's slides, its PhotometricInterpretation says RGB, "
                "and its codestream says nothing"
            )
        return False


def ycc_to_rgb(tile: NDArray[Any]) -> NDArray[Any]:
    """Convert full-range YCbCr, uint8 (rows, columns, 3)."""
    return cv2.transform(tile, YCC_TO_RGB)
