"""What vendors write about a slide: microns per pixel, objective power, layout. Pure functions of text."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator

from dfx.errors import SlideError

Mpp = tuple[float, float] | None

PLAUSIBLE_MPP = (0.05, 20.0)
"""Microns per baseline pixel that a slide scanner can mean; 72 dpi would be 352.8."""
PLAUSIBLE_POWER = (0.5, 200.0)
"""Objective powers that a slide can have been scanned with."""
MOST_UNUSUAL = 4.0
"""Factor by which power times microns per pixel may differ from 10: cameras differ, and binning doubles pixels."""
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


def believed_power(power: float | None, mpp: Mpp) -> tuple[float | None, tuple[str, ...]]:
    """Return an objective power that is plausible with `mpp`, else None; and a note if it is not plausible."""
    if power is None:
        return None, ()
    if not PLAUSIBLE_POWER[0] <= power <= PLAUSIBLE_POWER[1]:
        return None, (f"its objective power of {power:g}x is impossible, and is not used",)
    mean = sum(mpp) / 2 if mpp else 10 / power
    if not 1 / MOST_UNUSUAL <= power * mean / 10 <= MOST_UNUSUAL:
        return None, (f"its objective power of {power:g}x contradicts its {mean:g} microns per pixel, and is not used",)
    return power, ()


def positive(value: float | None) -> float | None:
    """Give a value above 0, else None."""
    return value if value is not None and value > 0 else None


def aperio(description: str) -> tuple[Mpp, float | None]:
    """Read `MPP` and `AppMag` from the `|`-separated description of an SVS file's first page."""
    fields = dict(part.split("=", 1) for part in description.split("|")[1:] if "=" in part)
    fields = {key.strip().lower(): value for key, value in fields.items()}
    mpp = number(fields.get("mpp"))
    return plausible(mpp, mpp), positive(number(fields.get("appmag")))


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
        values = _numbers(_attribute(scanned, "DICOM_PIXEL_SPACING"))
        if len(values) >= 2:
            mpp = plausible(values[1] * 1000, values[0] * 1000)
        magnification = re.search(r"levels=(\d+)", _attribute(scanned, "DICOM_DERIVATION_DESCRIPTION") or "")
        if magnification and int(magnification[1]) <= 200:
            power = positive(float(magnification[1]))
    return mpp, power


def philips_pixels(xml: str) -> list[Mpp]:
    """Return the width and height of a pixel of each level of the whole-slide image, finest first, in microns."""
    found: list[Mpp] = []
    for scanned in _philips_images(parse(xml, "Philips XML")):
        for part in named(scanned, "DataObject"):
            if part.get("ObjectType") == "PixelDataRepresentation":
                rows, columns, *_ = [*_numbers(_attribute(part, "DICOM_PIXEL_SPACING")), None, None]
                found.append((columns * 1000, rows * 1000) if rows and columns else None)
    return found


def _numbers(text: str | None) -> list[float]:
    """Return the numbers of a Philips attribute, each in quotes."""
    return [v for v in map(number, re.findall(r"[\d.,eE+-]+", text or "")) if v is not None]


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
