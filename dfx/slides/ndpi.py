"""Hamamatsu NDPI: which pages are levels of one focal plane, and each level's JPEG cut at its restart markers.

An NDPI level is one JPEG. Where it has restart markers, a list of them (McuStarts) makes each run between two
markers a tile. As in OpenSlide, a listed position counts only where a restart marker precedes it.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from dfx.errors import SlideError
from dfx.slides.codestream import FRAMES, jpeg_segments
from dfx.slides.factors import Image, downsample_xy, ratio
from dfx.slides.level import Level, StoredTiles
from dfx.slides.pyramid import MOST_TILE_BYTES, make_level, pixel_um, tile_grid
from dfx.slides.source import ByteSource
from dfx.tiff_rules import has_aspect

FILE_FORMAT, SOURCE_LENS, Z_OFFSET, MCU_STARTS, MCU_STARTS_HIGH = 65420, 65421, 65424, 65426, 65432
LONGEST_SIDE = 65500
"""libjpeg's limit. The header of a longer JPEG has a size of 0, or the lower 16 bits of its size."""
MOST_HEADER_BYTES = 2**20
RESTART = re.compile(rb"\xff[\xd0-\xd7]")
Shape = tuple[int, int]


def has_long_pointers(source: ByteSource) -> bool:
    """Whether a file is an NDPI file of more than 4 GiB: a classic TIFF with 64-bit pointers. Its name does not count.

    In a smaller NDPI file the upper halves of pointers are 0, so that it reads like any other classic TIFF.
    """
    if source.size < 2**32:
        return False
    head = source.read([(0, 12)])[0]
    (first,) = struct.unpack("<Q", head[4:])
    if head[:4] != b"II*\0" or not 8 <= first <= source.size - 2:
        return False
    (entries,) = struct.unpack("<H", source.read([(first, 2)])[0])
    if first + 2 + 12 * entries > source.size:
        return False
    directory = source.read([(first + 2, 12 * entries)])[0]
    return any(tag == FILE_FORMAT for tag, _ in struct.iter_unpack("<H10s", directory))


def ndpi_levels(tif: Any, source: ByteSource) -> tuple[list[Level], tuple[str, ...], Any]:
    """Find the levels of the focal plane nearest to 0. Returns levels, notes and the baseline's page.

    Raises `SlideError`.
    """
    pages = [page for page in tif.pages if is_level(page)]
    if not pages:
        raise SlideError(
            "all its images are macros or maps (SourceLens, tag 65421, is nowhere above 0): export it again"
        )
    plane, notes = nearest_plane(pages)
    found = []
    for page in plane:
        shape, part, note = read_level(page, source)
        found.append((shape, part, page))
        notes += (note,) if note else ()
    found.sort(key=lambda level: -level[0][0] * level[0][1])
    base = found[0][0]
    whole = Image(base[::-1], pixel_xy=pixel_um(found[0][2]))
    levels = []
    for n, (shape, part, page) in enumerate(found):
        if n and shape == found[n - 1][0]:
            raise SlideError(
                f"it holds several images of {shape[1]} x {shape[0]} pixels in one focal plane, "
                "and nothing says which is the slide: export it again"
            )
        if has_aspect(shape, base):
            image = Image(shape[::-1], pixel_xy=pixel_um(page))
            factors = downsample_xy(whole, image) or ratio(whole.size_xy, image.size_xy)
            levels.append(make_level(shape, base, page, 1, (part,), factors))
        else:
            notes += (f"an image of {shape[1]} x {shape[0]} pixels has another aspect than the slide; it is left out",)
    return levels, notes, found[0][2]


def is_level(page: Any) -> bool:
    """Whether a page is a level: SourceLens is the objective of its pixels, -1 for a macro image, -2 for a map."""
    return bool(page.tags.valueof(SOURCE_LENS, 1) > 0)


def z_offset(page: Any) -> int:
    """Give the distance of a page's focal plane from the slide's centre in nm, also where it lost its sign."""
    value = page.tags.valueof(Z_OFFSET)
    value = int(value) if isinstance(value, int | float) else 0
    bits = 64 if value >= 2**32 else 32
    return value - 2**bits if value >= 2 ** (bits - 1) else value


def nearest_plane(pages: list[Any]) -> tuple[list[Any], tuple[str, ...]]:
    """Give the pages of the focal plane nearest to 0 among those with the baseline, and a note if there are several.

    Levels of two planes are never mixed: patches of two resolutions would show different depths.
    """
    planes: dict[int, list[Any]] = {}
    for page in pages:
        planes.setdefault(z_offset(page), []).append(page)
    widest = max(page.imagewidth for page in pages)
    whole = [z for z, plane in planes.items() if any(page.imagewidth == widest for page in plane)]
    z = min(whole, key=lambda z: (abs(z), z))
    if len(planes) == 1:
        return planes[z], ()
    why = "nearest to 0" if len(whole) == len(planes) else "nearest to 0 of those with the finest level"
    return planes[z], (f"{len(planes)} focal planes; the plane at {z} nm, {why}, is read",)


@dataclass(frozen=True, eq=False)
class LevelJpeg:
    """The header of a level's JPEG: up to the first byte of its compressed data."""

    data: bytes
    size_at: int
    """Position of the size in `data`: rows and columns, 16 bits each."""
    size_yx: Shape
    mcu_yx: Shape
    """Rows and columns of pixels of the smallest unit that is coded."""
    components: int
    sequential: bool
    """Whether it is coded from top to bottom in a single scan, so that a part of it can be decoded."""
    interval: int
    """Units between two restart markers; 0: there are no markers."""

    @classmethod
    def read(cls, source: ByteSource, offset: int, count: int) -> LevelJpeg:
        """Read it from a file; raises `SlideError`."""
        for size in (4096, MOST_HEADER_BYTES):
            data = source.read([(offset, max(0, min(count, size)))])[0]
            try:
                return cls.of(data)
            except ValueError as e:
                failure = e
        raise SlideError(f"the {count} bytes at {offset} are no JPEG ({failure}): the file is damaged; copy it again")

    @classmethod
    def of(cls, data: bytes) -> LevelJpeg:
        """Parse the beginning of a JPEG (ITU-T T.81, annex B); raises `ValueError`."""
        interval, frame, kind, end, in_scan = 0, 0, 0, 0, 0
        for code, start, stop in jpeg_segments(data):
            if code == 0xDD:
                interval = int.from_bytes(data[start:stop], "big")
            elif code in FRAMES:
                frame, kind = start, code
            elif code == 0xDA:
                end, in_scan = stop, data[start]
        if data[:2] != b"\xff\xd8" or not frame or not frame < end <= len(data):
            raise ValueError("it has no complete header")
        components = data[frame + 5]
        factors = data[frame + 7 : frame + 6 + 3 * components : 3]
        unit = (max(f & 15 for f in factors), max(f >> 4 for f in factors)) if components > 1 else (1, 1)
        rows, columns = struct.unpack(">HH", data[frame + 1 : frame + 5])
        return cls(
            data=data[:end],
            size_at=frame + 1,
            size_yx=(rows, columns),
            mcu_yx=(8 * unit[0], 8 * unit[1]),
            components=components,
            sequential=kind in (0xC0, 0xC1) and in_scan == components,
            interval=interval,
        )

    def resized(self, shape: Shape) -> bytes:
        """Give the header of an image of another size."""
        return self.data[: self.size_at] + struct.pack(">HH", *shape) + self.data[self.size_at + 4 :]

    def decode(self, shape: Shape, body: bytes) -> NDArray[np.uint8]:
        """Decode compressed data without its end mark to `shape`; colours follow libjpeg's rules, as in OpenSlide."""
        out: NDArray[np.uint8] = imagecodecs.jpeg8_decode(
            self.resized(shape) + body + b"\xff\xd9", outcolorspace=2 if self.components == 3 else None
        )
        return out.reshape(*shape, -1)


def read_level(page: Any, source: ByteSource) -> tuple[Shape, StoredTiles, str | None]:
    """Find a level's size, its tiles and a note; raises `SlideError`."""
    tagged = page.imagelength, page.imagewidth
    offsets, counts = page.tags.valueof(273, ()), page.tags.valueof(279, ())
    if page.compression != 7:  # JPEG XR of 16 bits, raw pixels
        return tagged, tile_grid([page], page, tagged, (0, 0)), None
    if page.dtype != np.uint8 or (len(offsets), len(counts)) != (1, 1):
        raise SlideError(
            f"its level of {tagged[1]} x {tagged[0]} pixels has {len(offsets)} strips of {page.dtype}, "
            "and NDPI has one JPEG of 8 bits per level: export it again"
        )
    offset, count = int(offsets[0]), int(counts[0])
    header = LevelJpeg.read(source, offset, count)
    # The JPEG is decoded, so its own size holds; scanners write another size to the tags of small levels.
    shape = header.size_yx if all(header.size_yx) and max(tagged) <= LONGEST_SIDE else tagged
    cut = Cut.of(header, shape)
    starts, fault = mcu_starts(page, len(header.data), count, cut.rows * cut.columns) if cut else (None, None)
    if cut and starts is not None:
        lead = np.where(starts == starts[0], 0, 2)  # the restart marker before a tile is read with it, to be checked
        where = (offset + starts - lead).reshape(1, cut.rows, cut.columns)
        sizes = (np.append(starts[1:], count) - starts + lead).reshape(1, cut.rows, cut.columns)
        return shape, StoredTiles((0, 0), shape, cut.tile_yx, where, sizes, (cut,)), None
    if max(shape) > LONGEST_SIDE or shape[0] * shape[1] * header.components > MOST_TILE_BYTES:
        raise SlideError(
            f"its level of {shape[1]} x {shape[0]} pixels is one JPEG that {fault or 'has no usable restart markers'}, "
            "and it is too large to read whole: convert it to a tiled pyramid (e.g. vips tiffsave --tile --pyramid)"
        )
    note = f"the level of {shape[1]} x {shape[0]} pixels is read whole: its JPEG {fault}" if fault else None
    where, sizes = (np.array(value, np.int64).reshape(1, 1, 1) for value in (offset, count))
    return shape, StoredTiles((0, 0), shape, shape, where, sizes, (Whole(header, shape),)), note


def mcu_starts(page: Any, first: int, count: int, tiles: int) -> tuple[NDArray[np.int64] | None, str | None]:
    """Give the positions of tiles in a level's JPEG of `count` bytes, or None, and the fault of the list, or None."""
    low, high = page.tags.valueof(MCU_STARTS), page.tags.valueof(MCU_STARTS_HIGH)
    if low is None:
        return None, None
    if len(low) != tiles or (high is not None and len(high) != tiles):
        return None, f"lists {len(low)} restart markers (McuStarts, tag 65426) where {tiles} are needed"
    starts = np.array(low, np.int64)
    if high is not None:
        starts += np.array(high, np.int64) << 32
    starts[0] = first  # the compressed data begins here, as the header says
    if (np.diff(starts) < 3).any() or starts[-1] >= count:
        return None, "has a list of restart markers (McuStarts, tag 65426) that is not in order, or runs past its end"
    return starts, None


@dataclass(frozen=True, eq=False)
class Cut:
    """The division of a JPEG into equal tiles by restart markers, and the decoder of these tiles."""

    header: LevelJpeg
    rows: int
    columns: int
    tile_yx: Shape
    last_rows: int
    """Rows of pixels of the last row of tiles."""

    @classmethod
    def of(cls, header: LevelJpeg, shape: Shape) -> Cut | None:
        """Divide a JPEG of a size; None if restart markers are missing or do not make rectangles."""
        down, across = (-(-size // unit) for size, unit in zip(shape, header.mcu_yx, strict=True))
        interval = header.interval
        if not interval or not header.sequential or (across % interval and interval % across):
            return None
        deep, wide = max(1, interval // across), min(interval, across)
        rows = -(-down // deep)
        unit_y, unit_x = header.mcu_yx
        last = (down - (rows - 1) * deep) * unit_y
        return cls(header, rows, across // wide, (deep * unit_y, wide * unit_x), last)

    def __call__(self, data: bytes, index: int, *, scratch: bool) -> NDArray[np.uint8]:
        """Decode a tile between its two restart markers (their numbers go from 0 to 7 and begin again)."""
        start, end = 0, len(data) - 2
        last = self.rows * self.columns - 1
        if index:
            start = 2
            if data[:2] != bytes((0xFF, 0xD0 + (index - 1) % 8)):
                raise ValueError(f"restart marker {(index - 1) % 8} is not before it, where McuStarts points")
        if index < last and data[-2:] != bytes((0xFF, 0xD0 + index % 8)):
            raise ValueError(f"restart marker {index % 8} is not after it, where McuStarts points")
        if index == last:
            end = data.find(b"\xff\xd9", start)
            if end < 0:
                raise ValueError("it is cut short")
        body = data[start:end]
        if RESTART.search(body):
            raise ValueError("a restart marker is inside it, which McuStarts does not list")
        height = self.last_rows if index // self.columns == self.rows - 1 else self.tile_yx[0]
        return self.header.decode((height, self.tile_yx[1]), body)


@dataclass(frozen=True, eq=False)
class Whole:
    """Decodes a JPEG that is not cut."""

    header: LevelJpeg
    shape_yx: Shape

    def __call__(self, data: bytes, index: int, *, scratch: bool) -> NDArray[np.uint8]:
        """Decode all of it."""
        start, end = len(self.header.data), data.rfind(b"\xff\xd9")
        if end < start:
            raise ValueError("it is cut short")
        return self.header.decode(self.shape_yx, data[start:end])
