"""Methods that find tissue in a thumbnail."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from dfx.errors import CallError, CallTypeError

Thumbnail: TypeAlias = NDArray[np.uint8]
Segment: TypeAlias = Callable[[Thumbnail], NDArray[Any]]
"""Finds tissue: a thumbnail, uint8 RGB (H, W, 3), to (H, W), not zero on tissue."""

SATURATION = 15
"""Of 255, above which something is stained: as in CLAM's presets for biopsies and resections."""
SMALLEST = 64
"""Cells of the least piece of tissue that is kept: (64 µm)² at the 1.25x of a mask."""
LARGEST_HOLE = 1024
"""Cells of the largest hole that is filled: (256 µm)², a vessel or a gland, not the glass inside a ring."""
DARK, BRIGHT, GLASS = 64, 112, 128
"""Of 255. The brightest channel is below DARK in most of a dark background, and above BRIGHT in a quarter of a
bright-field scan. The darkest channel of glass is above GLASS."""


@dataclass(frozen=True, eq=False)
class Mask:
    """Where tissue is, and who says so."""

    cells: NDArray[np.bool_]
    """(rows, columns), stretched over the whole slide."""
    method: str
    """What found it: "otsu", "hsv", a function's name, or where it was read from."""


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


def otsu(thumbnail: Thumbnail) -> NDArray[np.bool_]:
    """Find what is darker than Otsu's threshold in a uint8 RGB thumbnail (H, W, 3); bool (H, W)."""
    grey = cv2.cvtColor(thumbnail, cv2.COLOR_RGB2GRAY)
    return np.asarray(grey < otsu_threshold(grey.astype(np.uint8)))


def hsv(thumbnail: Thumbnail) -> NDArray[np.bool_]:
    """Find what is stained, and no ink, in a uint8 RGB thumbnail (H, W, 3); bool (H, W).

    A threshold of saturation after a median, closing, removal of specks and filling of holes, as CLAM does
    (doi:10.1038/s41551-020-00682-w); what has the colours of marker pens is left out.
    """
    smooth = np.asarray(cv2.medianBlur(thumbnail, 5), np.uint8)
    marks = ink(smooth)
    stained = (cv2.cvtColor(smooth, cv2.COLOR_RGB2HSV)[..., 1] > SATURATION) & ~marks
    closed = cv2.morphologyEx(stained.astype(np.uint8), cv2.MORPH_CLOSE, disc(7)) > 0
    kept = without_specks(closed & ~marks, SMALLEST)
    return np.asarray((kept | holes(kept, LARGEST_HOLE)) & ~marks)


def ink(thumbnail: Thumbnail) -> NDArray[np.bool_]:
    """Find pen marks, black, blue, green and red, in a uint8 RGB thumbnail; bool (H, W).

    By hue, where stains are not: haematoxylin and eosin lie between violet and pink, DAB is brown, and the
    blue of a counterstain is pale. Grown over the paler rim of a stroke; what is too small for one stays.
    """
    hue, saturation, value = cv2.split(cv2.cvtColor(thumbnail, cv2.COLOR_RGB2HSV))  # hue: 0 to 179
    black = (value < 70) | ((value < 110) & (saturation < 50))
    green = (hue >= 35) & (hue < 90) & (saturation > 50)
    blue = (hue >= 90) & (hue < 122) & (saturation > 110)
    red = ((hue < 6) | (hue >= 174)) & (saturation > 165)
    seeds = without_specks(black | green | blue | red, SMALLEST)
    return cv2.dilate(seeds.astype(np.uint8), disc(9)) > 0


def has_dark_background(thumbnail: Thumbnail) -> bool:
    """Whether a uint8 RGB thumbnail is mostly dark, as in fluorescence, where tissue is brighter than its surroundings.

    Bright field in a black frame, by which some scanners fill what they skip, is not: within the frame are a few large
    areas, which are bright, and are rectangles or have glass at their rims. Rows and columns of pure white at the
    border do not count: the file lacks them.
    """
    content = (thumbnail != 255).any(axis=2)
    if not content.any():
        return False
    (top, bottom), (left, right) = (np.flatnonzero(content.any(axis=axis))[[0, -1]] for axis in (1, 0))
    thumbnail = thumbnail[top : bottom + 1, left : right + 1]
    value = thumbnail.max(axis=2)
    if (value >= DARK).mean() >= 0.5 or value.max() == value.min():
        return False
    dark = thumbnail[value < DARK]
    _, first, counts = np.unique(dark @ np.array([1, 256, 65536]), return_index=True, return_counts=True)
    frame = dark[first[counts.argmax()]].astype(np.int16)  # the most frequent colour
    scanned = (np.abs(thumbnail - frame) > 4).any(axis=2)
    side = max(3, min(value.shape) // 16)
    areas = cv2.morphologyEx(scanned.astype(np.uint8), cv2.MORPH_OPEN, np.ones((side, side), np.uint8))
    if areas.sum() < 0.5 * scanned.sum() or np.percentile(value[areas > 0], 75) < BRIGHT:
        return True
    outlines, _ = cv2.findContours(areas, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    boxes = sum(width * height for *_, width, height in map(cv2.boundingRect, outlines))
    whole = cv2.drawContours(np.zeros_like(areas), outlines, -1, 1, cv2.FILLED)
    rim = whole > cv2.erode(whole, np.ones((5, 5), np.uint8), borderValue=0)
    return bool(whole.sum() < 0.85 * boxes and np.median(thumbnail.min(axis=2)[rim]) < GLASS)


def disc(size: int) -> NDArray[np.uint8]:
    """Give a round kernel."""
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)), np.uint8)


def without_specks(cells: NDArray[np.bool_], least: int) -> NDArray[np.bool_]:
    """Leave out connected pieces of less than some cells."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(cells.astype(np.uint8), connectivity=4)
    large = stats[:, cv2.CC_STAT_AREA] >= least
    large[0] = False  # what is false
    return np.asarray(large[labels])


def holes(cells: NDArray[np.bool_], most: int) -> NDArray[np.bool_]:
    """Find what is enclosed by a mask, in pieces of at most some cells."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats((~cells).astype(np.uint8), connectivity=4)
    left, top, width, height, area = stats.T
    enclosed = (left > 0) & (top > 0) & (left + width < cells.shape[1]) & (top + height < cells.shape[0])
    enclosed[0] = False  # the mask itself
    return np.asarray((enclosed & (area <= most))[labels])


METHODS: dict[str, Segment] = {"otsu": otsu, "hsv": hsv}
"""By name."""
_DOTTED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_method(mask: object) -> bool:
    """Whether a mask is given by what finds it: a name of `METHODS`, "module:function", or a function."""
    return mask in METHODS or _DOTTED.fullmatch(mask) is not None if isinstance(mask, str) else callable(mask)


def segment_of(method: str | Segment) -> Segment:
    """Give what finds tissue: by name, as "module:function" that can be imported, or a function as it is.

    Raises `CallError` for a name that is none, `CallTypeError` for what can't be called with a thumbnail.
    """
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]
    found: Any = method
    if isinstance(method, str):
        if _DOTTED.fullmatch(method) is None:
            close = difflib.get_close_matches(method, METHODS, n=1)
            raise CallError(
                f"{method!r} finds no tissue{f': did you mean {close[0]!r}?' if close else ':'} "
                f"use {', '.join(map(repr, METHODS))}, 'module:function', or a function."
            )
        module, name = method.split(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as e:
            raise CallError(f"{method!r} can't be imported ({e}): install it here and on the workers.") from e
    if hasattr(found, "state_dict"):  # a torch module can be called, but not with a thumbnail
        raise CallTypeError(f"a {type(found).__name__} takes no thumbnail: give dfx.load_segmenter(module, mpp=...).")
    if not callable(found):
        raise CallTypeError(f"tissue is found by a name or a function of a thumbnail, not {type(found).__name__}.")
    return found  # type: ignore[no-any-return]


def method_name(method: str | Segment) -> str:
    """Name what finds tissue, for a store."""
    if isinstance(method, str):
        return method
    return str(getattr(method, "name", None) or getattr(method, "__qualname__", type(method).__qualname__))
