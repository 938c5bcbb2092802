"""Slides of the TIFF family: the header by tifffile once, then only byte ranges and decoders.

`TiffFile`, pages and their file handle are neither picklable nor thread-safe, so none of them
survives `open_tiff`. What is kept per tile grid is where its tiles lie and how one is decoded.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from dfx.errors import DfxError, FormatError, SlideError, UnknownFormatError
from dfx.slides import vendors
from dfx.slides.downsampled import fill_from_finer
from dfx.slides.identity import identity
from dfx.slides.leica import leica_levels, read_areas
from dfx.slides.level import Level, StoredTiles
from dfx.slides.ndpi import FILE_FORMAT, SOURCE_LENS, has_long_pointers, ndpi_levels
from dfx.slides.ome import ome
from dfx.slides.pyramid import baseline, number_tag, pixel_um, pyramid, series_levels
from dfx.slides.slide import Slide
from dfx.slides.source import ByteSource, open_source

BY_OPENSLIDE = (
    "pip install dfx[openslide], here and on the workers, and it is read through OpenSlide; "
    "or convert it to SVS, OME-TIFF or pyramidal TIFF"
)
OPENSLIDES = {
    b"[Virtual Microscope Specimen]": "a Hamamatsu VMS slide",
    b"[Uncompressed Virtual Microscope Specimen]": "a Hamamatsu VMU slide",
    b"SQLite format 3\0": "an SQLite file, as Sakura's slides are",
    b"ZISRAWFILE": "a Zeiss CZI file",
}
"""How files begin that are no TIFF, and that OpenSlide reads."""


@dataclass(frozen=True)
class Facts:
    """What a vendor's parser finds."""

    vendor: str
    mpp: vendors.Mpp
    power: float | None
    levels: list[Level]
    notes: tuple[str, ...] = ()


def open_tiff(
    url: str,
    *,
    mpp: tuple[float, float] | None = None,
    power: float | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Slide:
    """Open a slide; `mpp` and `power` go before what the file says.

    Raises `FormatError` for a kind of file that OpenSlide reads or that dfx does not know, `SlideError` for any other
    file that can't be read.
    """
    source = open_source(url, storage_options)
    refuse_other_formats(source)
    try:
        long_ndpi = has_long_pointers(source)
        check_chain(source, long_ndpi=long_ndpi)
        flags = {"is_ndpi": long_ndpi or None}  # None: the tags say whether it is NDPI, not the name
        with source.open() as file, tifffile.TiffFile(file, name=Path(source.url).name, **flags) as tif:
            facts = parse(tif, source)
    except DfxError as e:
        message = str(e)
        kind = type(e) if isinstance(e, FormatError) else SlideError
        raise kind(message if source.url in message else f"{source.url} can't be read: {message}.") from e
    except RecursionError as e:
        raise SlideError(f"{source.url} can't be read: its directories nest without end; copy it again.") from e
    except Exception as e:  # tifffile raises IndexError, TypeError, ZeroDivisionError, struct.error and more
        raise SlideError(
            f"{source.url} can't be read as a slide ({type(e).__name__}: {e}): the file is damaged or of an "
            "unknown kind; copy or export it again."
        ) from e
    for n, level in enumerate(facts.levels):
        check_extent(source, n, level)
    own_mpp = mpp or facts.mpp
    believed, doubts = vendors.believed_power(facts.power, own_mpp)
    return Slide(
        url=source.url,
        vendor=facts.vendor,
        mpp=own_mpp,
        power=power or believed,
        levels=tuple(facts.levels),
        notes=facts.notes + (() if power else doubts),
        identity=identity(source, facts.levels),
        source=source,
        overrides=(mpp, power),
        storage_options=storage_options,
        bounds=scanned(facts.levels[0]) if facts.vendor == "leica" else None,
        reopen=open_tiff,
    )


def scanned(level: Level) -> tuple[int, int, int, int]:
    """Give the rectangle (x, y, width, height) around the parts of a level."""
    starts = np.array([part.origin_yx for part in level.parts])
    stops = starts + [part.shape_yx for part in level.parts]
    y, x = np.clip(starts.min(axis=0), 0, level.shape_yx).tolist()
    bottom, right = np.clip(stops.max(axis=0), 0, level.shape_yx).tolist()
    return x, y, right - x, bottom - y


def refuse_other_formats(source: ByteSource) -> None:
    """Name the kind of a file that is no TIFF.

    Raises `FormatError` for kinds that OpenSlide reads, `UnknownFormatError` for others, and `SlideError` for files
    that no reader reads.
    """
    head = source.read([(0, min(source.size, 132))])[0]
    if source.size >= 8 and head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return
    foreign = next((name for magic, name in OPENSLIDES.items() if head.startswith(magic)), None)
    foreign = "a DICOM file" if head[128:132] == b"DICM" else foreign
    foreign = "a MIRAX slide" if source.url.lower().endswith(".mrxs") else foreign  # it holds a JPEG image, or nothing
    if foreign:
        raise FormatError(f"{source.url} is {foreign}: {BY_OPENSLIDE}.")
    if source.size < 8:
        raise SlideError(f"{source.url} has {source.size} bytes, so it is no slide: copy it again.")
    kinds = {b"\x89PNG": "a PNG image", b"\xff\xd8\xff": "a JPEG image", b"PK\x03\x04": "a ZIP archive"}
    if head.lstrip(b"\xef\xbb\xbf").startswith(b"<?xml") and source.url.lower().endswith(".ome"):
        raise SlideError(f"{source.url} is the OME-XML of an OME-TIFF of several files: give the OME-TIFF.")
    kind = next((name for magic, name in kinds.items() if head.startswith(magic)), "no TIFF file")
    raise UnknownFormatError(
        f"{source.url} is {kind}: dfx reads slides of the TIFF family (SVS, NDPI, SCN, OME-TIFF, Philips, QPTIFF, "
        "pyramidal TIFF), and local files that OpenSlide recognises where dfx[openslide] is installed; "
        "convert it to one of them."
    )


def check_chain(source: ByteSource, *, long_ndpi: bool) -> None:
    """Walk the chain of image directories; a loop or an end outside the file is an error.

    tifffile would follow a loop for ever, and quietly lose the levels behind a cut chain. `long_ndpi`: pointers to
    directories have 64 bits in a classic TIFF.
    """
    head = source.read([(0, 8)])[0]
    order = "<" if head[:2] == b"II" else ">"
    big = struct.unpack(order + "H", head[2:4])[0] == 43
    first, counter, entry, pointer = (8, "Q", 20, "Q") if big else (4, "H", 12, "Q" if long_ndpi else "I")

    def value(offset: int, code: str) -> int:
        size = struct.calcsize(code)
        if offset + size > source.size:
            raise SlideError(
                f"its directories go on at byte {offset} but the file has {source.size} bytes: "
                "it is truncated; copy it again"
            )
        return int(struct.unpack(order + code, source.read([(offset, size)])[0])[0])

    seen: set[int] = set()
    offset = value(first, pointer)
    if offset == 0:
        raise SlideError("it has no image directory: it is damaged; copy it again")
    while offset:
        if offset in seen:
            raise SlideError(f"its directories form a loop at byte {offset}: it is damaged; copy it again")
        seen.add(offset)
        entries = value(offset, counter)
        offset = value(offset + struct.calcsize(counter) + entries * entry, pointer)


def check_extent(source: ByteSource, n: int, level: Level) -> None:
    """Refuse a level of which more than one tile in a thousand (and more than one) is not in the file.

    Single bad entries are left to the tile's own error, which names it.
    """
    for part in level.parts:
        if not isinstance(part, StoredTiles):
            continue
        outside = int((part.offsets + part.counts > source.size).sum())
        if outside > max(1, part.offsets.size // 1000):
            raise SlideError(
                f"{source.url} is truncated: {outside} of {part.offsets.size} tiles of level {n} lie past its end "
                f"at byte {source.size}; copy it again."
            )


def parse(tif: tifffile.TiffFile, source: ByteSource) -> Facts:
    """Find levels and metadata by the vendor that tifffile recognises."""
    page = tif.pages[0]
    description = page.description
    software = str(page.tags.valueof(305, "") or "")
    if FILE_FORMAT in page.tags:
        levels, notes, base = ndpi_levels(tif, source)
        power = vendors.positive(number_tag(base, SOURCE_LENS))
        return Facts("hamamatsu", resolution_mpp(base), power, levels, notes)
    if tif.is_scn:
        return leica(tif)
    if tif.is_philips:
        return philips(tif, description)
    if tif.is_bif:
        raise FormatError(f"it is a Ventana BIF, whose tiles overlap and would be misplaced: {BY_OPENSLIDE}")
    if tif.is_ome:
        return Facts("ome", *ome(tif, tif.ome_metadata or "", source.url))
    if tif.is_qpi:
        levels, notes = series_levels(tif.series[0])
        return Facts("perkinelmer", resolution_mpp(page), vendors.perkinelmer(description), levels, notes)
    base = baseline(tif.pages)
    if base.is_svs:
        levels, notes = pyramid(tif, marked=True, depth_from_pages=True)
        levels, filled = fill_from_finer(levels)
        return Facts("aperio", *vendors.aperio(base.description), levels, notes + filled)
    overlaps = vendors.trestle_overlaps(description)
    if software.startswith("MedScan") or overlaps:
        if overlaps is None or any(overlaps):
            raise FormatError(
                f"it is a Trestle slide whose tiles overlap by {overlaps or 'an unknown number of'} pixels "
                f"and would be misplaced: {BY_OPENSLIDE}"
            )
        mpp = vendors.plausible(number_tag(page, 282), number_tag(page, 283))  # the unit is to be ignored
        return Facts("trestle", mpp, None, *pyramid(tif, marked=True, pixel_of=lambda page: None))
    return Facts("generic-tiff", resolution_mpp(base), None, *pyramid(tif))


def resolution_mpp(page: Any) -> vendors.Mpp:
    """Microns per pixel from the TIFF resolution tags, where they can be meant."""
    return vendors.plausible(*(pixel_um(page) or (None, None)))


def leica(tif: tifffile.TiffFile) -> Facts:
    """Read a Leica slide: the areas of its strongest objective; the macro image is left out."""
    glass, areas, left_out = read_areas(tif.pages[0].description)
    levels, (w, h), notes = leica_levels(tif, glass, areas)
    return Facts("leica", vendors.plausible(w / 1000, h / 1000), areas[0].power, levels, notes + left_out)


def philips(tif: tifffile.TiffFile, description: str) -> Facts:
    """Read a Philips slide. Its XML gives the pixel size of each level, since the levels are padded to tiles."""
    tiled = [page for page in tif.pages if page.is_tiled]
    sizes = vendors.philips_pixels(description)
    by_page = dict(zip((page.offset for page in tiled), sizes, strict=True)) if len(sizes) == len(tiled) else {}
    levels, notes = pyramid(tif, marked=True, pixel_of=lambda page: by_page.get(page.offset))
    return Facts("philips", *vendors.philips(description), levels, notes)
