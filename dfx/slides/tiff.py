"""Slides of the TIFF family: the header by tifffile once, then only byte ranges and decoders.

`TiffFile`, pages and their file handle are neither picklable nor thread-safe, so none of them
survives `open_tiff`. What is kept per tile grid is where its tiles lie and how one is decoded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray

from dfx.errors import DfxError, SlideError
from dfx.slides import vendors
from dfx.slides.slide import Colour, Decode, Level, Slide, TileGrid
from dfx.slides.source import ByteSource, identity, open_source

JPEG, JPEG2000, JPEGXR = (6, 7), (33003, 33004, 33005, 34712), (22610, 34934)
CODECS = {1: "none", 5: "LZW", 7: "JPEG", 8: "deflate", 32946: "deflate", 33003: "JPEG 2000 (YCbCr)"}
CODECS |= {33005: "JPEG 2000", 34712: "JPEG 2000", 50000: "zstd", 50001: "WebP", 50002: "JPEG XL", 34934: "JPEG XR"}
MOST_TILE_BYTES = 2**28
"""A larger tile or strip is refused: it would have to be decoded whole for each patch."""
YCC_TO_RGB = np.array([[1, 0, 1.402, -179.456], [1, -0.344136, -0.714136, 135.458816], [1, 1.772, 0, -226.816]])
"""ITU-T T.871 (JFIF), full range."""


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
    """Open a slide; `mpp` and `power` go before what the file says. Raises `SlideError`."""
    source = open_source(url, storage_options)
    refuse_other_formats(source)
    try:
        with source.open() as file, tifffile.TiffFile(file, name=Path(source.url).name) as tif:
            if not tif.is_ndpi:  # its next-IFD pointers have 8 bytes in a classic TIFF
                check_chain(source)
            facts = parse(tif)
    except DfxError as e:
        message = str(e)
        raise SlideError(message if source.url in message else f"{source.url} can't be read: {message}.") from e
    except RecursionError as e:
        raise SlideError(f"{source.url} can't be read: its directories nest without end; copy it again.") from e
    except Exception as e:  # tifffile raises IndexError, TypeError, ZeroDivisionError, struct.error and more
        raise SlideError(
            f"{source.url} can't be read as a slide ({type(e).__name__}: {e}): the file is damaged or of an "
            "unknown kind; copy or export it again."
        ) from e
    for n, level in enumerate(facts.levels):
        check_extent(source, n, level)
    return Slide(
        url=source.url,
        vendor=facts.vendor,
        mpp=mpp or facts.mpp,
        power=power or facts.power,
        levels=tuple(facts.levels),
        notes=facts.notes,
        identity=identity(source),
        source=source,
        overrides=(mpp, power),
        storage_options=storage_options,
        reopen=open_tiff,
    )


def refuse_other_formats(source: ByteSource) -> None:
    """Say what a file is when it is no TIFF."""
    if source.size < 8:
        raise SlideError(f"{source.url} has {source.size} bytes, so it is no slide: copy it again.")
    head = source.read([(0, min(source.size, 132))])[0]
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return
    kinds = {b"\x89PNG": "a PNG image", b"\xff\xd8\xff": "a JPEG image", b"PK\x03\x04": "a ZIP archive"}
    kind = next((name for magic, name in kinds.items() if head.startswith(magic)), None)
    kind = "a DICOM file" if head[128:132] == b"DICM" else kind
    kind = "a Zeiss CZI file" if head.startswith(b"ZISRAWFILE") else kind
    kind = "a MIRAX slide" if source.url.lower().endswith(".mrxs") else kind
    raise SlideError(
        f"{source.url} is {kind or 'no TIFF file'}: dfx reads slides of the TIFF family "
        "(SVS, NDPI, SCN, OME-TIFF, Philips, QPTIFF, pyramidal TIFF); convert it to one of them."
    )


def check_chain(source: ByteSource) -> None:
    """Walk the chain of image directories; a loop or an end outside the file is an error.

    tifffile would follow a loop for ever, and quietly lose the levels behind a cut chain.
    """
    head = source.read([(0, 8)])[0]
    order = "<" if head[:2] == b"II" else ">"
    big = struct.unpack(order + "H", head[2:4])[0] == 43
    first, counter, entry, pointer = (8, "Q", 20, "Q") if big else (4, "H", 12, "I")

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
        outside = int((part.offsets + part.counts > source.size).sum())
        if outside > max(1, part.offsets.size // 1000):
            raise SlideError(
                f"{source.url} is truncated: {outside} of {part.offsets.size} tiles of level {n} lie past its end "
                f"at byte {source.size}; copy it again."
            )


def parse(tif: tifffile.TiffFile) -> Facts:
    """Find levels and metadata by the vendor that tifffile recognises."""
    page = tif.pages[0]
    description = page.description
    software = str(page.tags.valueof(305, "") or "")
    if tif.is_svs:
        levels, notes = pyramid(tif, depth_from_pages=True)
        return Facts("aperio", *vendors.aperio(description), levels, notes)
    if tif.is_ndpi:
        levels, notes = series_levels(tif.series[0])
        power = number_tag(page, 65421)
        return Facts("hamamatsu", resolution_mpp(page), power if power and power > 0 else None, levels, notes)
    if tif.is_scn:
        return leica(tif)
    if tif.is_philips:
        levels, notes = series_levels(tif.series[0])
        return Facts("philips", *vendors.philips(description), levels, notes)
    if tif.is_bif:
        raise SlideError(
            "it is a Ventana BIF, whose tiles overlap and would be misplaced: "
            "export it as SVS, OME-TIFF or pyramidal TIFF"
        )
    if tif.is_ome:
        sizes = [series.levels[0].keyframe.imagewidth * series.levels[0].keyframe.imagelength for series in tif.series]
        main = int(np.argmax(sizes))
        levels, notes = series_levels(tif.series[main])
        return Facts("ome", *vendors.ome(tif.ome_metadata or "", main), levels, notes)
    if tif.is_qpi:
        levels, notes = series_levels(tif.series[0])
        return Facts("perkinelmer", resolution_mpp(page), vendors.perkinelmer(description), levels, notes)
    overlaps = vendors.trestle_overlaps(description)
    if software.startswith("MedScan") or overlaps:
        if overlaps is None or any(overlaps):
            raise SlideError(
                f"it is a Trestle slide whose tiles overlap by {overlaps or 'an unknown number of'} pixels "
                "and would be misplaced: export it as SVS, OME-TIFF or pyramidal TIFF"
            )
        mpp = vendors.plausible(number_tag(page, 282), number_tag(page, 283))  # the unit is to be ignored
        return Facts("trestle", mpp, None, *pyramid(tif))
    return Facts("generic-tiff", resolution_mpp(page), None, *pyramid(tif))


def number_tag(page: Any, code: int) -> float | None:
    """Give a numeric tag, a rational as its quotient."""
    value = page.tags.valueof(code, None)
    if isinstance(value, tuple):
        return value[0] / value[1] if len(value) == 2 and value[1] else None
    return float(value) if isinstance(value, int | float) else None


def resolution_mpp(page: Any) -> vendors.Mpp:
    """Microns per pixel from the TIFF resolution tags, where they can be meant."""
    unit = page.tags.valueof(296, 2)
    return vendors.tiff_resolution(number_tag(page, 282), number_tag(page, 283), int(unit))


# Which pages are the pyramid


def pyramid(tif: tifffile.TiffFile, depth_from_pages: bool = False) -> tuple[list[Level], tuple[str, ...]]:
    """Find the levels among a file's pages and the sub-IFDs of its first page.

    tifffile's own series lose levels: of an SVS without a thumbnail, of one whose levels are marked
    as reduced, and where the factor is not 2, 3 or 4. A level has the first page's layout (tiles,
    channels, dtype) and its aspect, and is smaller; labels, macros and masks are not.
    """
    first = tif.pages[0]
    pages = [first, *tif.pages[1:], *(first.pages or ())]
    same_size = [p for p in pages if is_level(p, first) and p.imagewidth == first.imagewidth]
    if len(same_size) > 1 and not depth_from_pages:
        raise SlideError(
            f"it holds {len(same_size)} images of {first.imagewidth} x {first.imagelength} pixels, "
            "and nothing says which is the slide: save the wanted one as a file of its own"
        )
    planes: dict[tuple[int, int], list[Any]] = {}
    for page in pages:
        if is_level(page, first):
            planes.setdefault((page.imagelength, page.imagewidth), []).append(page)
    depth = len(same_size)
    chosen = [group[len(group) // 2] for size, group in sorted(planes.items(), reverse=True)]
    notes = (f"{depth} focal planes; the middle one is read",) if depth > 1 else ()
    return build_levels([((p.imagelength, p.imagewidth), [p], p) for p in chosen]), notes


def is_level(page: Any, first: Any) -> bool:
    """Whether a page can be a level under the first page."""
    if page is first:
        return True
    reduced = bool(page.subfiletype & 1)
    if page.subfiletype & 4 or (page.is_tiled != first.is_tiled) or not (first.is_tiled or reduced):
        return False
    if (page.dtype, page.samplesperpixel, page.planarconfig) != (
        first.dtype,
        first.samplesperpixel,
        first.planarconfig,
    ):
        return False
    height, width = page.imagelength, page.imagewidth
    if height > first.imagelength or width > first.imagewidth:
        return False
    expected = first.imagelength * width / first.imagewidth
    return bool(abs(height - expected) <= max(1.5, 0.02 * height, 1.5 * first.imagelength / first.imagewidth))


def series_levels(series: Any) -> tuple[list[Level], tuple[str, ...]]:
    """Give the levels of one of tifffile's series: a page a channel, the middle of focal planes."""
    found: list[tuple[tuple[int, int], list[Any], Any]] = []
    notes: tuple[str, ...] = ()
    for level in series.levels:
        keyframe, axes = level.keyframe, level.axes
        shape = dict(zip(axes, level.shape, strict=True))
        outer = [axis for axis in axes if axis not in keyframe.axes]
        counts = [shape[axis] for axis in outer]
        pages = list(level.pages)
        if len(pages) != int(np.prod(counts, dtype=int)):
            raise SlideError(
                f"its {counts} planes are in {len(pages)} pages, which dfx can't place: export it as OME-TIFF"
            )
        index = np.arange(len(pages)).reshape(counts)
        for axis in outer:
            size = shape[axis]
            if axis == "C":
                index = np.moveaxis(index, 0, -1)
            elif axis == "Z" or size == 1:
                index = index[size // 2]
                notes = (f"{size} focal planes; the middle one is read",) if size > 1 else notes
            else:
                raise SlideError(f"it has {size} images along axis {axis}: save the wanted one as a file of its own")
        chosen = [pages[i] for i in index.ravel()]
        found.append(((shape["Y"], shape["X"]), chosen, keyframe))
    return build_levels(found), notes


def leica(tif: tifffile.TiffFile) -> Facts:
    """Place a Leica slide's areas on the glass, as OpenSlide does; the macro image is left out."""
    glass, areas = vendors.leica(tif.pages[0].description)
    nm = areas[0].size_nm[0] / areas[0].levels[0][1]
    found = []
    for n in range(min(len(area.levels) for area in areas)):
        nm_level = areas[0].size_nm[0] / areas[0].levels[n][1]
        shape = round(glass[1] / nm_level), round(glass[0] / nm_level)
        parts = []
        for area in areas:
            ifd, width, height = area.levels[n]
            page = tif.pages[ifd]
            if (page.imagewidth, page.imagelength) != (width, height):
                raise SlideError(f"IFD {ifd} has other dimensions than its XML says: the file is damaged")
            origin = round(area.offset_nm[1] / nm_level), round(area.offset_nm[0] / nm_level)
            parts.append((origin, (height, width), page))
        found.append((shape, parts))
    levels = []
    for shape, parts in found:
        grids = tuple(tile_grid([page], page, size, origin) for origin, size, page in parts)
        levels.append(make_level(shape, found[0][0], parts[0][2], 1, grids))
    note = (f"{len(areas)} areas on the glass; between them is white",) if len(areas) > 1 else ()
    return Facts("leica", vendors.plausible(nm / 1000, nm / 1000), areas[0].power, levels, note)


# From pages to tile grids


def build_levels(found: Sequence[tuple[tuple[int, int], list[Any], Any]]) -> list[Level]:
    """Make levels of (shape, pages, keyframe), finest first."""
    found = sorted(found, key=lambda f: -f[0][0] * f[0][1])
    return [
        make_level(shape, found[0][0], keyframe, len(pages), (tile_grid(pages, keyframe, shape, (0, 0)),))
        for shape, pages, keyframe in found
    ]


def make_level(
    shape: tuple[int, int], baseline: tuple[int, int], page: Any, pages: int, parts: tuple[TileGrid, ...]
) -> Level:
    """Describe a level by one of its pages."""
    channels = pages * page.samplesperpixel
    colour = colour_of(page, pages)
    if page.photometric == 3:  # palette: decoded to RGB
        channels = 3
    return Level(
        shape_yx=shape,
        channels=channels,
        dtype=np.dtype(page.dtype) if page.photometric != 3 else np.dtype(np.uint8),
        downsample=(baseline[0] / shape[0] + baseline[1] / shape[1]) / 2,
        codec=CODECS.get(int(page.compression), str(getattr(page.compression, "name", page.compression))),
        colour=colour,
        parts=parts,
    )


def colour_of(page: Any, pages: int) -> Colour:
    """Say what a page's samples are, "other" where they are no colours that dfx is sure of."""
    photometric, samples = int(page.photometric), page.samplesperpixel
    if page.dtype != np.uint8 or pages > 1 or page.bitspersample != 8:
        return "rgb" if photometric == 3 and page.bitspersample <= 8 else "other"
    if photometric in (0, 1):
        return "grey" if samples == 1 else "other"
    if photometric == 3:
        return "rgb"
    converted = page.compression in (*JPEG, 33003)
    if photometric == 2 or (photometric == 6 and converted):
        alpha = int(page.extrasamples[0]) if page.extrasamples else 0
        return "rgb" if samples == 3 else {1: "rgba-associated", 2: "rgba"}.get(alpha, "other")  # type: ignore[return-value]
    return "other"


def tile_grid(pages: list[Any], keyframe: Any, shape: tuple[int, int], origin: tuple[int, int]) -> TileGrid:
    """Take a level's tile table and decoders from its pages, one page a plane, or planes in a page."""
    stored = keyframe.tags.valueof(257, keyframe.imagelength), keyframe.tags.valueof(256, keyframe.imagewidth)
    if keyframe.is_tiled:
        tile = keyframe.tilelength, keyframe.tilewidth
    else:
        tile = min(keyframe.rowsperstrip, stored[0]), stored[1]
    contiguous = keyframe.planarconfig == 1 or keyframe.samplesperpixel == 1
    samples = keyframe.samplesperpixel if contiguous else 1
    if min(*tile, *shape) < 1 or tile[0] * tile[1] * samples * keyframe.dtype.itemsize > MOST_TILE_BYTES:
        raise SlideError(
            f"its {'tiles' if keyframe.is_tiled else 'strips'} have {tile[0]} x {tile[1]} pixels, "
            "too many to read piece by piece: convert it to a tiled pyramid (e.g. vips tiffsave --tile --pyramid)"
        )
    if keyframe.compression == 33007:
        raise SlideError(
            "its tiles are raw YUYV (compression 33007), whose colours dfx can't restore: export it as JPEG SVS"
        )
    in_page = 1 if contiguous else keyframe.samplesperpixel
    grid = -(-stored[0] // tile[0]), -(-stored[1] // tile[1])
    offsets, counts, decoders = [], [], []
    for page in pages:
        if page is None or len(page.dataoffsets) != in_page * grid[0] * grid[1]:
            has = 0 if page is None else len(page.dataoffsets)
            raise SlideError(
                f"it lists {has} tiles where {in_page * grid[0] * grid[1]} are needed: the file is damaged"
            )
        offsets.append(np.array(page.dataoffsets, np.int64).reshape(in_page, *grid))
        counts.append(np.array(page.databytecounts, np.int64).reshape(in_page, *grid))
        decoders += [decoder(page, keyframe, plane * grid[0] * grid[1]) for plane in range(in_page)]
    return TileGrid(origin, shape, tile, np.concatenate(offsets), np.concatenate(counts), tuple(decoders))


def decoder(page: Any, keyframe: Any, base: int) -> Decode:
    """Make a page's decoder: a pure function of bytes, so safe in threads."""
    decode = keyframe.decode
    decode(None, 0)  # an unknown compression or layout is an error now, not at the first tile
    compression, photometric = int(keyframe.compression), int(keyframe.photometric)
    tables, header = page.jpegtables, getattr(page, "jpegheader", None)  # frames have no header of their own
    after: Callable[[NDArray[Any], bytes], NDArray[Any]] | None = None
    if compression == 33003:
        after = ycc_to_rgb
    elif photometric == 0 and keyframe.dtype == np.uint8 and keyframe.bitspersample == 8:
        after = inverted
    elif photometric == 3:
        after = Palette(np.asarray(keyframe.colormap))
    # These codecs' libraries fill what is missing of a cut tile without an error; NDPI's pieces have no end mark.
    complete = None
    if compression in (*JPEG, *JPEG2000) and not header:
        complete = has_end_mark
    elif compression in JPEGXR:
        complete = has_all_of_jpegxr

    def decode_tile(data: bytes, index: int) -> NDArray[Any]:
        if complete and not complete(data):
            raise ValueError("it is cut short")
        segment, _, _ = decode(data, base + index, jpegtables=tables, jpegheader=header)
        tile: NDArray[Any] = segment[0]
        return after(tile, data) if after else tile

    return decode_tile


def has_end_mark(data: bytes) -> bool:
    """Whether a JPEG or JPEG 2000 codestream ends as it must; scanners pad tiles with zeros."""
    return data.endswith(b"\xff\xd9") or data.rstrip(b"\0").endswith(b"\xff\xd9")


def has_all_of_jpegxr(data: bytes) -> bool:
    """Whether a JPEG XR container is as long as its ImageOffset and ImageByteCount say (ITU-T T.832, annex A)."""
    start = int.from_bytes(data[4:8], "little")
    entries = (data[at : at + 12] for at in range(start + 2, start + 2 + 12 * data[start], 12))
    tags = {int.from_bytes(e[:2], "little"): int.from_bytes(e[8:12], "little") for e in entries}
    return 0xBCC0 in tags and 0xBCC1 in tags and tags[0xBCC0] + tags[0xBCC1] <= len(data)


def ycc_to_rgb(tile: NDArray[Any], data: bytes) -> NDArray[Any]:
    """Convert an Aperio 33003 tile, which is YCbCr whatever its tags say.

    OpenJPEG converts by itself when the chroma is subsampled, as the codestream's SIZ segment says.
    """
    siz = data.find(b"\xff\x51")
    components = int.from_bytes(data[siz + 38 : siz + 40], "big")
    steps = [data[siz + 40 + 3 * i + 1 : siz + 40 + 3 * i + 3] for i in range(components)]
    if siz < 0 or any(step != b"\x01\x01" for step in steps):
        return tile
    return cv2.transform(tile, YCC_TO_RGB)


def inverted(tile: NDArray[Any], data: bytes) -> NDArray[Any]:
    """Turn a "white is zero" tile the usual way round."""
    return 255 - tile


@dataclass(frozen=True, eq=False)
class Palette:
    """Turns indices into RGB."""

    colormap: NDArray[Any]

    def __call__(self, tile: NDArray[Any], data: bytes) -> NDArray[Any]:
        """Look the indices (rows, columns, 1) up."""
        table: NDArray[np.uint8] = (self.colormap >> 8).astype(np.uint8).T
        return np.asarray(table[tile[..., 0]])
