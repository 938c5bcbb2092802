"""Masks of all kinds of files and arrays: which cells are wanted, and where they lie on the slide."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from conftest import WSI
from numpy.typing import NDArray
from PIL import Image
from test_grid import Bare

import dfx
from dfx.errors import CallError
from dfx.masks import as_mask, image_file, read_mask

RNG = np.random.default_rng(5)
CELLS: NDArray[np.uint8] = (cv2.GaussianBlur(RNG.normal(size=(70, 90)), (0, 0), 6) > 0.02).astype(np.uint8)
CELLS[:12, :20], CELLS[50:, 60:] = 0, 1
COLOURS = np.array([[0, 0, 0], [200, 0, 30], [0, 90, 0]], np.uint8)
INSIDE = CELLS > 0
LABELS = CELLS + (CELLS * (np.arange(90) > 40)).astype(np.uint8)
"""0 outside, 1 and 2 inside."""


def rgba(alpha: Any = 255) -> NDArray[np.uint8]:
    return np.dstack([COLOURS[LABELS], np.broadcast_to(np.asarray(alpha, np.uint8), LABELS.shape)])


TRANSPARENT = np.where(INSIDE, 40, 0).astype(np.uint8)
WHITE_OUTSIDE = np.dstack([np.where(INSIDE[..., None], COLOURS[LABELS], 255), TRANSPARENT]).astype(np.uint8)
NAN = np.where(INSIDE, 0.01, np.nan)
ARRAYS: dict[str, NDArray[Any]] = {
    "bool": INSIDE,
    "labels": LABELS,
    "uint16": LABELS.astype(np.uint16),
    "int32": LABELS.astype(np.int32),
    "uint64": LABELS.astype(np.uint64) << np.uint64(40),
    "big-endian": LABELS.astype(">u2"),
    "negative outside": np.where(INSIDE, 1, -1).astype(np.int16),
    "probabilities": INSIDE * np.float32(1e-6),
    "half": INSIDE * np.float16(0.5),
    "NaN outside": NAN,
    "infinity": np.where(INSIDE, np.inf, -np.inf),
    "one channel": LABELS[..., None],
    "grey and alpha": np.dstack([np.full_like(LABELS, 7), TRANSPARENT]),
    "grey, opaque": np.dstack([LABELS, np.full_like(LABELS, 255)]),
    "RGB": COLOURS[LABELS],
    "RGB, NaN outside": np.where(INSIDE[..., None], COLOURS[LABELS], np.nan),
    "RGBA, opaque": rgba(),
    "RGBA, transparent": WHITE_OUTSIDE,
    "RGBA of 16 bits": rgba().astype(np.uint16),
    "RGBA of floats": rgba() / np.float32(255),
    "masked": np.ma.MaskedArray(np.ones_like(LABELS), mask=~INSIDE),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_cells_of_an_array_and_of_its_file_are_the_same(kind: str, tmp_path: Path) -> None:
    given = ARRAYS[kind]
    assert np.array_equal(as_mask(given), INSIDE)
    if kind != "masked":
        np.save(tmp_path / "mask.npy", given)
        assert np.array_equal(read_mask(tmp_path / "mask.npy"), INSIDE)
        if given.ndim == 2 and given.dtype.itemsize < 8:
            tifffile.imwrite(tmp_path / "mask.tif", given)
            assert np.array_equal(read_mask(tmp_path / "mask.tif"), INSIDE)


def by_pillow(image: Image.Image, kind: str, **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def by_tifffile(pixels: NDArray[Any], **options: Any) -> bytes:
    data = io.BytesIO()
    tifffile.imwrite(data, pixels, **options)
    return data.getvalue()


def encoded(suffix: str, pixels: NDArray[Any]) -> bytes:
    return bytes(cv2.imencode(suffix, pixels)[1].tobytes())


def palette(mode: str = "PNG") -> bytes:
    image = Image.fromarray(LABELS)
    image.putpalette(COLOURS.ravel().tolist())
    return by_pillow(image, mode)


def png16(transparent: int) -> bytes:
    """A 16-bit grey PNG with 5 inside and 3 outside, where a colour key makes 3 transparent."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = np.where(INSIDE, 5, 3).astype(">u2")
    head = struct.pack(">IIBBBBB", 90, 70, 16, 0, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = [(b"IHDR", head), (b"tRNS", struct.pack(">H", transparent)), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def pyramid(**options: Any) -> bytes:
    data = io.BytesIO()
    with tifffile.TiffWriter(data) as tif:
        tif.write(LABELS, tile=(16, 16), subifds=1, **options)
        tif.write(LABELS[::2, ::2], tile=(16, 16), subfiletype=1, **options)
        tif.write(LABELS[::4, ::4], tile=(16, 16), subfiletype=1, **options)
    return data.getvalue()


def sparse(*, planes: bool = False, white: bool = False, **options: Any) -> bytes:
    """A TIFF that lacks the tiles without any wanted cell; `white`: 0 is white in it."""
    pixels = np.moveaxis(COLOURS[LABELS], -1, 0) if planes else np.uint8(255) - LABELS if white else LABELS
    plan = {"planarconfig": "separate", "photometric": "rgb"} if planes else {"photometric": "minisblack"}
    plan |= {"photometric": "miniswhite"} if white else {}
    data = io.BytesIO(by_tifffile(pixels, tile=(16, 16), **(plan | options)))
    with tifffile.TiffFile(data) as tif:
        tags = [tif.pages[0].tags[code] for code in (324, 325)]  # offsets and counts
    padded = np.pad(INSIDE, ((0, 10), (0, 6)))
    empty = ~padded.reshape(5, 16, 6, 16).any(axis=(1, 3)).ravel()
    assert 0 < empty.sum() < empty.size
    raw = bytearray(data.getvalue())
    for tag in tags:
        size = {3: 2, 4: 4, 16: 8}[int(tag.dtype)]
        for n in np.flatnonzero(np.tile(empty, 3 if planes else 1)).tolist():
            place = tag.valueoffset + n * size
            raw[place : place + size] = bytes(size)
    return bytes(raw)


def turned(kind: str) -> bytes:
    """A picture with the orientation "turn by 90 degrees"."""
    exif = Image.Exif()
    exif[274] = 6
    return by_pillow(Image.fromarray(CELLS * np.uint8(255)), kind, exif=exif)


def with_tag(number: int, code: str, value: Any, **options: Any) -> bytes:
    return by_tifffile(LABELS, extratags=[(number, code, 1, value, True)], **options)


BITS = INSIDE * np.uint8(255)
FILES: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: encoded(".png", LABELS),
    "PNG of 1 bit": lambda: by_pillow(Image.fromarray(INSIDE), "PNG"),
    "PNG of 2 bits": lambda: by_pillow(Image.fromarray(LABELS), "PNG", bits=2),
    "PNG of 16 bits": lambda: encoded(".png", LABELS.astype(np.uint16)),
    "PNG, RGB": lambda: encoded(".png", COLOURS[LABELS]),
    "PNG, RGB of 16 bits": lambda: encoded(".png", (COLOURS[LABELS] > 0).astype(np.uint16)),
    "PNG, RGBA of 16 bits": lambda: encoded(".png", rgba().astype(np.uint16)),
    "PNG, RGBA": lambda: encoded(".png", rgba()),
    "PNG, RGBA, transparent": lambda: encoded(".png", WHITE_OUTSIDE),
    "PNG, grey and alpha": lambda: by_pillow(Image.fromarray(ARRAYS["grey, opaque"]), "PNG"),
    "PNG, colour key": lambda: by_pillow(Image.fromarray(LABELS + np.uint8(1)), "PNG", transparency=1),
    "PNG of 16 bits, colour key": lambda: png16(3),
    "PNG, palette": palette,
    "PNG, turned by EXIF": lambda: turned("PNG"),
    "GIF": lambda: palette("GIF"),
    "BMP": lambda: encoded(".bmp", LABELS),
    "BMP, RGB": lambda: encoded(".bmp", COLOURS[LABELS]),
    "WebP": lambda: by_pillow(Image.fromarray(COLOURS[LABELS]), "WebP", lossless=True),
    "WebP, lossy": lambda: by_pillow(Image.fromarray(BITS).convert("RGB"), "WebP", quality=95),
    "JPEG": lambda: by_pillow(Image.fromarray(BITS), "JPEG", quality=75),
    "JPEG, RGB": lambda: by_pillow(Image.fromarray(BITS).convert("RGB"), "JPEG", quality=80),
    "JPEG, turned by EXIF": lambda: turned("JPEG"),
    "TIFF of 16 bits, LZW": lambda: by_tifffile(LABELS.astype(np.uint16), compression="lzw", predictor=True),
    "TIFF, big-endian": lambda: by_tifffile(LABELS.astype(">u4"), byteorder=">"),
    "TIFF of floats": lambda: by_tifffile(NAN.astype(np.float32), compression="zstd"),
    "TIFF of doubles": lambda: by_tifffile(NAN, compression="deflate", predictor=True),
    "TIFF, negative outside": lambda: by_tifffile(ARRAYS["negative outside"]),
    "TIFF of 1 bit": lambda: by_tifffile(INSIDE, tile=(16, 16)),
    "TIFF of 1 bit by Pillow": lambda: by_pillow(Image.fromarray(INSIDE), "TIFF"),
    "TIFF of 1 bit by Pillow, fax": lambda: by_pillow(Image.fromarray(INSIDE), "TIFF", compression="group4"),
    "TIFF, white is 0": lambda: by_tifffile(np.uint8(255) - LABELS, photometric="miniswhite"),
    "TIFF of 16 bits, white is 0": lambda: by_tifffile(
        np.uint16(65535) - LABELS.astype(np.uint16), photometric="miniswhite"
    ),
    "TIFF, palette": lambda: by_tifffile(
        LABELS, photometric="palette", colormap=np.pad(COLOURS.T.astype(np.uint16) * 257, ((0, 0), (0, 253)))
    ),
    "TIFF, RGBA": lambda: by_tifffile(rgba(), photometric="rgb", extrasamples=["unassalpha"]),
    "TIFF, RGBA by Pillow": lambda: by_pillow(Image.fromarray(WHITE_OUTSIDE), "TIFF"),
    "TIFF, grey and alpha": lambda: by_pillow(Image.fromarray(ARRAYS["grey and alpha"]), "TIFF"),
    "TIFF, planes": lambda: by_tifffile(
        np.moveaxis(COLOURS[LABELS], -1, 0), planarconfig="separate", photometric="rgb"
    ),
    "TIFF, tiled JPEG": lambda: by_tifffile(
        np.repeat(BITS[..., None], 3, 2), tile=(32, 32), photometric="rgb", compression="jpeg"
    ),
    "TIFF, sparse": sparse,
    "TIFF, sparse, compressed": lambda: sparse(compression="zlib"),
    "TIFF, sparse, planes": lambda: sparse(planes=True),
    "TIFF, sparse, BigTIFF": lambda: sparse(bigtiff=True),
    "TIFF, sparse, white is 0": lambda: sparse(white=True),
    "TIFF, BigTIFF": lambda: by_tifffile(LABELS, bigtiff=True, tile=(32, 32)),
    "TIFF, pyramid": pyramid,
    "OME-TIFF": lambda: by_tifffile(LABELS, ome=True, metadata={"axes": "YX"}),
    "ImageJ": lambda: by_tifffile(LABELS, imagej=True),
    "TIFF, orientation 6": lambda: with_tag(274, "H", 6),
    "TIFF, no data is 0": lambda: with_tag(42113, "s", "0"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_of_all_kinds_say_the_same(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "mask"
    path.write_bytes(FILES[kind]())
    found = read_mask(path)
    assert found.dtype == np.bool_
    assert found.shape == INSIDE.shape
    assert np.array_equal(found, INSIDE)


def test_missing_tiles_and_values_without_data_are_not_wanted_whatever_they_are_filled_with(tmp_path: Path) -> None:
    path = tmp_path / "mask.tif"
    path.write_bytes(sparse(extratags=[(42113, "s", 0, "255", True)]))  # tifffile fills with 255
    assert np.array_equal(read_mask(path), INSIDE)
    path.write_bytes(by_tifffile(np.where(INSIDE, 1, 9999).astype("f4"), extratags=[(42113, "s", 0, "9999", True)]))
    assert np.array_equal(read_mask(path), INSIDE)


def picture(levels: NDArray[Any], **options: Any) -> bytes:
    return by_pillow(Image.fromarray(levels.astype(np.uint8)), "JPEG", **options)


def white_index() -> bytes:
    """A palette in which 0 is white and 1 is black: by its index and by its colour it says the opposite."""
    image = Image.fromarray(CELLS)
    image.putpalette([255, 255, 255, 0, 0, 0])
    return by_pillow(image, "PNG")


def two_pages(second: NDArray[Any]) -> bytes:
    data = io.BytesIO()
    with tifffile.TiffWriter(data) as tif:
        tif.write(LABELS, metadata=None)
        tif.write(second, metadata=None)
    return data.getvalue()


def frames() -> bytes:
    pages = [Image.fromarray(BITS).convert("RGB"), Image.new("RGB", (90, 70))]
    return by_pillow(pages[0], "GIF", save_all=True, append_images=pages[1:])


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "labels as JPEG": (lambda: picture(LABELS), "compressed with losses.*save it as PNG"),
    "dark labels as JPEG": (lambda: picture(LABELS * 30), "compressed with losses"),
    "dark and bright labels as JPEG": (lambda: picture((LABELS == 1) * 255 + (LABELS == 2) * 40), "with losses"),
    "labels as JPEG in TIFF": (lambda: by_tifffile(LABELS, compression="jpeg", tile=(16, 16)), "with losses"),
    "white at index 0": (white_index, "palette in which index 0 is not black"),
    "two pictures": (lambda: two_pages(LABELS[::-1]), "has 2 pictures, and nothing says which"),
    "another shape beside it": (lambda: two_pages(LABELS[:30, :80]), "has 2 pictures"),
    "a stack of ImageJ": (lambda: by_tifffile(np.stack([LABELS] * 3), imagej=True), "has 3 pictures"),
    "frames": (frames, "has 2 pictures"),
    "CMYK": (lambda: by_pillow(Image.new("CMYK", (90, 70)), "JPEG"), "colours of kind CMYK"),
    "CMYK in TIFF": (lambda: by_pillow(Image.new("CMYK", (90, 70)), "TIFF"), "colours of kind SEPARATED"),
    "Lab": (lambda: by_pillow(Image.new("LAB", (90, 70)), "TIFF"), "colours of kind CIELAB"),
    "channels": (
        lambda: by_tifffile(np.zeros((20, 30, 5), np.uint8), photometric="minisblack", planarconfig="contig"),
        "5 channels",
    ),
    "two channels": (
        lambda: by_tifffile(np.ones((20, 30, 2), np.uint8), photometric="minisblack", planarconfig="contig"),
        "neither colours nor alpha",
    ),
    "alpha alone": (
        lambda: encoded(".png", np.dstack([np.zeros((70, 90, 3), np.uint8), BITS])),
        "differs in alpha alone",
    ),
    "a fourth channel without a name": (
        lambda: by_tifffile(np.dstack([BITS] * 4), photometric="rgb", extrasamples=["unspecified"]),
        "fourth channel, which may be alpha or not",
    ),
    "below 0 alone": (lambda: by_tifffile(-LABELS.astype(np.int8)), "below 0 and no value above 0"),
    "cut PNG": (lambda: encoded(".png", RNG.integers(0, 9, (70, 90)).astype(np.uint8))[:-900], "damaged"),
    "cut JPEG": (lambda: picture(RNG.integers(0, 255, (70, 90)))[:-900], "damaged"),
    "cut TIFF": (lambda: by_tifffile(LABELS)[:-900], "truncated"),
    "text": (lambda: b"x0 y0\n1 1\n", "is not an image"),
    "nothing": (lambda: b"", "is not an image"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_mask_that_may_mean_something_else_is_refused(kind: str, tmp_path: Path) -> None:
    make, said = REFUSED[kind]
    (tmp_path / "given").write_bytes(make())
    with pytest.raises(CallError, match=f"(?s)given.*{said}"):
        read_mask(tmp_path / "given")


def test_a_level_is_read_of_a_pyramid_that_is_too_large_and_other_large_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyramid.tif").write_bytes(pyramid())
    (tmp_path / "mask.png").write_bytes(encoded(".png", LABELS))
    monkeypatch.setattr(image_file, "GOOD_PIXELS", 70 * 90 // 4)
    assert np.array_equal(read_mask(tmp_path / "pyramid.tif"), INSIDE[::2, ::2])
    monkeypatch.setattr(image_file, "MOST_PIXELS", 70 * 90 - 1)
    with pytest.raises(CallError, match=r"has 90 x 70 pixels, more than 6,299: save it smaller"):
        read_mask(tmp_path / "mask.png")


@pytest.mark.parametrize("kind", ["TIFF, sparse", "TIFF of 16 bits, LZW", "TIFF, pyramid"])
def test_a_slide_as_a_mask_is_its_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "mask.tif"
    path.write_bytes(FILES[kind]())
    assert np.array_equal(dfx.open_slide(path).as_mask(), INSIDE)
    grid = dfx.PatchGrid.over(Bare((900, 700)), shape=10, resolution=1.0, units="baseline", mask=dfx.open_slide(path))
    assert len(grid) == INSIDE.sum()


# Slides with bounds

BOUNDS = (300, 200, 400, 300)
SQUARE = np.array([[0, 0], [100, 0], [100, 50], [0, 50]])


def at(x: float, y: float, factor: float = 1) -> dict[str, Any]:
    return {"type": "Polygon", "coordinates": [(SQUARE * factor + (x, y)).tolist()]}


def corners(mask: Any, origin: Any = None, **given: Any) -> list[tuple[int, int]]:
    bare = Bare((1000, 800), **({"bounds": BOUNDS} | given))
    grid = dfx.PatchGrid.over(
        bare, shape=50, resolution=1.0, units="baseline", mask=mask, mask_origin=origin, min_mask_ratio=0.5
    )
    return sorted(map(tuple, grid.coordinates[:, :2].tolist()))


@pytest.mark.parametrize("kind", ["mapping", "file"])
def test_polygons_count_from_the_corner_that_is_asked_for(kind: str, tmp_path: Path) -> None:
    both: Any = at(350, 250)  # in the bounds, whichever corner it counts from
    certain: list[Any] = [
        at(50, 50),
        at(600, 450),
    ]  # in the bounds when counted from their corner, and from the slide's
    if kind == "file":
        for n, drawn in enumerate(given := [both, *certain]):
            (tmp_path / f"{n}.geojson").write_text(json.dumps(drawn))
        both, *certain = (tmp_path / f"{n}.geojson" for n in range(len(given)))
    from_slide, from_bounds = [(350, 250), (400, 250)], [(650, 450), (700, 450)]
    assert corners(both, "slide") == from_slide
    assert corners(both, "bounds") == from_bounds
    with pytest.raises(CallError, match=r"begin at \(300, 200\): pass mask_origin='bounds'.*or mask_origin='slide'"):
        corners(both)
    assert corners(certain[0]) == [(350, 250), (400, 250)]
    assert corners(certain[1]) == [(600, 450), (650, 450)]
    for bounds in (None, (0, 0, 400, 300)):  # the same corner, whatever is asked for
        assert corners(both, bounds=bounds) == corners(both, "bounds", bounds=bounds) == from_slide


def test_images_cover_what_is_asked_for(tmp_path: Path) -> None:
    cells = np.zeros((6, 8), bool)
    cells[1, 2:4] = True
    expected = [(400, 250), (450, 250)]  # 50 pixels per cell, from (300, 200)
    np.save(tmp_path / "mask.npy", cells)
    for mask in (cells, tmp_path / "mask.npy"):
        assert corners(mask, "bounds") == expected
    whole = np.zeros((16, 20), bool)
    whole[5, 8:10] = True
    assert corners(whole) == corners(whole, "slide") == expected
    wide = np.zeros((8, 8), bool)
    wide[0, 0] = True
    flat = {"bounds": (0, 0, 800, 800)}
    with pytest.raises(CallError, match="the shape of the slide's bounds"):
        corners(wide, **flat)
    assert corners(wide, "bounds", **flat) == [(0, 0), (0, 50), (50, 0), (50, 50)]
    with pytest.raises(CallError, match="mask_origin must be"):
        corners(cells, "qupath")


def test_no_cell_of_a_mask_of_the_bounds_is_lost_on_the_slide() -> None:
    cells = np.zeros((70, 90), bool)
    for n in range(90):
        cells[:] = False
        cells[n % 70, n] = True
        bare = Bare((1000, 803), bounds=(301, 207, 397, 305))
        grid = dfx.PatchGrid.over(bare, shape=10, resolution=1.0, units="baseline", mask=cells, mask_origin="bounds")
        x, y = grid.coordinates[:, :2].mean(axis=0) + 5
        assert abs(x - (301 + (n + 0.5) * 397 / 90)) < 12
        assert abs(y - (207 + (n % 70 + 0.5) * 305 / 70)) < 12


def test_bounds_of_a_leica_slide_are_those_of_openslide(leica: Path) -> None:
    import openslide

    slide = dfx.open_slide(leica)
    with openslide.OpenSlide(leica) as other:
        names = ("x", "y", "width", "height")
        assert slide.bounds == tuple(int(other.properties[f"openslide.bounds-{name}"]) for name in names)
    assert dfx.open_slide(leica, backend="openslide").bounds == slide.bounds


def test_a_run_asks_for_the_origin_of_polygons(
    leica: Path, extractor: dfx.DeepFeatureExtractor, tmp_path: Path
) -> None:
    options = WSI | {"output_type": "dict", "input_resolutions": [{"resolution": 1.0, "units": "baseline"}]}
    (x, y, *_), drawn = dfx.open_slide(leica).bounds, at(128, 64, 2)  # type: ignore[misc]
    (tmp_path / "drawn.geojson").write_text(json.dumps(at(384, 256)))
    with pytest.raises(dfx.RunError, match="mask_origin="):
        extractor.run([leica], masks=[tmp_path / "drawn.geojson"], **options)
    got: Any = extractor.run([leica], masks=[drawn], mask_origin="bounds", min_mask_ratio=0.9, **options)
    assert got[leica]["coordinates"][:, :2].min(axis=0).tolist() == [x + 128, y + 64]
    kept: Any = extractor.run([leica], masks=[drawn], mask_origin="bounds", save_dir=tmp_path, **options | WSI)
    mask = dfx.open_features(kept[leica]).mask
    assert mask is not None
    assert mask.method == "GeoJSON, from the corner of the bounds"


@pytest.fixture
def leica(tmp_path: Path) -> Path:
    """A Leica SCN: a glass of 1,536 x 1,280 pixels and an area of 768 x 640 at (384, 256)."""
    nm = 500
    area = RNG.integers(100, 250, (640, 768, 3)).astype(np.uint8)
    levels = [area, area[::4, ::4]]
    dimensions = "".join(
        f'<dimension sizeX="{a.shape[1]}" sizeY="{a.shape[0]}" r="{r}" ifd="{r}"/>' for r, a in enumerate(levels)
    )
    xml = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        f'<collection name="c" uuid="urn:uuid:0" sizeX="{1536 * nm}" sizeY="{1280 * nm}"><image name="i" uuid="urn:1">'
        f'<pixels sizeX="768" sizeY="640">{dimensions}</pixels><view sizeX="{768 * nm}" sizeY="{640 * nm}" '
        f'offsetX="{384 * nm}" offsetY="{256 * nm}" spacingZ="0"/><scanSettings><objectiveSettings><objective>20'
        "</objective></objectiveSettings><illuminationSettings><illuminationSource>brightfield</illuminationSource>"
        "</illuminationSettings></scanSettings></image></collection></scn>"
    )
    path = tmp_path / "slide.scn"
    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        for n, level in enumerate(levels):
            tif.write(
                level,
                tile=(128, 128),
                photometric="rgb",
                compression="jpeg",
                description=xml if n == 0 else None,
                resolution=(1e7 / nm / 4**n, 1e7 / nm / 4**n),
                resolutionunit="CENTIMETER",
                subfiletype=0 if n == 0 else 1,
                metadata=None,
            )
    return path
