"""Leica SCN slides: areas that were scanned, and where they lie on the glass."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

from dfx.errors import SlideError
from dfx.slides import vendors
from dfx.slides.factors import Image, Pair, downsample_xy
from dfx.slides.level import Level
from dfx.slides.pyramid import make_level, tile_grid

MOST_OFF = 2.0
"""Pixels by which the size of an area may differ from its number of pixels times the size of a pixel."""


@dataclass(frozen=True)
class Area:
    """One scanned area. All pairs are (x, y)."""

    offset_nm: Pair
    """Its corner on the glass."""
    size_nm: Pair
    """Its width and height on the glass."""
    levels: tuple[tuple[int, int, int], ...]
    """(IFD, width, height) of each level, finest first."""
    power: float | None
    """Its objective."""

    @property
    def pixel_nm(self) -> Pair:
        """Width and height of a pixel of its finest level."""
        _, width, height = self.levels[0]
        return self.size_nm[0] / width, self.size_nm[1] / height

    def place(self, pixel_nm: Pair) -> tuple[Pair, Pair]:
        """Return its corners on the glass, in pixels."""
        (x, y), (width, height), (w, h) = self.offset_nm, self.size_nm, pixel_nm
        return (x / w, y / h), ((x + width) / w, (y + height) / h)

    def by_downsample(self) -> dict[Pair, tuple[int, int, int]]:
        """Return its levels by their factors to its finest level."""
        whole = Image(self.levels[0][1:])
        found: dict[Pair, tuple[int, int, int]] = {(1.0, 1.0): self.levels[0]}
        for level in self.levels[1:]:
            factors = downsample_xy(whole, Image(level[1:]))
            if factors is not None:
                found.setdefault(factors, level)
        return found


def read_areas(xml: str) -> tuple[Pair, list[Area], tuple[str, ...]]:
    """Return the size of the glass in nm, the areas of the strongest objective, and notes.

    An image of the whole glass is left out, unless it is the only image.
    """
    root = vendors.parse(xml, "Leica SCN XML")
    collection = vendors.first(root, "collection")
    if collection is None:
        raise SlideError("the Leica SCN XML has no collection")
    glass = float(collection.get("sizeX", 0)), float(collection.get("sizeY", 0))
    areas = []
    for image in vendors.named(collection, "image"):
        pixels, view = vendors.first(image, "pixels"), vendors.first(image, "view")
        if pixels is None or view is None:
            continue
        source = vendors.first(image, "illuminationSource")
        if source is not None and (source.text or "").strip().lower() != "brightfield":
            raise SlideError("the Leica SCN slide is not bright field: its channels are not a picture")
        planes: dict[int, dict[int, tuple[int, int, int]]] = {}
        for d in vendors.named(pixels, "dimension"):
            size = int(d.get("ifd", 0)), int(d.get("sizeX", 0)), int(d.get("sizeY", 0))
            planes.setdefault(int(d.get("r", 0)), {})[int(d.get("z", 0))] = size
        levels = [planes[r][sorted(planes[r])[len(planes[r]) // 2]] for r in sorted(planes)]
        objective = vendors.first(image, "objective")
        areas.append(
            Area(
                offset_nm=(float(view.get("offsetX", 0)), float(view.get("offsetY", 0))),
                size_nm=(float(view.get("sizeX", 0)), float(view.get("sizeY", 0))),
                levels=tuple(sorted(levels, key=lambda level: -level[1])),
                power=vendors.positive(vendors.number(objective.text if objective is not None else None)),
            )
        )
    if not areas:
        raise SlideError("the Leica SCN XML has no image")
    if min(*glass, *(value for area in areas for value in area.size_nm)) <= 0 or not all(a.levels for a in areas):
        raise SlideError("the Leica SCN XML has an area, or a glass, without a size: the file is damaged")
    scanned = [area for area in areas if (area.offset_nm, area.size_nm) != ((0.0, 0.0), glass)] or areas
    strongest = max(area.power or 0 for area in scanned)
    chosen = [area for area in scanned if (area.power or 0) == strongest]
    others = len(scanned) - len(chosen)
    return glass, chosen, (f"{others} areas of weaker objectives are left out",) if others else ()


def leica_levels(tif: Any, glass_nm: Pair, areas: list[Area]) -> tuple[list[Level], Pair, tuple[str, ...]]:
    """Place areas on the glass as OpenSlide does; return the levels, the size of a pixel in nm, and notes.

    Raises `SlideError` where the pixels of areas differ in size, since they have no common baseline.
    """
    w, h = nm = max(areas, key=lambda area: area.levels[0][1]).pixel_nm
    for area in areas:
        off = (abs(size / step - n) for size, step, n in zip(area.size_nm, nm, area.levels[0][1:], strict=True))
        if max(off) > MOST_OFF:
            a, b = area.pixel_nm
            raise SlideError(
                f"it has areas of different resolution, pixels of {w:g} x {h:g} nm and of {a:g} x {b:g} nm "
                "by its XML, so they have no common baseline: export each area as a slide of its own"
            )
    whole = round(glass_nm[1] / h), round(glass_nm[0] / w)
    notes = placed_notes(areas, nm, whole)
    found = [area.by_downsample() for area in areas]
    common = [factors for factors in found[0] if all(factors in levels for levels in found)]
    if left_out := max(len(area.levels) for area in areas) - len(common):
        notes += (f"{left_out} levels that not all areas have are left out",)
    levels = []
    for x, y in common:
        shape = max(1, round(glass_nm[1] / (h * y))), max(1, round(glass_nm[0] / (w * x)))
        parts = []
        for area, by_downsample in zip(areas, found, strict=True):
            ifd, width, height = by_downsample[x, y]
            page = tif.pages[ifd]
            if (page.imagewidth, page.imagelength) != (width, height):
                raise SlideError(f"IFD {ifd} has other dimensions than its XML says: the file is damaged")
            origin = round(area.offset_nm[1] / (h * y)), round(area.offset_nm[0] / (w * x))
            rows, columns = min(height, shape[0] - origin[0]), min(width, shape[1] - origin[1])
            if min(rows, columns) > 0:  # else less than a pixel of it lies on the glass
                parts.append(tile_grid([page], page, (rows, columns), origin))
        if parts:
            levels.append(make_level(shape, whole, page, 1, tuple(parts), (x, y)))
    return levels, nm, notes


def placed_notes(areas: list[Area], pixel_nm: Pair, whole_yx: tuple[int, int]) -> tuple[str, ...]:
    """Describe how areas lie on the glass; raises `SlideError` if an area does not lie there at all."""
    notes = [f"{len(areas)} areas on the glass; between them is white"] if len(areas) > 1 else []
    places = [area.place(pixel_nm) for area in areas]
    for (x0, y0), (x1, y1) in places:
        if x1 < 1 or y1 < 1 or x0 > whole_yx[1] - 1 or y0 > whole_yx[0] - 1:
            raise SlideError("it has an area that lies outside of the glass by its XML: the file is damaged")
    if any(min(*start) < -1 or x1 > whole_yx[1] + 1 or y1 > whole_yx[0] + 1 for start, (x1, y1) in places):
        notes.append("an area reaches beyond the glass and is cut there")
    for ((ax0, ay0), (ax1, ay1)), ((bx0, by0), (bx1, by1)) in combinations(places, 2):
        if min(ax1, bx1) - max(ax0, bx0) > 1 and min(ay1, by1) - max(ay0, by0) > 1:
            notes.append("areas overlap, and the later one is on top")
            break
    return tuple(notes)
