"""OME-TIFF: which image and which planes a file holds, as its OME-XML says. The planes of other files are never read.

tifffile's series follow file names from the XML, relative to the working directory where a file has no path, and
mix the pages of several files. Here only the pages of the opened file count.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from dfx.errors import SlideError
from dfx.slides import vendors
from dfx.slides.level import Level
from dfx.slides.pyramid import build_levels, pyramid

Plane = tuple[int, int, int]
"""(z, channel, t), counted from 0."""
Found = tuple[vendors.Mpp, float | None, list[Level], tuple[str, ...]]
"""Microns per pixel, objective power, levels and notes."""


@dataclass(eq=False)
class Image:
    """One image of OME-XML, and where its planes lie."""

    element: ET.Element
    pixels: ET.Element
    here: dict[Plane, int] = field(default_factory=dict)
    """The planes of the opened file: their IFD."""
    elsewhere: set[str] = field(default_factory=set)
    """Names of other files that planes lie in."""
    samples: int = 1
    """Samples per pixel of its pages; OME-XML counts them as channels."""

    @property
    def channels(self) -> int:
        """Pages that make up one focal plane."""
        return max(1, self.size("C") // self.samples)

    @property
    def first(self) -> int:
        """The first IFD of its planes in the opened file."""
        return min(self.here.values())

    @property
    def size_xy(self) -> tuple[int, int]:
        """Columns and rows of pixels."""
        return self.size("X"), self.size("Y")

    def size(self, axis: str) -> int:
        """Give the length of an axis; raises `SlideError`."""
        value = vendors.number(self.pixels.get(f"Size{axis}", "1"))
        if value is None or value < 1:
            raise SlideError(f"its OME-XML has no valid Size{axis}: export it again")
        return int(value)


def ome(tif: Any, xml: str, url: str) -> Found:
    """Read an OME-TIFF: the largest image that has pixels in this file. Raises `SlideError`."""
    root = vendors.parse(xml, "OME-XML")
    if (other := next(children(root, "BinaryOnly"), None)) is not None:
        levels, notes = pyramid(tif)
        return None, None, levels, (*notes, f"its OME-XML lies in another file, {other.get('MetadataFile')}: not read")
    images = [Image(image, pixels) for image in children(root, "Image") for pixels in children(image, "Pixels")]
    blocks = [block for image in images for block in children(image.pixels, "TiffData")]
    own = own_file(root, blocks, url)
    for image in images:
        place(image, tif, own)
    with_pixels = [image for image in images if image.here]
    if not with_pixels and any(image.elsewhere for image in images):
        raise elsewhere(images, "all its planes lie in other files")
    if not with_pixels:
        return unlinked(tif, root, images, linked=bool(blocks))
    image, claimants, notes = slide_image(with_pixels, tif)
    mpp, power, unsure = agreed(root, claimants)
    levels, more = planes(image, tif)
    return mpp, power, levels, (*notes, *unsure, *more)


def children(element: ET.Element, *names: str) -> Iterator[ET.Element]:
    """Give the direct children of these local names; annotations may hold others of the same name."""
    return (e for e in element if isinstance(e.tag, str) and e.tag.rpartition("}")[2] in names)


# Which planes lie in this file


def reference(block: ET.Element) -> tuple[str, str] | None:
    """Give the UUID and the name of the file to which a `TiffData` refers; None: this file."""
    uuid = next(children(block, "UUID"), None)
    return None if uuid is None else ((uuid.text or "").strip(), uuid.get("FileName", ""))


def own_file(root: ET.Element, blocks: Iterable[ET.Element], url: str) -> set[tuple[str, str] | None]:
    """Give the references that mean the opened file: by its UUID, else by its name; by both if several match."""
    files = {file for block in blocks if (file := reference(block)) is not None}
    names = {Path(name).name.lower() for name in (url, url.partition("?")[0], unquote(url.partition("?")[0]))}
    named = {file for file in files if Path(file[1]).name.lower() in names}
    uuid = root.get("UUID")
    own = {file for file in files if uuid and file[0] == uuid} or named
    if len(own) > 1:
        own &= named
    if not own and len(files) == 1 and not uuid:
        own = files  # all planes lie in one file, and this file holds the XML: it was renamed
    return {None, *own}


def place(image: Image, tif: Any, own: set[tuple[str, str] | None]) -> None:
    """Find the IFD of each plane, by the rules of OME-TIFF; raises `SlideError`."""
    blocks = [(block, reference(block), whole(block, "IFD", 0)) for block in children(image.pixels, "TiffData")]
    image.elsewhere = {file[1] or file[0] for _, file, _ in blocks if file is not None and file not in own}
    mine = [(block, ifd) for block, file, ifd in blocks if file in own and ifd < len(tif.pages)]
    if not mine:
        return
    image.samples = tif.pages[mine[0][1]].samplesperpixel
    order = image.pixels.get("DimensionOrder", "XYZCT")[2:]
    if sorted(order) != ["C", "T", "Z"]:
        raise SlideError(f"its OME-XML has a DimensionOrder that ends with {order!r}: export it again")
    sizes = [image.channels if axis == "C" else image.size(axis) for axis in order]
    for block, first in mine:
        start = [whole(block, f"First{axis}", 0) for axis in order]
        if any(at >= size for at, size in zip(start, sizes, strict=True)):
            continue  # not of this image: ImageJ leaves such blocks after cropping, others count samples as planes
        count = whole(block, "PlaneCount", whole(block, "NumPlanes", 1 if "IFD" in block.attrib else len(tif.pages)))
        number = start[0] + sizes[0] * (start[1] + sizes[1] * start[2])
        count = min(count, len(tif.pages) - first, math.prod(sizes) - number)
        for n in range(count):
            rest, a = divmod(number + n, sizes[0])
            c, b = divmod(rest, sizes[1])
            at = dict(zip(order, (a, b, c), strict=True))
            image.here[at["Z"], at["C"], at["T"]] = first + n
    if len(set(image.here.values())) < len(image.here):
        raise SlideError("its OME-XML puts several planes of an image into one IFD: export it again")


def whole(block: ET.Element, name: str, default: int) -> int:
    """Read an attribute that is a whole number, 0 or more; raises `SlideError`."""
    text = block.get(name)
    if text is None:
        return default
    if not text.strip().isdecimal():
        raise SlideError(f"its OME-XML has a TiffData with {name}={text!r}: export it again")
    return int(text)


# Which image is the slide


def slide_image(images: list[Image], tif: Any) -> tuple[Image, list[Image], tuple[str, ...]]:
    """Choose the image of the largest page. Returns it, the images that describe it, and notes; raises `SlideError`."""
    sizes = {image: (page.imagewidth, page.imagelength) for image in images for page in [tif.pages[image.first]]}
    width, height = max(sizes.values(), key=math.prod)
    candidates = [image for image in images if sizes[image] == (width, height)]
    described = [image for image in candidates if image.size_xy == (width, height)]
    lost = [image.size_xy for image in images if math.prod(image.size_xy) > width * height]
    if described and lost:
        raise SlideError(
            f"its OME-XML describes an image of {lost[0][0]} x {lost[0][1]} pixels, but the page that it names "
            f"has another size: the largest page has {width} x {height} pixels. Export it again"
        )
    chosen = (described or candidates)[0]
    if any(image.here != chosen.here for image in described or candidates):
        raise SlideError(
            f"its OME-XML has several images of {width} x {height} pixels, "
            "and nothing says which is the slide: save the wanted image as a file of its own"
        )
    if described:
        return chosen, described, ()
    return chosen, [], (f"its OME-XML describes no image of {width} x {height} pixels: no resolution is known",)


def unlinked(tif: Any, root: ET.Element, images: list[Image], *, linked: bool) -> Found:
    """Read a file whose OME-XML links no image to its pages: by the images' size alone."""
    levels, notes = pyramid(tif)
    fitting = [image for image in images if image.size_xy == levels[0].dimensions and not linked]
    fitting = [image for image in fitting if not any(children(image.pixels, "MetadataOnly", "BinData"))]
    mpp, power, unsure = agreed(root, fitting)
    if not fitting:
        unsure = ("its OME-XML links no image to its pages: no resolution is known",)
    return mpp, power, levels, (*notes, *unsure)


def agreed(root: ET.Element, images: list[Image]) -> tuple[vendors.Mpp, float | None, tuple[str, ...]]:
    """Give the resolution and objective that are the same in all given images, and notes on those that are not."""
    mpps = {resolution(image) for image in images}
    powers = {power for image in images for power in objectives(root, image)}
    notes: tuple[str, ...] = ()
    if len(mpps) > 1:
        notes += (
            f"{len(images)} images of its OME-XML give this image several resolutions: the resolution is unknown",
        )
    if len(powers) > 1:
        notes += ("its OME-XML has several objectives for this image: the power is unknown",)
    return mpps.pop() if len(mpps) == 1 else None, powers.pop() if len(powers) == 1 else None, notes


def resolution(image: Image) -> vendors.Mpp:
    """Give an image's microns per pixel, (x, y)."""
    sizes: list[float | None] = []
    for axis in "XY":
        size = vendors.number(image.pixels.get(f"PhysicalSize{axis}"))
        microns = vendors.MICRONS.get(image.pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        sizes.append(size * microns if size is not None and microns is not None else None)
    return vendors.plausible(*sizes)


def objectives(root: ET.Element, image: Image) -> set[float | None]:
    """Give the powers that an image's objective may have: an ID can occur in several instruments."""
    settings = next(children(image.element, "ObjectiveSettings", "ObjectiveRef"), None)
    if settings is None:
        return {None}
    instrument = next(children(image.element, "InstrumentRef"), None)
    instruments = list(children(root, "Instrument"))
    own = [one for one in instruments if instrument is not None and one.get("ID") == instrument.get("ID")]
    for group in (own, instruments):
        named = [
            found for one in group for found in children(one, "Objective") if found.get("ID") == settings.get("ID")
        ]
        if named:
            return {
                vendors.positive(
                    vendors.number(found.get("NominalMagnification"))
                    or vendors.number(found.get("CalibratedMagnification"))
                )
                for found in named
            }
    return {None}


# Which planes of the image are read


def planes(image: Image, tif: Any) -> tuple[list[Level], tuple[str, ...]]:
    """Give an image's levels, a page per channel, at the middle of its focal planes; raises `SlideError`."""
    channels = range(image.channels)
    complete = sorted({(z, t) for z, _, t in image.here if all((z, c, t) in image.here for c in channels)})
    if not complete and image.elsewhere:
        raise elsewhere([image], f"some of the {len(channels)} channels of each plane lie in other files")
    if not complete:
        raise SlideError(f"it lacks some of the {len(channels)} channels that its OME-XML lists: export it again")
    times = sorted({t for _, t in complete})
    if len(times) > 1:
        raise SlideError(f"it has {len(times)} images along axis T: save the wanted image as a file of its own")
    depth, depths = image.size("Z"), [z for z, _ in complete]
    z, t = min(depths, key=lambda z: abs(z - depth // 2)), times[0]
    notes: tuple[str, ...] = ()
    if len(depths) == depth > 1:
        notes = (f"{depth} focal planes; the middle one is read",)
    elif depth > 1:
        notes = (f"focal plane {z + 1} of {depth} is read; this file has {len(depths)} of them",)
    if image.size("T") > 1:
        notes += (f"time {t + 1} of {image.size('T')} is read; this file has no other",)
    if image.elsewhere:
        notes += (f"its other planes lie in other files ({listed(image.elsewhere)}), which are not read",)
    pages = [tif.pages[image.here[z, c, t]] for c in channels]
    reduced = [list(page.pages or ()) for page in pages]
    if len({len(sub) for sub in reduced}) > 1:
        raise SlideError("its channels have different numbers of levels: export it again")
    stacks = [pages, *(list(stack) for stack in zip(*reduced, strict=True))]
    if any(page.hash != stack[0].hash for stack in stacks for page in stack):
        raise SlideError("its channels are stored in different ways: export it again")
    levels, doubts = build_levels([((stack[0].imagelength, stack[0].imagewidth), stack, stack[0]) for stack in stacks])
    return levels, notes + doubts


def listed(names: Iterable[str]) -> str:
    """Give a few names."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def elsewhere(images: Iterable[Image], fact: str) -> SlideError:
    """Return the error for planes that lie in other files."""
    names = {name for image in images for name in image.elsewhere}
    return SlideError(
        f"{fact} ({listed(names)}), and dfx reads one file per slide: save the wanted planes as one OME-TIFF"
    )
