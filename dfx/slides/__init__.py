"""Slides: `open_slide` and what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfx.errors import CallTypeError, SlideError
from dfx.resolution import one, pair
from dfx.slides.level import Level
from dfx.slides.slide import Slide
from dfx.slides.tiff import open_tiff

__all__ = ["Level", "Slide", "open_slide"]


def open_slide(
    url: str | Path,
    mpp: float | tuple[float, float] | None = None,
    power: float | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Slide:
    """Open a whole-slide image of the TIFF family, from a path or any URL of fsspec.

    `mpp` (microns per baseline pixel, a number or (x, y)) and `power` (objective) go before what
    the file says; one never implies the other. Raises `SlideError` for a file that is missing,
    truncated or of another kind; whole pictures are read later, tile by tile. `storage_options`: those
    of fsspec's file system, or a mapping of protocols ("s3") or URL prefixes ("s3://bucket/in") to such.
    """
    if not isinstance(url, str | Path):
        raise CallTypeError(f"a slide is given by its path (str or Path), not by {type(url).__name__}.")
    if not str(url) or "\0" in str(url):
        raise SlideError(f"{str(url)!r} is no path: give a slide's file.")
    return open_tiff(
        str(url),
        mpp=None if mpp is None else pair(mpp, "mpp"),
        power=None if power is None else one(power, "power"),
        storage_options=storage_options,
    )
