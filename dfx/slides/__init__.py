"""Slides: `open_slide` and what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from dfx.errors import CallError, CallTypeError, FormatError, SlideError, UnknownFormatError
from dfx.resolution import one, pair
from dfx.slides.identity import is_same
from dfx.slides.level import Level
from dfx.slides.openslide import installed, open_openslide, recognises
from dfx.slides.slide import Slide
from dfx.slides.tiff import open_tiff

__all__ = ["Level", "Slide", "is_same", "open_slide"]


def open_slide(
    url: str | Path,
    mpp: float | tuple[float, float] | None = None,
    power: float | None = None,
    storage_options: Mapping[str, Any] | None = None,
    backend: Literal["auto", "tiff", "openslide"] = "auto",
) -> Slide:
    """Open a whole-slide image of the TIFF family, or what OpenSlide reads beside it, from a path or a URL of fsspec.

    `mpp` (microns per baseline pixel, a number or (x, y)) and `power` (objective) go before what
    the file says; one never implies the other. Raises `SlideError` for a file that is missing,
    truncated or of another kind; whole pictures are read later, tile by tile. `storage_options`: those
    of fsspec's file system, or a mapping of protocols ("s3") or URL prefixes ("s3://bucket/in") to such.

    `backend`: with "auto", dfx reads the TIFF family. OpenSlide, if it is installed, reads the kinds of file that dfx
    does not read: DICOM, MIRAX, VMS, Sakura, Zeiss CZI, and Ventana BIF and Trestle, whose tiles have to be stitched.
    It also reads other local files whose vendor it recognises, if dfx does not know their kind, or can't say which of
    several images is the slide. A damaged TIFF is never passed from dfx to OpenSlide. `slide.backend` names the reader.
    """
    if not isinstance(url, str | Path):
        raise CallTypeError(f"a slide is given by its path (str or Path), not by {type(url).__name__}.")
    if not str(url) or "\0" in str(url):
        raise SlideError(f"{str(url)!r} is no path: give a slide's file.")
    if backend not in ("auto", "tiff", "openslide"):
        raise CallError(f"backend must be 'auto', 'tiff' or 'openslide', not {backend!r}.")
    mpp_xy = None if mpp is None else pair(mpp, "mpp")
    objective = None if power is None else one(power, "power")
    if backend != "openslide":
        try:
            return open_tiff(str(url), mpp=mpp_xy, power=objective, storage_options=storage_options)
        except FormatError as e:
            if backend == "tiff" or not installed():
                raise
            if isinstance(e, UnknownFormatError) and not recognises(str(url), storage_options):
                raise
    return open_openslide(str(url), mpp=mpp_xy, power=objective, storage_options=storage_options)
