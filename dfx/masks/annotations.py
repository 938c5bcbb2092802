"""Masks from polygons: GeoJSON, as QuPath exports annotations, in level-0 pixels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from dfx.errors import CallError
from dfx.masks.placing import Bounds, Origin, origin_of
from dfx.remote import read_bytes, shown, suffix

SIZE = 4096
"""Longer side, in cells, at which polygons are drawn; of a slide that is smaller, its own."""
SHIFT = 4
"""Bits of a cell's fraction that OpenCV draws with."""
FAR = 2**26
"""Cells beyond which a corner is drawn as if it were there: what OpenCV's integers hold."""
SUFFIXES = (".geojson", ".json")

Ring: TypeAlias = NDArray[np.float64]


def is_annotation(mask: object) -> bool:
    """Whether a mask is GeoJSON: a mapping of it, or a path that ends so."""
    return isinstance(mask, Mapping) or (isinstance(mask, str | Path) and suffix(mask) in SUFFIXES)


def draw(
    annotations: str | Path | Mapping[str, Any],
    size_xy: tuple[int, int],
    storage_options: Mapping[str, Any] | None = None,
    *,
    bounds: Bounds | None = None,
    origin: Origin | None = None,
) -> tuple[NDArray[np.bool_], Origin]:
    """Draw the polygons of GeoJSON over a slide of `size_xy` level-0 pixels.

    Takes the GeoJSON itself, or a path or URL of its file. Returns bool (rows, columns), true inside any polygon, and
    the origin of the coordinates (see `origin_of`).

    The GeoJSON is a Polygon, MultiPolygon, GeometryCollection, Feature, FeatureCollection or list of features. Holes
    are left out of their own polygon only. Points and lines, which have no area, and empty geometries (RFC 7946, 3.1)
    add nothing. A cell that an outline passes counts as inside, so that nothing is too thin to be seen. Raises
    `CallError` for other content, and for GeoJSON without any polygon.
    """
    name = "the mask" if isinstance(annotations, Mapping) else f"mask {shown(str(annotations))}"
    given = annotations if isinstance(annotations, Mapping) else read(str(annotations), storage_options)
    found = list(polygons(given, name))
    if not found:
        raise CallError(f"{name} has no polygon: draw areas, or give an image, an array, 'tissue' or None.")
    origin = origin_of([rings[0] for rings in found], bounds, origin, name)
    offset = bounds[:2] if bounds is not None and origin == "bounds" else (0, 0)
    scale = min(1.0, SIZE / max(size_xy))
    columns, rows = (max(1, round(size * scale)) for size in size_xy)
    cells = np.zeros((rows, columns), np.uint8)
    for rings in found:
        # The corner of a slide is that of a cell, whose number OpenCV has at its centre.
        per_cell = (columns, rows) / np.array(size_xy)
        outline, *holes = (np.clip((ring + offset) * per_cell - 0.5, -FAR, FAR) for ring in rings)
        # Each ring is an array of its own: a hole must not reach into another polygon, nor the part that it shares with
        # another hole, or has beyond the outline, be filled.
        place, part = filled(outline, (rows, columns), rim=True)
        for hole in holes:
            inside, taken = filled(hole - (place[1].start, place[0].start), part.shape, rim=False)
            part[inside][taken > 0] = 0
        np.maximum(cells[place], part, out=cells[place])
    return cells > 0, origin


def filled(ring: Ring, shape: tuple[int, ...], *, rim: bool) -> tuple[tuple[slice, slice], NDArray[np.uint8]]:
    """Fill a ring in cells of an array of a shape: where its cells lie, and 1 inside.

    `rim`: whether the cells that the ring passes are inside.
    """
    low = np.clip(np.floor(ring.min(axis=0)).astype(int) - 1, 0, shape[1::-1])
    high = np.clip(np.ceil(ring.max(axis=0)).astype(int) + 2, 0, shape[1::-1])
    (x0, y0), (x1, y1) = low.tolist(), high.tolist()
    part = np.zeros((y1 - y0, x1 - x0), np.uint8)
    if part.size:
        fixed = np.rint((ring - low) * 2**SHIFT).astype(np.int32)
        cv2.fillPoly(part, [fixed], 1, shift=SHIFT)
        if not rim:
            cv2.polylines(part, [fixed], True, 0, shift=SHIFT)
    return (slice(y0, y1), slice(x0, x1)), part


def read(address: str, storage_options: Mapping[str, Any] | None = None) -> Any:
    """Read a file of JSON; raises `CallError`."""
    name = shown(address)
    try:
        data = read_bytes(address, storage_options)
    except (OSError, ValueError) as e:  # ValueError: a null byte
        raise CallError(
            f"mask {name} can't be read ({e}): give GeoJSON, an image, an array, 'tissue' or None."
        ) from None
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as e:
        raise CallError(
            f"mask {name} is no GeoJSON ({type(e).__name__}: {e}): export it from QuPath as GeoJSON."
        ) from e


def polygons(found: Any, name: str, depth: int = 0) -> Iterator[list[Ring]]:
    """Give every polygon as its rings, the outline first, then its holes; raises `CallError`."""
    if depth > 32:
        raise CallError(f"{name} has geometries in geometries in geometries: give a FeatureCollection.")
    parts = found if isinstance(found, list) else [found]
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "FeatureCollection":
            yield from polygons(listed(part, "features", name), name, depth + 1)
        elif kind == "Feature":
            if part.get("geometry") is not None:  # GeoJSON allows a feature without a place
                yield from polygons(part["geometry"], name, depth + 1)
        elif kind == "GeometryCollection":
            # Some writers write null where RFC 7946 has a geometry with an empty list.
            geometries = [geometry for geometry in listed(part, "geometries", name) if geometry is not None]
            yield from polygons(geometries, name, depth + 1)
        elif kind == "Polygon":
            yield from rings_of([part.get("coordinates")], name)
        elif kind == "MultiPolygon":
            yield from rings_of(listed(part, "coordinates", name), name)
        elif kind not in ("Point", "MultiPoint", "LineString", "MultiLineString"):
            raise CallError(
                f"{name} is no GeoJSON: it has {str(kind)[:40]!r} where a type of feature or geometry must be."
            )


def listed(part: Mapping[str, Any], key: str, name: str) -> list[Any]:
    """Give a member that must be a list; raises `CallError`."""
    found = part.get(key)
    if not isinstance(found, list):
        raise CallError(f"{name} is no GeoJSON: a {part['type']} has no list of {key}.")
    return found


def rings_of(found: list[Any], name: str) -> Iterator[list[Ring]]:
    """Check the rings of polygons: float64 (n, 2), in level-0 pixels; polygons and holes without corners are left out.

    Positions may have more than two numbers (height), which have no meaning here, and rings may be open or closed.
    """
    for polygon in found:
        if isinstance(polygon, list) and all(ring == [] for ring in polygon):
            continue
        try:
            outline, *holes = polygon
            corners = [outline, *(hole for hole in holes if hole != [])]
            rings = [np.asarray([point[:2] for point in ring], np.float64) for ring in corners]
            right = all(ring.ndim == 2 and ring.shape[1] == 2 for ring in rings)
            right = right and all(len(ring) >= 3 and np.isfinite(ring).all() for ring in rings)
        except (TypeError, ValueError, KeyError, OverflowError):
            right = False
        if not right:
            raise CallError(f"{name} has an invalid polygon: give rings of 3 or more corners [x, y] in level-0 pixels.")
        yield rings
