"""Which pages of a TIFF are the pyramid, and where their tiles lie. Works on tifffile's pages, imports none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dfx.errors import SlideError, UnknownFormatError
from dfx.slides import vendors
from dfx.slides.decode import colour_of, decoder, is_palette, joiner
from dfx.slides.jpeg import JpegTiles
from dfx.slides.level import Level, StoredTiles

CODECS = {1: "none", 5: "LZW", 7: "JPEG", 8: "deflate", 32946: "deflate", 33003: "JPEG 2000", 33004: "JPEG 2000"}
CODECS |= {33005: "JPEG 2000", 34712: "JPEG 2000", 50000: "zstd", 50001: "WebP", 50002: "JPEG XL", 34934: "JPEG XR"}
MOST_TILE_BYTES = 2**28
"""A larger tile or strip is refused: it would have to be decoded whole for each patch."""


def pyramid(tif: Any, depth_from_pages: bool = False) -> tuple[list[Level], tuple[str, ...]]:
    """Find the levels among a file's pages and the sub-IFDs of its first page.

    tifffile's own series lose levels: of an SVS without a thumbnail, of one whose levels are marked
    as reduced, and where the factor is not 2, 3 or 4. A level has the first page's layout (tiles,
    channels, dtype) and its aspect, and is smaller; labels, macros and masks are not.
    """
    first = tif.pages[0]
    pages = [first, *tif.pages[1:], *(first.pages or ())]
    same_size = [p for p in pages if is_level(p, first) and p.imagewidth == first.imagewidth]
    if len(same_size) > 1 and not depth_from_pages:
        raise UnknownFormatError(
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


def leica_levels(tif: Any, glass_nm: tuple[float, float], areas: list[vendors.LeicaArea]) -> list[Level]:
    """Place a Leica slide's areas on the glass, as OpenSlide does."""
    found = []
    for n in range(min(len(area.levels) for area in areas)):
        nm_level = areas[0].size_nm[0] / areas[0].levels[n][1]
        shape = round(glass_nm[1] / nm_level), round(glass_nm[0] / nm_level)
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
    return levels


# From pages to tile grids


def build_levels(found: Sequence[tuple[tuple[int, int], list[Any], Any]]) -> list[Level]:
    """Make levels of (shape, pages, keyframe), finest first."""
    found = sorted(found, key=lambda f: -f[0][0] * f[0][1])
    return [
        make_level(shape, found[0][0], keyframe, len(pages), (tile_grid(pages, keyframe, shape, (0, 0)),))
        for shape, pages, keyframe in found
    ]


def make_level(
    shape: tuple[int, int], baseline: tuple[int, int], page: Any, pages: int, parts: tuple[StoredTiles, ...]
) -> Level:
    """Describe a level by one of its pages."""
    channels = pages * page.samplesperpixel
    colour, palette = colour_of(page, pages), is_palette(page)
    if palette:  # decoded to RGB
        channels = 3 * pages
    return Level(
        shape_yx=shape,
        channels=channels,
        dtype=np.dtype(np.uint8) if palette else np.dtype(page.dtype),
        downsample=(baseline[0] / shape[0] + baseline[1] / shape[1]) / 2,
        codec=CODECS.get(int(page.compression), str(getattr(page.compression, "name", page.compression))),
        colour=colour,
        parts=parts,
    )


def tile_grid(pages: list[Any], keyframe: Any, shape: tuple[int, int], origin: tuple[int, int]) -> StoredTiles:
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
    jpeg = JpegTiles.of(pages[0], keyframe) if len(decoders) == 1 else None
    return StoredTiles(
        origin,
        shape,
        tile,
        np.concatenate(offsets),
        np.concatenate(counts),
        tuple(decoders),
        jpeg.shrunk if jpeg and jpeg.can_shrink else None,
        joiner(keyframe) if in_page > 1 else None,
    )
