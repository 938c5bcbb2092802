"""Which pages of a TIFF are the pyramid, and where their tiles lie. Works on tifffile's pages, imports none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from dfx.errors import SlideError, UnknownFormatError
from dfx.slides.decode import colour_of, decoder, is_palette, joiner
from dfx.slides.factors import Image, Pair, agrees, contradicts, downsample_xy, used_size
from dfx.slides.jpeg import JpegTiles
from dfx.slides.level import Level, StoredTiles

CODECS = {1: "none", 5: "LZW", 7: "JPEG", 8: "deflate", 32946: "deflate", 33003: "JPEG 2000", 33004: "JPEG 2000"}
CODECS |= {33005: "JPEG 2000", 34712: "JPEG 2000", 50000: "zstd", 50001: "WebP", 50002: "JPEG XL", 34934: "JPEG XR"}
MOST_TILE_BYTES = 2**28
"""A larger tile or strip is refused: it would have to be decoded whole for each patch."""
REDUCED, MASK, MACRO = 1, 4, 8
"""Bits of NewSubfileType: a smaller version of another image of the file, a mask; with Aperio, the macro image."""
PixelOf: TypeAlias = Callable[[Any], Pair | None]


class Found(NamedTuple):
    """A level, before its tiles are looked up."""

    shape_yx: tuple[int, int]
    """Rows and columns as they are stored."""
    pages: list[Any]
    """One page per channel, or one page for all channels."""
    keyframe: Any
    """The page that describes them."""
    downsample_xy: Pair | None = None
    """Pixels of the baseline per pixel; None: the sizes give it."""


def number_tag(page: Any, code: int) -> float | None:
    """Return a numeric tag, a rational as its quotient; None where there is no such tag."""
    value = page.tags.valueof(code, None)
    if isinstance(value, tuple):
        return value[0] / value[1] if len(value) == 2 and value[1] else None
    return float(value) if isinstance(value, int | float) else None


def pixel_um(page: Any) -> Pair | None:
    """Return the width and height of a page's pixel in microns, by its resolution tags; None if they give no size."""
    x, y, unit = number_tag(page, 282), number_tag(page, 283), int(page.tags.valueof(296, 2))
    microns = {2: 25400.0, 3: 10000.0}.get(unit)
    return (microns / x, microns / y) if microns and x and y and min(x, y) > 0 else None


def pyramid(
    tif: Any, *, marked: bool = False, depth_from_pages: bool = False, pixel_of: PixelOf = pixel_um
) -> tuple[list[Level], tuple[str, ...]]:
    """Find the baseline among a file's pages, and its levels among these and its sub-IFDs; returns levels and notes.

    tifffile's own series lose levels: of an SVS without a thumbnail, of an SVS whose levels are marked as reduced, and
    of a file whose factor is not 2, 3 or 4. A level has the baseline's layout (tiles, channels, dtype) and is a smaller
    version of the same image: it is marked as such (`marked`: the vendor's format implies this for all), or its pixels
    are larger by the factor by which its size is smaller, or the file uses neither marks nor resolutions. `pixel_of`:
    the width and height of a page's pixel, if the file does not have them in its resolution tags.
    """
    pages = list(tif.pages)
    base = baseline(pages, marked=marked, pixel_of=pixel_of)
    whole = image_of(base, pixel_of)
    shape = whole.size_xy[::-1]
    same_size = [p for p in pages if has_layout(p, base) and (p.imagelength, p.imagewidth) == shape]
    depth = len(same_size)
    if depth > 1 and not depth_from_pages:
        raise UnknownFormatError(
            f"it holds {depth} images of {base.imagewidth} x {base.imagelength} pixels, "
            "and nothing says which is the slide: save the wanted one as a file of its own"
        )
    notes = [f"{depth} focal planes; the middle one is read"] if depth > 1 else []
    others = [p for p in pages if p not in same_size and has_layout(p, base)]
    marks = any(p.subfiletype & REDUCED for p in others)
    planes: dict[Pair, list[Any]] = {(1.0, 1.0): same_size}
    scenes: list[Image] = []
    for page in (*others, *(p for p in base.pages or () if has_layout(p, base))):
        image, is_marked = image_of(page, pixel_of), marked or bool(page.subfiletype & REDUCED) or page not in pages
        own = f"the image of {page.imagewidth} x {page.imagelength} pixels is left out: "
        factors = downsample_xy(whole, image)
        if not is_marked and (marks or contradicts(whole, image, marked=False)) and not agrees(whole, image):
            scenes.append(replace(image, pixel_xy=None))
            notes.append(own + "it is another picture: its resolution says so, or it is not marked as a level")
        elif factors is None or contradicts(whole, image, marked=True):
            notes.append(doubtful(image))
        elif any(is_of_scene(scene, image, factors) for scene in scenes):
            notes.append(own + "it may be a level of another picture of the file")
        else:
            planes.setdefault(factors, []).append(page)
    found = []
    for factors, group in planes.items():
        if len(group) not in (1, depth):
            notes.append(
                f"{len(group)} images that are {factors[0]:g} times smaller are left out: only one can be right"
            )
            continue
        page = group[len(group) // 2]
        found.append(Found((page.imagelength, page.imagewidth), [page], page, factors))
    levels, doubts = build_levels(found)
    return levels, (*notes, *doubts)


def is_of_scene(scene: Image, level: Image, factors: Pair) -> bool:
    """Return whether a level, with these factors to the baseline, may be a level of another picture."""
    other = downsample_xy(scene, replace(level, pixel_xy=None))
    return other is not None and (other[0].is_integer() or not factors[0].is_integer())


def baseline(pages: Sequence[Any], *, marked: bool = False, pixel_of: PixelOf = pixel_um) -> Any:
    """Return the page that is the slide: no thumbnail, label, macro image or mask.

    Raises `UnknownFormatError` if there is a larger image of which the first image is not a level.
    """
    own = [p for p in pages if not p.subfiletype & (MASK | MACRO)] or list(pages)
    own = [p for p in own if not p.subfiletype & REDUCED] or own
    own = [p for p in own if p.is_tiled] or own
    first, largest = own[0], max(own, key=lambda p: p.imagewidth * p.imagelength)
    if largest.imagewidth * largest.imagelength == first.imagewidth * first.imagelength:
        return first
    smaller, larger = image_of(first, pixel_of), image_of(largest, pixel_of)
    if (
        has_layout(first, largest)
        and not contradicts(larger, smaller, marked=marked)
        and downsample_xy(larger, smaller)
    ):
        return largest
    raise UnknownFormatError(
        f"its first image has {first.imagewidth} x {first.imagelength} pixels, another image that is no larger version "
        f"of it has {largest.imagewidth} x {largest.imagelength}, and nothing says which is the slide: "
        "save the wanted image as a file of its own"
    )


def has_layout(page: Any, base: Any) -> bool:
    """Return whether a page has the layout of the baseline, as its levels have, and labels and masks have not."""
    if page.subfiletype & (MASK | MACRO) or page.is_tiled != base.is_tiled:
        return False
    if not base.is_tiled and page is not base and not page.subfiletype & REDUCED:  # thumbnails have strips, too
        return False
    layout = "dtype", "samplesperpixel", "planarconfig"
    return all(getattr(page, name) == getattr(base, name) for name in layout)


def image_of(page: Any, pixel_of: PixelOf) -> Image:
    """Describe a page by its tags."""
    tile = (page.tilewidth, page.tilelength) if page.is_tiled else None
    return Image((page.imagewidth, page.imagelength), tile, pixel_of(page))


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
    levels, doubts = build_levels(found)
    return levels, notes + doubts


# From pages to tile grids


def build_levels(found: Sequence[tuple[Any, ...]]) -> tuple[list[Level], tuple[str, ...]]:
    """Make levels, finest first, from tuples of `Found`; padding beyond the slide is cut off.

    Levels whose place on the baseline is ambiguous are left out, and noted.
    """
    levels = sorted((Found(*f) for f in found), key=lambda f: -f.shape_yx[0] * f.shape_yx[1])
    base = levels[0].shape_yx
    whole = replace(image_of(levels[0].keyframe, pixel_um), size_xy=base[::-1])
    built: list[Level] = []
    notes: tuple[str, ...] = ()
    for level in levels:
        page, image = level.keyframe, replace(image_of(level.keyframe, pixel_um), size_xy=level.shape_yx[::-1])
        factors = level.downsample_xy or (downsample_xy(whole, image) if built else (1.0, 1.0))
        if factors is None:
            notes += (doubtful(image),)
            continue
        shape = used_size(whole.size_xy, image.size_xy, factors)[::-1]
        grids = (tile_grid(level.pages, page, shape, (0, 0)),)
        built.append(make_level(shape, base, page, len(level.pages), grids, factors))
    return built, notes


def doubtful(image: Image) -> str:
    """Return a note about an image for which `downsample_xy` finds no factors."""
    width, height = image.size_xy
    return (
        f"the image of {width} x {height} pixels is left out: its factor to the slide, "
        "or its padding, is not stated or is contradictory"
    )


def make_level(
    shape: tuple[int, int],
    baseline: tuple[int, int],
    page: Any,
    pages: int,
    parts: tuple[StoredTiles, ...],
    factors: Pair,
) -> Level:
    """Describe a level by one of its pages. `factors`: see `Level.downsample_xy`."""
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
        downsample_xy=factors,
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
