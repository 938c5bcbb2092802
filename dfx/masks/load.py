"""One loader for masks of all kinds: an array, a .npy file, an image file."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
from numpy.typing import NDArray

from dfx.errors import CallError, CallTypeError
from dfx.masks.image_file import KINDS, Image, ImageError, read_image
from dfx.remote import is_remote, local_path, read_bytes, shown, suffix

REMEDY = f"give an image file ({KINDS}), a .npy file, an array, 'tissue', 'hsv' or None"
NOISE, BRIGHT, CLEAR = 8, 64, 96
"""Grey levels of images that were compressed with losses: noise in black areas is at most NOISE over whole blocks,
wanted cells are above BRIGHT, and areas between NOISE and CLEAR are ambiguous."""
BLOCK = 8
"""Side, in cells, of a block of JPEG."""


def read_mask(path: str | Path, storage_options: Mapping[str, Any] | None = None) -> NDArray[np.bool_]:
    """Read a mask from an image file or a .npy file, a path or a URL: bool (rows, columns), true where wanted.

    The same mask gives the same cells as an array, .npy, PNG or TIFF:

    | the file or array has | wanted cells |
    |---|---|
    | bool | true |
    | integers, floats | above 0, however small, also infinity; not NaN, not below 0 |
    | a masked array | of these, the cells that are not masked |
    | 1 channel | as above |
    | 3 channels (RGB) | some channel is above 0 |
    | 2 or 4 channels | the same for the first 1 or 3, where alpha (the last) is above 0: opaque black and fully \
transparent cells are not wanted |
    | a palette | the colour is not black; an error where that differs from "the index is not 0" |
    | JPEG, lossy WebP, lossy TIFF | the brightest channel is above 64 of 255; an error where areas are \
dark grey, which may be labels or noise |
    | TIFF in which 0 is white | not black, as in a viewer; in bool arrays of tifffile and masks of ImageJ: above 0 |
    | TIFF with missing tiles | not in these tiles |
    | TIFF with a value for "no data" (GDAL) | not this value |
    | a pyramidal TIFF | the wanted cells of the largest level with at most 67 million cells |

    Rows and columns are as stored, as in slides: orientation tags (TIFF, EXIF) are not applied. A file of
    several pictures and a picture of more than 268 million cells are refused. Raises `CallError`.
    """
    name = f"mask {shown(str(path))}"
    try:
        with open_file(path, storage_options) as file:
            if suffix(path) == ".npy":
                return as_mask(load_npy(file), name)
            return mask_of_image(file, name)
    except ImageError as e:
        raise CallError(f"{name} {e}.") from e
    except OSError as e:
        problem = (
            "is not a file" if isinstance(e, FileNotFoundError) and not is_remote(path) else f"can't be read ({e})"
        )
        raise CallError(f"{name} {problem}: {REMEDY}.") from None


def open_file(path: str | Path, storage_options: Mapping[str, Any] | None) -> BinaryIO:
    """Open a local file, or a URL's bytes; raises `OSError`."""
    if is_remote(path):
        return io.BytesIO(read_bytes(path, storage_options))
    try:
        return local_path(path).open("rb")
    except ValueError as e:  # a null byte
        raise OSError(str(e)) from None


def load_npy(file: BinaryIO) -> NDArray[Any]:
    """Read a .npy file; raises `ImageError`."""
    try:
        return np.asarray(np.load(file, allow_pickle=False))
    except Exception as e:  # numpy raises ValueError, EOFError, TokenError, MemoryError and more
        raise ImageError(f"can't be read as .npy ({type(e).__name__}: {e}): save it again by numpy.save") from e


def as_mask(mask: object, name: str = "the mask") -> NDArray[np.bool_]:
    """Give a mask array (rows, columns), or with 1 to 4 channels, as bool (rows, columns); see `read_mask`.

    Raises `CallTypeError` for another kind of object, `CallError` for an array of another shape or dtype.
    """
    if not isinstance(mask, np.ndarray):
        raise CallTypeError(
            f"a mask must be 'tissue', 'hsv', None, an array (H, W), an image path or a function, "
            f"not {type(mask).__name__}."
        )
    if isinstance(mask, np.ma.MaskedArray):
        mask = mask.filled(0)
    if (
        mask.ndim not in (2, 3)
        or mask.size == 0
        or (mask.ndim == 3 and mask.shape[2] > 4)
        or mask.dtype.kind not in "biuf"
    ):
        raise CallError(
            f"a mask array must be a numeric (H, W), or (H, W, C) with C up to 4, and have a pixel, "
            f"not {mask.dtype} of shape {mask.shape}."
        )
    try:
        return wanted(Image(mask[..., None] if mask.ndim == 2 else mask))
    except ImageError as e:
        raise CallError(f"{name} {e}.") from e


def mask_of_image(file: BinaryIO, name: str) -> NDArray[np.bool_]:
    """Read a mask from an open image file; see `read_mask`. Raises `CallError`, which contains `name`."""
    try:
        return wanted(read_image(file))
    except ImageError as e:
        raise CallError(f"{name} {e}.") from e


def wanted(image: Image) -> NDArray[np.bool_]:
    """Find the wanted cells of an image; see `read_mask`. Raises `ImageError` for an ambiguous image."""
    pixels, alpha = image.pixels, None
    if pixels.shape[2] in (2, 4):
        pixels, alpha = pixels[..., :-1], pixels[..., -1] > 0
        if not (pixels > 0).any() and alpha.any() and not alpha.all():
            raise ImageError("is black in all cells and differs in alpha alone: give its alpha as the mask")
    if image.lossy:
        found: NDArray[np.bool_] = lossy_wanted(pixels.max(axis=2))
    else:
        found = np.asarray((pixels > 0).any(axis=2))  # NaN is not above 0
    if image.valid is not None:
        alpha = image.valid if alpha is None else alpha & image.valid
    if alpha is not None:
        found &= alpha
    if image.index is not None:
        by_index = image.index > 0 if alpha is None else (image.index > 0) & alpha
        if not np.array_equal(found, by_index):
            raise ImageError(
                "has a palette in which index 0 is not black, or another index is: "
                "save the indices as grey, or the colours as RGB"
            )
    if pixels.dtype.kind in "if" and not found.any() and (pixels < 0).any() and image.valid is None:
        raise ImageError("has values below 0 and no value above 0: give an array that is above 0 where wanted")
    return np.asarray(found)


def lossy_wanted(grey: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Separate wanted cells from the noise of a lossy codec; raises `ImageError` if that is impossible."""
    found = np.asarray(grey > BRIGHT)
    doubtful = ((grey > NOISE) & (grey <= CLEAR)).astype(np.uint8)
    dark = cv2.erode(doubtful, np.ones((BLOCK, BLOCK), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=0)
    if dark.any() or (not found.any() and grey.max() > grey.min()):
        raise ImageError(
            f"was compressed with losses, and has areas of grey level {NOISE} to {CLEAR} or nothing brighter: "
            "these may be labels or noise; save it as PNG"
        )
    return found
