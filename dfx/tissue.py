"""Tissue masks: from a thumbnail, from an array, from an image file."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dfx.errors import CallError, CallTypeError
from dfx.remote import is_remote, read_bytes, shown


def otsu_threshold(grey: NDArray[np.uint8]) -> int:
    """Otsu's threshold (doi:10.1109/TSMC.1979.4310076) of uint8 values, as scikit-image finds it.

    The largest value of the darker class: `grey < threshold` is the reference's tissue. An image
    of one value gives that value, so that nothing is below it.
    """
    counts = np.bincount(grey.ravel(), minlength=256).astype(np.float64)
    first, last = np.flatnonzero(counts)[[0, -1]]
    if first == last:
        return int(first)
    counts, values = counts[first : last + 1], np.arange(first, last + 1, dtype=np.float64)
    below, above = np.cumsum(counts), np.cumsum(counts[::-1])[::-1]
    mean_below = np.cumsum(counts * values) / below
    mean_above = (np.cumsum((counts * values)[::-1]) / above[::-1])[::-1]
    between = below[:-1] * above[1:] * (mean_below[:-1] - mean_above[1:]) ** 2
    return int(values[np.argmax(between)])


def tissue_mask(thumbnail: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Find what is darker than Otsu's threshold in a uint8 RGB thumbnail (H, W, 3); bool (H, W)."""
    grey = cv2.cvtColor(thumbnail, cv2.COLOR_RGB2GRAY)
    return np.asarray(grey < otsu_threshold(grey.astype(np.uint8)))


def read_mask(path: str | Path, storage_options: Mapping[str, Any] | None = None) -> NDArray[np.bool_]:
    """Read a mask from an image file or .npy, a path or a URL: bool (H, W), true where it isn't zero (black)."""
    name = shown(str(path))
    remedy = "give an image file (PNG, JPEG, TIFF), a .npy array, an array, 'tissue' or None."
    if not is_remote(path) and not Path(path).is_file():
        raise CallError(f"mask {name} is not a file: {remedy}")
    try:
        data = read_bytes(str(path), storage_options) if is_remote(path) else Path(path).read_bytes()
    except OSError as e:
        raise CallError(f"mask {name} can't be read ({e}): {remedy}") from None
    if Path(name).suffix.lower() == ".npy":
        try:
            return as_mask(np.load(io.BytesIO(data), allow_pickle=False))
        except Exception as e:  # numpy raises ValueError, EOFError, TokenError, MemoryError and more
            raise CallError(f"mask {name} can't be read ({type(e).__name__}: {e}): {remedy}") from e
    try:
        image = cv2.imdecode(np.frombuffer(data or b"\0", np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as e:
        raise CallError(f"mask {name} can't be read ({e}): {remedy}") from e
    if image is None:
        raise CallError(f"mask {name} is not an image that can be read: {remedy}")
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) > 0)


def as_mask(mask: object) -> NDArray[np.bool_]:
    """Give a mask array (H, W) or (H, W, C) of any dtype as bool (H, W): true where not zero."""
    if not isinstance(mask, np.ndarray):
        raise CallTypeError(
            f"a mask must be 'tissue', None, an array (H, W) or an image path, not {type(mask).__name__}."
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
    return np.asarray(mask != 0) if mask.ndim == 2 else np.asarray((mask != 0).any(axis=2))
