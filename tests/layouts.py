"""Slides of every layout that dfx reads, and what their levels hold; nothing of dfx is used.

Tiles are encoded here, by imagecodecs or numpy, and tifffile only writes the directories. So it is known of each
tile whether it is there, and what it decodes to.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import imagecodecs as ic
import numpy as np
import tifffile
from numpy.typing import NDArray

Pixels = NDArray[Any]
APERIO = "Aperio Image Library v1\r\n{w}x{h} (64x64)|AppMag = 40|MPP = 0.25"
SCN = "http://www.leica-microsystems.com/scn/2010/10/01"
NM = 250.0
"""Nanometres per pixel of every slide's baseline."""


def lossless(encode: Callable[[bytes], bytes]) -> tuple[Callable[[Pixels], bytes], None]:
    return lambda tile: encode(tile.tobytes()), None


CODECS: dict[str, tuple[Callable[[Pixels], bytes], Callable[[bytes], Pixels] | None]] = {
    "none": lossless(bytes),
    "zlib": lossless(ic.zlib_encode),
    "lzw": lossless(ic.lzw_encode),
    "zstd": lossless(ic.zstd_encode),
    "jpeg": (lambda tile: ic.jpeg8_encode(tile, level=92, subsampling="420"), ic.jpeg8_decode),
    "jpeg2000": (lambda tile: ic.jpeg2k_encode(tile, level=40, codecformat="J2K"), ic.jpeg2k_decode),
    "webp": (lambda tile: ic.webp_encode(tile, level=80), ic.webp_decode),
    "jpegxl": (lambda tile: ic.jpegxl_encode(tile, level=80), ic.jpegxl_decode),
}
"""How a tile is encoded, and decoded again where that loses something."""


@dataclass(frozen=True)
class Layout:
    """What a slide looks like; `write` makes it."""

    size_yx: tuple[int, int] = (300, 420)
    factors: tuple[int, ...] = (1,)
    tile_yx: tuple[int, int] | None = (64, 64)
    """None: strips of 48 rows."""
    codec: str = "zlib"
    kind: str = "rgb"
    """rgb, rgba (unassociated alpha), grey, white-is-zero or palette."""
    vendor: str = "generic"
    """generic, aperio or leica."""
    planar: bool = False
    cut: bool = False
    """Whether tiles on the right and lower border hold only what lies inside the image."""
    missing: tuple[tuple[int, int], ...] = ()
    """(level, number of the tile) of tiles that the file lacks; in a Leica slide of its first area."""
    damaged: tuple[tuple[int, int], ...] = ()
    """(level, number of the tile) of tiles that can't be decoded, and are white when such tiles are filled."""
    areas: tuple[tuple[int, int, int, int], ...] = ((64, 96, 128, 200),)
    """Of a Leica slide: (top, left, height, width) on the glass, in whole pixels of every level."""
    big_endian: bool = False
    big_tiff: bool = False
    sub_ifds: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Written:
    """A slide's file, and what it shows."""

    path: Path
    layout: Layout
    levels: list[Pixels] = field(repr=False)
    """RGB over white, uint8, level by level."""

    @property
    def downsamples(self) -> list[float]:
        first = self.levels[0].shape
        return [(first[0] / level.shape[0] + first[1] / level.shape[1]) / 2 for level in self.levels]


def write(path: Path, layout: Layout) -> Written:
    """Write a slide of a layout."""
    rng = np.random.default_rng(layout.seed)
    if layout.vendor == "leica":
        return write_leica(path, layout, rng)
    levels: list[Pixels] = []
    colours = rng.integers(0, 256, (3, 256)).astype(np.uint16) * 257
    with tifffile.TiffWriter(path, bigtiff=layout.big_tiff, byteorder=">" if layout.big_endian else "<") as out:
        for n, factor in enumerate(layout.factors):
            height, width = (max(1, size // factor) for size in layout.size_yx)
            samples = {"rgb": 3, "rgba": 4}.get(layout.kind, 1)
            image = texture(rng, height, width, samples)
            described = APERIO.format(w=width, h=height) if layout.vendor == "aperio" and n == 0 else None
            options: dict[str, Any] = {"description": described, "metadata": None, "software": False}
            if n == 0 and layout.sub_ifds:
                options["subifds"] = len(layout.factors) - 1
            stored, there = write_page(out, layout, image, n, colours, subfiletype=int(n > 0), **options)
            shown = over_white(layout.kind, stored, colours)
            shown[~there] = 255
            levels.append(shown)
    if layout.vendor == "aperio":
        draw_missing(layout, levels)
    return Written(path, layout, levels)


def texture(rng: np.random.Generator, height: int, width: int, samples: int) -> Pixels:
    """Noise on a gradient, so that lossy codecs keep something; no two places look alike."""
    y, x = np.mgrid[0:height, 0:width]
    slopes = rng.uniform(-0.5, 0.5, (2, samples))
    smooth = 128 + y[..., None] * slopes[0] + x[..., None] * slopes[1] + rng.normal(0, 12, (height, width, samples))
    return np.asarray(np.abs((smooth + 255) % 510 - 255).clip(0, 250).astype(np.uint8))


def boxes(shape: tuple[int, ...], tile_yx: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """(top, left, bottom, right) of each tile within an image, row after row."""
    for top, left in itertools.product(range(0, shape[0], tile_yx[0]), range(0, shape[1], tile_yx[1])):
        yield top, left, min(top + tile_yx[0], shape[0]), min(left + tile_yx[1], shape[1])


def write_page(
    out: tifffile.TiffWriter, layout: Layout, image: Pixels, level: int | None, colours: Pixels, **options: Any
) -> tuple[Pixels, NDArray[np.bool_]]:
    """Write an image tile by tile; gives the samples as they decode, and which pixels can be read."""
    gaps, damaged = ({t for n, t in tiles if n == level} for tiles in (layout.missing, layout.damaged))
    encode, decode = CODECS[layout.codec]
    strips = layout.tile_yx is None
    tile_yx = layout.tile_yx or (min(48, image.shape[0]), image.shape[1])
    planes = [image[..., [n]] for n in range(image.shape[2])] if layout.planar else [image]
    stored, there, data = image.copy(), np.ones(image.shape[:2], np.bool_), []
    for p, plane in enumerate(planes):
        shown = stored[..., [p]] if layout.planar else stored
        for n, (top, left, bottom, right) in enumerate(boxes(image.shape, tile_yx)):
            tile = plane[top:bottom, left:right]
            if not (strips or layout.cut):
                padded = np.full((*tile_yx, tile.shape[2]), 40, np.uint8)
                padded[: tile.shape[0], : tile.shape[1]] = tile
                tile = padded
            tile = np.ascontiguousarray(tile[..., 0] if tile.shape[2] == 1 else tile)
            data.append(b"" if n in gaps else b"damaged" if n in damaged else encode(tile))
            there[top:bottom, left:right] &= n not in gaps | damaged
            if decode and n not in gaps | damaged:
                decoded = decode(data[-1]).reshape(*tile.shape[:2], -1)
                shown[top:bottom, left:right] = decoded[: bottom - top, : right - left]
        if layout.planar:
            stored[..., [p]] = shown
    photometric = {"grey": "minisblack", "white-is-zero": "miniswhite", "palette": "palette"}.get(layout.kind, "rgb")
    if layout.codec == "jpeg" and image.shape[2] == 3 and not layout.planar:
        photometric = "ycbcr"
    samples = image.shape[2]
    shape = image.shape[:2] if samples == 1 else (samples, *image.shape[:2]) if layout.planar else image.shape
    out.write(
        iter(data),
        shape=shape,
        dtype=np.uint8,
        photometric=photometric,
        planarconfig=None if samples == 1 else "separate" if layout.planar else "contig",
        extrasamples=["unassalpha"] if layout.kind == "rgba" else None,
        colormap=colours if layout.kind == "palette" else None,
        compression=None if layout.codec == "none" else layout.codec,
        **({"rowsperstrip": tile_yx[0]} if strips else {"tile": tile_yx}),
        **options,
    )
    return stored, there


def over_white(kind: str, stored: Pixels, colours: Pixels) -> Pixels:
    """Show samples as RGB."""
    if kind == "rgba":
        alpha = stored[..., 3:].astype(int)
        return np.asarray(((stored[..., :3] * alpha + (255 - alpha) * 255 + 127) // 255).astype(np.uint8))
    if kind == "palette":
        return np.asarray((colours >> 8).astype(np.uint8).T[stored[..., 0]])
    if kind == "rgb":
        return stored.copy()
    return np.repeat(255 - stored if kind == "white-is-zero" else stored, 3, axis=2)


def draw_missing(layout: Layout, levels: list[Pixels]) -> None:
    """Draw tiles of lower levels that are missing, or cover a missing tile, from the finer level, pixel by pixel."""
    assert layout.tile_yx is not None
    gaps = tile_mask(layout, levels[0].shape, {t for n, t in layout.missing if n == 0})
    for n in range(1, len(levels)):
        level, finer = levels[n], levels[n - 1]
        lost = {t for m, t in layout.missing if m == n}
        step = layout.factors[n] / layout.factors[n - 1]  # levels lose odd rows and columns, and are not stretched
        centres = [((np.arange(s) + 0.5) * step).astype(int) for s in level.shape[:2]]
        on_gap = gaps[np.ix_(*centres)]
        for t, (top, left, bottom, right) in enumerate(boxes(level.shape, layout.tile_yx)):
            if t in lost or on_gap[top:bottom, left:right].any():
                lost.add(t)
                rows = average(finer.astype(float), step * np.arange(top, bottom + 1), 0)
                tile = average(rows, step * np.arange(left, right + 1), 1)
                level[top:bottom, left:right] = np.rint(tile)
        gaps = tile_mask(layout, level.shape, lost)


def tile_mask(layout: Layout, shape: tuple[int, ...], tiles: set[int]) -> NDArray[np.bool_]:
    """Which pixels lie in some tiles."""
    mask = np.zeros(shape[:2], np.bool_)
    assert layout.tile_yx is not None
    for t, (top, left, bottom, right) in enumerate(boxes(shape, layout.tile_yx)):
        mask[top:bottom, left:right] = t in tiles
    return mask


def average(image: Pixels, edges: NDArray[np.float64], axis: int) -> Pixels:
    """Average between edges along an axis, by one weight per pixel."""
    weights = np.zeros((len(edges) - 1, image.shape[axis]))
    for i, (start, stop) in enumerate(itertools.pairwise(edges)):
        for j in range(int(start), min(image.shape[axis], int(np.ceil(stop)))):
            weights[i, j] = max(0.0, min(stop, j + 1) - max(start, j)) / (stop - start)
    return np.moveaxis(np.tensordot(weights, image, (1, axis)), 0, axis)


def write_leica(path: Path, layout: Layout, rng: np.random.Generator) -> Written:
    """Write a Leica SCN slide: a macro image of the glass, then every level of each area."""
    glass = layout.size_yx
    assert layout.tile_yx is not None
    levels = [np.full((glass[0] // f, glass[1] // f, 3), 255, np.uint8) for f in layout.factors]
    pages: list[tuple[Pixels, int | None]] = [(texture(rng, glass[0] // 8, glass[1] // 8, 3), None)]
    images = [scn_image("macro", 1.25, (0, 0, *glass), [(0, glass[0] // 8, glass[1] // 8)])]
    for a, (top, left, height, width) in enumerate(layout.areas):
        sizes = []
        for n, f in enumerate(layout.factors):
            sizes.append((len(pages), height // f, width // f))
            pages.append((texture(rng, height // f, width // f, 3), n if a == 0 else None))
        images.append(scn_image(f"area{a}", 40, (top, left, height, width), sizes))
    xml = f'<?xml version="1.0"?><scn xmlns="{SCN}"><collection name="c" uuid="u" sizeX="{glass[1] * NM:.0f}" '
    xml += f'sizeY="{glass[0] * NM:.0f}">{"".join(images)}</collection></scn>'
    written = []
    with tifffile.TiffWriter(path, bigtiff=True) as out:
        for n, (image, of) in enumerate(pages):
            options: dict[str, Any] = {"metadata": None, "software": False, "description": xml if n == 0 else None}
            written.append(write_page(out, layout, image, of, np.empty(0), **options))
    for n, (stored, there) in enumerate(written[1:]):
        area, level = divmod(n, len(layout.factors))
        top, left = (at // layout.factors[level] for at in layout.areas[area][:2])
        place = levels[level][top : top + stored.shape[0], left : left + stored.shape[1]]
        stored, there = (array[: place.shape[0], : place.shape[1]] for array in (stored, there))  # beyond the glass
        place[there] = stored[there]
    return Written(path, layout, levels)


def scn_image(name: str, power: float, box: tuple[int, int, int, int], sizes: list[tuple[int, int, int]]) -> str:
    """Describe an image of a Leica slide; `sizes`: (IFD, height, width) of each level."""
    top, left, height, width = (value * NM for value in box)
    dimensions = "".join(
        f'<dimension sizeX="{w}" sizeY="{h}" r="{r}" ifd="{ifd}"/>' for r, (ifd, h, w) in enumerate(sizes)
    )
    return (
        f'<image name="{name}"><device model="m" version="1"/><creationDate>2020-01-01T00:00:00Z</creationDate>'
        f"<scanSettings><objectiveSettings><objective>{power}</objective></objectiveSettings><illuminationSettings>"
        f"<illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings>"
        f'<pixels sizeX="{sizes[0][2]}" sizeY="{sizes[0][1]}">{dimensions}</pixels><view sizeX="{width:.0f}" '
        f'sizeY="{height:.0f}" offsetX="{left:.0f}" offsetY="{top:.0f}"/></image>'
    )
