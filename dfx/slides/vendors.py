"""What vendors write about a slide: microns per pixel, objective power, layout. Pure functions of text."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass

from dfx.errors import SlideError

Mpp = tuple[float, float] | None

PLAUSIBLE_MPP = (0.05, 20.0)
"""Microns per baseline pixel that a slide scanner can mean; 72 dpi would be 352.8."""
MICRONS = {"m": 1e6, "dm": 1e5, "cm": 1e4, "mm": 1e3, "µm": 1.0, "μm": 1.0, "um": 1.0}
MICRONS |= {"nm": 1e-3, "Å": 1e-4, "pm": 1e-6, "in": 25400.0, "thou": 25.4}


def plausible(x: float | None, y: float | None) -> Mpp:
    """Give (x, y) where both can be a slide's microns per pixel, else None."""
    if x is None or y is None or not all(PLAUSIBLE_MPP[0] <= v <= PLAUSIBLE_MPP[1] for v in (x, y)):
        return None
    return x, y


def number(text: str | None) -> float | None:
    """Read a number, also one with a decimal comma."""
    try:
        return float((text or "").strip().replace(",", "."))
    except ValueError:
        return None


def positive(value: float | None) -> float | None:
    """Give a value above 0, else None."""
    return value if value is not None and value > 0 else None


def aperio(description: str) -> tuple[Mpp, float | None]:
    """Read `MPP` and `AppMag` from the `|`-separated description of an SVS file's first page."""
    fields = dict(part.split("=", 1) for part in description.split("|")[1:] if "=" in part)
    fields = {key.strip().lower(): value for key, value in fields.items()}
    mpp = number(fields.get("mpp"))
    return plausible(mpp, mpp), positive(number(fields.get("appmag")))


def tiff_resolution(x: float | None, y: float | None, unit: int | None) -> Mpp:
    """Microns per pixel from pixels per inch (unit 2) or centimetre (unit 3)."""
    microns = {2: 25400.0, 3: 10000.0}.get(unit or 0)
    if microns is None or not x or not y:
        return None
    return plausible(microns / x, microns / y)


def parse(xml: str, what: str) -> ET.Element:
    """Parse a vendor's XML; raises `SlideError`."""
    try:
        return ET.fromstring(xml.strip().strip("\0"))
    except (ET.ParseError, ValueError) as e:
        raise SlideError(f"the {what} can't be parsed ({e})") from e


def named(root: ET.Element, name: str) -> Iterator[ET.Element]:
    """Walk the elements of a local name, whatever the name space."""
    return (e for e in root.iter() if isinstance(e.tag, str) and e.tag.rpartition("}")[2] == name)


def first(root: ET.Element, name: str) -> ET.Element | None:
    """Give the first element of a local name."""
    return next(named(root, name), None)


def philips(xml: str) -> tuple[Mpp, float | None]:
    """Read pixel spacing (mm, "row" "column") and magnification of the whole-slide image."""
    root = parse(xml, "Philips XML")
    mpp, power = None, None
    for scanned in _philips_images(root):
        spacing = _attribute(scanned, "DICOM_PIXEL_SPACING")
        values = [number(v) for v in re.findall(r"[\d.,eE+-]+", spacing or "")]
        if len(values) >= 2 and values[0] is not None and values[1] is not None:
            mpp = plausible(values[1] * 1000, values[0] * 1000)
        magnification = re.search(r"levels=(\d+)", _attribute(scanned, "DICOM_DERIVATION_DESCRIPTION") or "")
        if magnification and int(magnification[1]) <= 200:
            power = positive(float(magnification[1]))
    return mpp, power


def _philips_images(root: ET.Element) -> Iterator[ET.Element]:
    for scanned in named(root, "DataObject"):
        if (_attribute(scanned, "PIM_DP_IMAGE_TYPE") or "").strip() == "WSI":
            yield scanned


def _attribute(element: ET.Element, name: str) -> str | None:
    """Give a Philips attribute that belongs to this object itself or, failing that, lies deeper."""
    for attribute in element.findall("Attribute"):
        if attribute.get("Name") == name:
            return "".join(attribute.itertext())
    return None


def perkinelmer(xml: str) -> float | None:
    """Read the objective of a QPTIFF page's description."""
    root = parse(xml, "PerkinElmer XML")
    for name in ("Objective", "Magnification"):
        element = first(root, name)
        if element is not None and (found := re.search(r"[\d.]+", element.text or "")):
            return positive(number(found[0]))
    return None


def trestle_overlaps(description: str) -> list[int] | None:
    """Read `OverlapsXY` of a Trestle description: x and y of each level."""
    found = re.search(r"OverlapsXY\s*=\s*([\d\s]+)", description)
    return [int(v) for v in found[1].split()] if found else None


@dataclass(frozen=True)
class LeicaArea:
    """One scanned area of a Leica SCN slide."""

    offset_nm: tuple[float, float]
    """(x, y) of its corner on the glass."""
    size_nm: tuple[float, float]
    """(width, height) on the glass."""
    levels: tuple[tuple[int, int, int], ...]
    """(IFD, width, height) of each level, finest first."""
    power: float | None
    """Its objective."""


def leica(xml: str) -> tuple[tuple[float, float], list[LeicaArea]]:
    """Read the glass's size in nm and the areas of the strongest objective."""
    root = parse(xml, "Leica SCN XML")
    collection = first(root, "collection")
    if collection is None:
        raise SlideError("the Leica SCN XML has no collection")
    glass = float(collection.get("sizeX", 0)), float(collection.get("sizeY", 0))
    areas = []
    for image in named(collection, "image"):
        pixels, view = first(image, "pixels"), first(image, "view")
        if pixels is None or view is None:
            continue
        source = first(image, "illuminationSource")
        if source is not None and (source.text or "").strip().lower() != "brightfield":
            raise SlideError("the Leica SCN slide is not bright field: its channels are not a picture")
        planes: dict[int, dict[int, tuple[int, int, int]]] = {}
        for d in named(pixels, "dimension"):
            size = int(d.get("ifd", 0)), int(d.get("sizeX", 0)), int(d.get("sizeY", 0))
            planes.setdefault(int(d.get("r", 0)), {})[int(d.get("z", 0))] = size
        levels = [planes[r][sorted(planes[r])[len(planes[r]) // 2]] for r in sorted(planes)]
        objective = first(image, "objective")
        areas.append(
            LeicaArea(
                offset_nm=(float(view.get("offsetX", 0)), float(view.get("offsetY", 0))),
                size_nm=(float(view.get("sizeX", 0)), float(view.get("sizeY", 0))),
                levels=tuple(sorted(levels, key=lambda level: -level[1])),
                power=positive(number(objective.text if objective is not None else None)),
            )
        )
    if not areas:
        raise SlideError("the Leica SCN XML has no image")
    strongest = max(area.power or 0 for area in areas)
    return glass, [area for area in areas if (area.power or 0) == strongest]
