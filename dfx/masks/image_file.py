"""Image files as they are stored: every bit, no rotation, no colour conversion except by the codec."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from PIL.Image import Image as PillowImage

from dfx.tiff_rules import has_aspect, palette_colours

KINDS = "PNG, JPEG, TIFF, BMP, GIF or WebP"
MOST_PIXELS = 2**28
"""Pixels of the largest picture that is decoded: 16,384 x 16,384."""
GOOD_PIXELS = 2**26
"""Pixels of the largest level of a pyramid that is read, where a smaller level exists."""
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PILLOW: dict[bytes, Callable[[Any], PillowImage]] = {
    b"\x89PNG": PngImagePlugin.PngImageFile,
    b"\xff\xd8\xff": JpegImagePlugin.JpegImageFile,
    b"BM": BmpImagePlugin.BmpImageFile,
    b"GIF8": GifImagePlugin.GifImageFile,
    b"RIFF": WebPImagePlugin.WebPImageFile,
}
"""Readers by the first bytes of a file. `PIL.Image.open` would warn of some sizes below `MOST_PIXELS`."""
LOSSLESS = {1, 2, 3, 4, 5, 8, 32773, 32946, 34925, 50000}
"""Compressions of TIFF that keep every value: none, CCITT, LZW, deflate, PackBits, LZMA, zstd."""
RGB_CODECS = {6, 7, 50001}
"""Compressions of TIFF whose YCbCr tiles are decoded to RGB: JPEG, WebP."""


class ImageError(Exception):
    """A file that is no usable image; the message has the fact and the remedy, and the caller adds the name."""


@dataclass(frozen=True, eq=False)
class Image:
    """The pixels of an image file."""

    pixels: NDArray[Any]
    """(rows, columns, channels) as stored, row 0 first whatever an orientation tag says. 1 channel is grey, 2 are grey
    and alpha, 3 are RGB, 4 are RGB and alpha. Grey of 1 to 7 bits is scaled to 0 to 255; palettes are colours."""
    index: NDArray[np.unsignedinteger[Any]] | None = None
    """(rows, columns): numbers of palette entries, where the file has a palette."""
    lossy: bool = False
    """Whether the codec changes values: zero may become a small value."""
    associated: bool = False
    """Whether colours are multiplied by alpha already."""
    valid: NDArray[np.bool_] | None = None
    """(rows, columns): pixels that have data. False in tiles that the file lacks, and where a pixel has the value that
    the file names as "no data" (GDAL's tag); None: all pixels have data."""


def read_image(file: BinaryIO) -> Image:
    """Read a picture of a file object.

    Of a TIFF, this is the only picture, or the largest level of its pyramid with at most `GOOD_PIXELS` pixels. Raises
    `ImageError` for a file with several pictures, for more than `MOST_PIXELS`, and for colours that are not grey, RGB
    or a palette.
    """
    head = file.read(16)
    file.seek(0)
    try:
        if head[:4] in TIFF:
            with tifffile.TiffFile(file) as tif:
                return read_tiff(tif)
        opener = next((opener for magic, opener in PILLOW.items() if head.startswith(magic)), None)
        if opener is None or (head[:4] == b"RIFF" and head[8:12] != b"WEBP"):
            raise ImageError(f"is not an image that can be read: save it as {KINDS}")
        return read_pillow(file, head, opener)
    except (ImageError, MemoryError):
        raise
    except Exception as e:  # codecs raise many kinds
        raise ImageError(f"can't be read as an image ({type(e).__name__}: {e}): it is damaged; save it again") from e


def check_size(rows: int, columns: int) -> None:
    """Refuse a picture that is too large to decode whole."""
    if rows * columns > MOST_PIXELS:
        raise ImageError(
            f"has {columns} x {rows} pixels, more than {MOST_PIXELS:,}: "
            "save it smaller, or as a pyramidal TIFF whose smaller levels can be read"
        )


def read_pillow(file: BinaryIO, head: bytes, opener: Callable[[Any], PillowImage]) -> Image:
    """Read a file that is not a TIFF; 16-bit PNG with imagecodecs, since Pillow drops the lower byte of its colours."""
    with opener(file) as image:
        check_size(image.height, image.width)
        if (frames := getattr(image, "n_frames", 1)) > 1:
            raise ImageError(f"has {frames} pictures: save the wanted picture as a file of its own")
        lossy = isinstance(image, JpegImagePlugin.JpegImageFile) or (head[:4] == b"RIFF" and head[12:16] != b"VP8L")
        if head[:4] == b"\x89PNG":
            file.seek(0)
            data = file.read()
            if data[24] == 16:  # bit depth in the header
                return Image(with_channels(imagecodecs.png_decode(data)))
            file.seek(0)
            image = opener(file)
        index = np.asarray(image.getchannel(0)) if image.mode in ("P", "PA") else None
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
            raise ImageError(f"has colours of kind {image.mode}: save it as grey or RGB")
        if image.has_transparency_data and image.mode not in ("LA", "RGBA"):
            image = image.convert("RGBA")
        elif image.mode in ("1", "P", "PA"):
            image = image.convert("L" if image.mode == "1" else "RGB")
        return Image(with_channels(np.asarray(image)), index, lossy)


def with_channels(pixels: NDArray[Any]) -> NDArray[Any]:
    """Give grey pixels a channel axis."""
    return pixels[..., None] if pixels.ndim == 2 else pixels


# TIFF


def read_tiff(tif: tifffile.TiffFile) -> Image:
    """Read the picture of a TIFF."""
    page = main_page(tif)
    check_size(page.imagelength, page.imagewidth)
    where = zip(page.dataoffsets, page.databytecounts, strict=True)
    if any(offset + count > tif.filehandle.size for offset, count in where):
        raise ImageError("is truncated: some of its pixels lie past its end; copy it again")
    pixels = page.asarray()
    if page.axes == "SYX":  # a plane per channel
        pixels = np.moveaxis(pixels, 0, -1)
    elif page.axes not in ("YX", "YXS"):
        raise ImageError(f"has axes {page.axes}: save one plane as a file of its own")
    pixels = with_channels(pixels)
    code = int(page.photometric)
    colours = {0: 1, 1: 1, 2: 3, 3: 1, 4: 1, 6: 3}.get(code)
    if colours is None or (code == 6 and int(page.compression) not in RGB_CODECS):
        raise ImageError(f"has colours of kind {page.photometric.name}: save it as grey or RGB")
    extra = [int(kind) for kind in page.extrasamples][-1:] if page.samplesperpixel > colours else []
    if colours == 1 and pixels.shape[2] == 3:
        extra = []  # three channels without a name
    elif pixels.shape[2] - colours not in (0, 1) or (colours == 1 and extra == [0]):
        raise ImageError(f"has {pixels.shape[2]} channels that are neither colours nor alpha: save one channel")
    lossy = int(page.compression) not in LOSSLESS
    if lossy and pixels.dtype != np.uint8:
        raise ImageError(f"is compressed with losses in {pixels.dtype}: save it without losses")
    valid = with_data(page, pixels[..., :colours])
    if code == 3:
        if pixels.shape[2] > 1:
            raise ImageError("has a palette and alpha: save it as RGBA")
        return Image(palette_colours(page.colormap)[pixels[..., 0]], pixels[..., 0], lossy, valid=valid)
    pixels = scaled(pixels, page.bitspersample)
    if colours == 3 and extra == [0] and (pixels[..., 3] != opaque(pixels.dtype)).any():
        raise ImageError("has a fourth channel, which may be alpha or not: save it as RGB, or as RGBA with its kind")
    if code == 0:
        pixels = black_is_zero(pixels, tif, page)
    return Image(pixels, None, lossy, extra == [1], valid)


def opaque(dtype: np.dtype[Any]) -> float:
    """Give the alpha of pixels that are not transparent."""
    return np.iinfo(dtype).max if dtype.kind in "ui" else 1


def with_data(page: Any, colours: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Find the pixels that have data; None if all pixels have data."""
    stored = (np.array(page.databytecounts) > 0) & (np.array(page.dataoffsets) > 0)
    valid = None
    if not stored.all():
        shape = page.imagelength, page.imagewidth
        tile = (page.tilelength, page.tilewidth) if page.is_tiled else (min(page.rowsperstrip, shape[0]), shape[1])
        grid = [-(-size // side) for size, side in zip(shape, tile, strict=True)]
        there = stored.reshape(-1, *grid).any(axis=0)  # planes, where each channel has its own tiles
        valid = there.repeat(tile[0], axis=0).repeat(tile[1], axis=1)[: shape[0], : shape[1]]
    if 42113 in page.tags:  # GDAL_NODATA
        known = (colours != page.nodata).any(axis=2)
        valid = known if valid is None else valid & known
    return valid


def main_page(tif: tifffile.TiffFile) -> Any:
    """Find the page that is read: the only picture, or a level of the only pyramid."""
    pages: list[Any] = []
    seen: set[int] = set()
    for page in tif.pages:
        if page.offset in seen:
            raise ImageError("has directories that form a loop: it is damaged; save it again")
        seen.add(page.offset)
        pages.append(page)
    pages += list(getattr(pages[0], "pages", None) or ())
    largest = max(pages, key=lambda p: p.imagelength * p.imagewidth)
    levels = [p for p in pages if p is largest or is_smaller(p, largest)]
    others = [p for p in pages if p not in levels and not p.subfiletype & 1]
    depth = math.prod(tif.series[0].shape) // max(1, math.prod(pages[0].shape)) if len(pages) == 1 else 1
    if others or depth > 1:
        count = len(others) + 1 if others else depth
        raise ImageError(
            f"has {count} pictures, and nothing says which is wanted: save the wanted picture as a file of its own"
        )
    levels.sort(key=lambda p: -p.imagelength * p.imagewidth)
    return next((p for p in levels if p.imagelength * p.imagewidth <= GOOD_PIXELS), levels[-1])


def is_smaller(page: Any, largest: Any) -> bool:
    """Whether a page has the shape of a smaller level, also of a level whose size is rounded."""
    if page.imagewidth >= largest.imagewidth or page.imagelength >= largest.imagelength or page.subfiletype & 4:
        return False
    if page.samplesperpixel != largest.samplesperpixel or page.dtype != largest.dtype:
        return False
    return has_aspect((page.imagelength, page.imagewidth), (largest.imagelength, largest.imagewidth))


def scaled(pixels: NDArray[Any], bits: int) -> NDArray[Any]:
    """Scale grey of 1 to 7 bits to 0 to 255, as decoders of PNG do."""
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype == np.uint8 and bits < 8:
        return pixels * np.uint8(255 // (2**bits - 1))
    return pixels


def black_is_zero(pixels: NDArray[Any], tif: tifffile.TiffFile, page: Any) -> NDArray[Any]:
    """Invert a picture in which 0 is white, so that 0 is black.

    Two writers set this tag without meaning white by 0: tifffile for every bool array, and ImageJ for masks that it
    shows through an inverting table. Their values stay.
    """
    by_tifffile = str(page.tags.valueof(305, "") or "").startswith("tifffile") and page.bitspersample == 1
    if by_tifffile or tif.is_imagej:
        return pixels
    if pixels.dtype.kind != "u":
        raise ImageError(f"has white as 0 in values of {pixels.dtype}: save it with black as 0")
    grey = np.iinfo(pixels.dtype).max if page.bitspersample < 8 else 2**page.bitspersample - 1
    return np.concatenate([grey - pixels[..., :1], pixels[..., 1:]], axis=2)
