"""Slides made of given images, for tests of where pixels lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

import dfx
from dfx import resolution as res
from dfx.resolution import Units

LINE = 32
"""Pixels of the baseline that a line is wide."""
ROUND = {"down": np.floor, "up": np.ceil, "nearest": np.rint}


def lined(size_xy: tuple[int, int], at_xy: tuple[int, int]) -> NDArray[np.uint8]:
    """Grey with a black column and a black row."""
    image = np.full((size_xy[1], size_xy[0], 3), 200, np.uint8)
    image[:, at_xy[0] : at_xy[0] + LINE] = 0
    image[at_xy[1] : at_xy[1] + LINE] = 0
    return image


def smaller(image: NDArray[np.uint8], factors: tuple[int, int], rounding: str, pad: int | None) -> NDArray[np.uint8]:
    """Every factor-th pixel: pixel i lies at factor * i; `pad`: black up to a multiple of so many pixels."""
    x, y = factors
    rows, columns = (max(1, int(ROUND[rounding](n / f))) for n, f in zip(image.shape, (y, x), strict=False))
    level = image[np.minimum(np.arange(rows) * y + y // 2, image.shape[0] - 1)]
    level = level[:, np.minimum(np.arange(columns) * x + x // 2, image.shape[1] - 1)]
    if pad:
        level = np.pad(level, ((0, -rows % pad), (0, -columns % pad), (0, 0)))
    return np.ascontiguousarray(level)


def write(path: Path, images: Sequence[tuple[NDArray[Any], dict[str, Any]]], **options: Any) -> Path:
    """Write images, each with its own options of tifffile."""
    with tifffile.TiffWriter(path, **options) as out:
        for image, own in images:
            usual = {"tile": (64, 64), "photometric": "rgb", "compression": "zlib", "metadata": None}
            out.write(image, **(usual | own))
    return path


def per_cm(um_x: float, um_y: float | None = None) -> dict[str, Any]:
    return {"resolution": (1e4 / um_x, 1e4 / (um_y or um_x)), "resolutionunit": 3}


def pyramid(
    path: Path,
    size_xy: tuple[int, int],
    at_xy: tuple[int, int],
    factors: Sequence[tuple[int, int]],
    rounding: str = "down",
    pad: int | None = None,
    tags: bool = True,
    **options: Any,
) -> Path:
    """Write a slide of 0.5 mpp with a line along each axis."""
    image = lined(size_xy, at_xy)
    levels = [(image, per_cm(0.5))]
    for x, y in factors:
        said = per_cm(0.5 * x, 0.5 * y) if tags else per_cm(0.5)
        levels.append((smaller(image, (x, y), rounding, pad), {"subfiletype": 1, **said}))
    return write(path, levels, **options)


def mosaic(slide: dfx.Slide, resolution: Any, units: Units) -> tuple[NDArray[np.uint8], res.View]:
    """The whole slide put together of its patches."""
    grid = dfx.PatchGrid.over(slide, shape=32, resolution=resolution, units=units, mask=None)
    width, height = grid.view.size_xy
    whole = np.empty((height + 32, width + 32, 3), np.uint8)
    patches = np.asarray(dfx.patches(slide, grid).compute(scheduler="sync"))
    for (x0, y0, x1, y1), patch in zip(grid.coordinates.tolist(), patches, strict=True):
        whole[y0:y1, x0:x1] = patch
    return whole[:height, :width], grid.view


def lines(picture: NDArray[np.uint8]) -> list[float]:
    """Centres of the lines in pixels of a picture, (x, y)."""
    dark = 255.0 - picture.mean(axis=2)
    found = []
    for axis in (0, 1):
        profile = np.clip(np.median(dark, axis=axis) - 75, 0, None)
        found.append(float((profile * (np.arange(len(profile)) + 0.5)).sum() / profile.sum()))
    return found


def philips_xml(spacings_mm: Sequence[float]) -> dict[str, Any]:
    """The description of a Philips slide whose levels have these sizes of a pixel."""
    attribute = '<Attribute Name="{}">{}</Attribute>'.format
    spacings = [f"&quot;{spacing:.9f}&quot; &quot;{spacing:.9f}&quot;" for spacing in spacings_mm]
    parts = "".join(
        f'<DataObject ObjectType="PixelDataRepresentation">{attribute("DICOM_PIXEL_SPACING", spacing)}</DataObject>'
        for spacing in spacings
    )
    scanned = (
        attribute("PIM_DP_IMAGE_TYPE", "WSI")
        + attribute("DICOM_PIXEL_SPACING", spacings[0])
        + attribute("PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE", f"<Array>{parts}</Array>")
    )
    images = attribute(
        "PIM_DP_SCANNED_IMAGES", f'<Array><DataObject ObjectType="DPScannedImage">{scanned}</DataObject></Array>'
    )
    return {"description": f'<?xml version="1.0"?><DataObject ObjectType="DPUfsImport">{images}</DataObject>'}
