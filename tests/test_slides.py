"""Slides: facts and pixels of every file that a trap was met in, against tifffile and OpenSlide."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import dask
import numpy as np
import pytest
import tifffile
from conftest import DATA, shared
from numpy.typing import NDArray

import dfx
from dfx.errors import SlideError
from dfx.slides.cache import OPENED
from dfx.slides.level import as_rgb
from dfx.slides.slide import Slide

EXPECTED: dict[str, dict[str, Any]] = {}
if (DATA / "slides/synthetic/expect.json").exists():
    EXPECTED = {e["name"]: e["expect"] for e in json.loads((DATA / "slides/synthetic/expect.json").read_text())}
STITCHED = ["syn_trestle_overlap.tif", "syn_ventana_overlap.bif"]
GOOD = sorted(name for name, e in EXPECTED.items() if ("levels" in e or "areas" in e) and name not in STITCHED)
BAD = sorted(name for name, e in EXPECTED.items() if "open" in e)


def decoded(slide: Slide, n: int) -> NDArray[Any]:
    return np.asarray(slide.level(n).compute(scheduler="sync"))


# Facts


@pytest.mark.parametrize("name", GOOD)
def test_the_facts_of_a_slide_are_found(name: str) -> None:
    want, slide = EXPECTED[name], dfx.open_slide(shared(f"slides/synthetic/{name}"))
    if "levels" in want:
        assert [list(level.dimensions) for level in slide.levels] == want["levels"]
    if "mpp" in want:
        assert slide.mpp == (None if want["mpp"] is None else pytest.approx((want["mpp"],) * 2))
    if "power" in want:
        assert slide.power == want["power"]
    if "vendor" in want:
        assert slide.vendor == want["vendor"]
    assert slide.levels[0].channels == want.get("channels", 3)
    assert str(slide.levels[0].dtype) == want.get("dtype", "uint8")


@pytest.mark.parametrize("name", BAD)
def test_a_broken_file_is_refused_with_its_name_and_a_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shared(f"slides/synthetic/{name}")
    monkeypatch.setattr("dfx.slides.open_openslide", pytest.fail)  # what is damaged is no other reader's
    with pytest.raises(SlideError) as caught:
        dfx.open_slide(path)
    assert name in str(caught.value)
    assert "copy" in str(caught.value) or "convert" in str(caught.value)


@pytest.mark.parametrize("name", STITCHED)
def test_overlapping_tiles_are_refused_rather_than_misplaced(name: str) -> None:
    with pytest.raises(SlideError, match=r"overlap.*pip install dfx\[openslide\]"):
        dfx.open_slide(shared(f"slides/synthetic/{name}"), backend="tiff")


@pytest.mark.parametrize(
    ("name", "tile"), [("bad_tile_bytes.svs", 5), ("bad_tile_offset.svs", 7), ("bad_tile_cut.svs", 9)]
)
def test_a_bad_tile_is_named_and_the_others_are_read(name: str, tile: int) -> None:
    slide = dfx.open_slide(shared(f"slides/synthetic/{name}"))
    good = dfx.open_slide(shared("slides/synthetic/good.svs"))
    with pytest.raises(SlideError, match=rf"tile {tile} \(row {tile // 4}, column {tile % 4}\) of level 0 .*{name}"):
        decoded(slide, 0)
    assert np.array_equal(decoded(slide, 1), decoded(good, 1))
    row = slide.region(0, (tile // 4 * 256, 0, tile // 4 * 256 + 1, tile % 4 * 256), rgb=True)
    assert np.array_equal(row, decoded(good, 0)[tile // 4 * 256, None, : tile % 4 * 256])


# Pixels


def oracle_openslide(path: Path, slide: Slide, n: int) -> NDArray[Any] | None:
    """The level by OpenSlide over white, None where OpenSlide can't say."""
    import openslide

    try:
        other = openslide.OpenSlide(path)
        level = other.level_dimensions.index(slide.levels[n].dimensions)
        rgba = np.asarray(other.read_region((0, 0), level, slide.levels[n].dimensions)).astype(int)
    except (openslide.OpenSlideError, ValueError):
        return None
    alpha = rgba[..., 3:]
    return (rgba[..., :3] * alpha + (255 - alpha) * 255) // 255


def oracle_tifffile(path: Path, n: int) -> NDArray[Any] | None:
    """The level by tifffile's own whole-image decoding of its main series."""
    with tifffile.TiffFile(path) as tif:
        series = tif.series[0]
        if n >= len(series.levels):
            return None
        image = series.levels[n].asarray()
        axes = series.levels[n].axes
    if axes in ("CYX", "SYX"):
        return np.moveaxis(image, 0, -1)
    return image[..., None] if axes == "YX" else image


ONE_ORACLE_KNOWS_BETTER = {  # each with what is right
    "syn_aperio_missing_tiles.svs": "OpenSlide leaves holes in level 1 where level 0 has none to offer",
    "syn_aperio_zstack.svs": "both oracles give another focal plane",
}
EVERY = [
    *(f"slides/synthetic/{name}" for name in GOOD if name not in ONE_ORACLE_KNOWS_BETTER),
    *(
        f"slides/{name}"
        for name in ("CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs", "kidney-48-5.tif", "real/BigTIFF.tif")
    ),
    *(
        f"slides/real/{name}"
        for name in (
            "boxes.tiff",
            "image_geos.tif",
            "multi-channel.ome.tif",
            "quad-tile.jpg.tiff",
            "small.svs",
            "😐.svs",
            "test3-DAPI-2-(387).ndpi",
            "usda_naip_256_webp_z3.tif",
        )
    ),
]


@pytest.mark.parametrize("name", EVERY)
def test_the_pixels_of_every_level_are_those_of_another_reader(name: str) -> None:
    path = shared(name)
    slide = dfx.open_slide(path)
    compared = 0
    for n, level in enumerate(slide.levels):
        pixels = decoded(slide, n)
        assert pixels.shape == (*level.shape_yx, level.channels)
        theirs = oracle_openslide(path, slide, n) if level.dtype == np.uint8 else None
        if theirs is not None:
            ours = as_rgb(pixels, level.colour)
            off = np.abs(ours.astype(int) - theirs).max()
            assert off <= (1 if "ycc" in name else 0), (n, off)  # conversions from YCbCr round differently
        else:
            theirs = oracle_tifffile(path, n)
            if theirs is None:
                continue
            assert np.array_equal(pixels, theirs), n
        compared += 1
    assert compared, "no oracle could read any level"


def test_missing_tiles_of_the_baseline_are_white_and_the_level_below_shows_them_as_openslide_does() -> None:
    slide = dfx.open_slide(shared("slides/synthetic/syn_aperio_missing_tiles.svs"))
    whole = dfx.open_slide(shared("slides/synthetic/syn_aperio_jpeg.svs"))
    want = decoded(whole, 0).copy()
    for tile in EXPECTED["syn_aperio_missing_tiles.svs"]["missing"]:
        row, column = divmod(tile, 7)
        want[row * 256 : row * 256 + 256, column * 256 : column * 256 + 256] = 255
    assert np.array_equal(decoded(slide, 0), want)
    # Tiles of the level below that cover a missing tile are drawn from the baseline, white included; others are stored.
    below, stored = decoded(slide, 1).astype(int), decoded(whole, 1).astype(int)
    drawn = cv2.resize(want, below.shape[1::-1], interpolation=cv2.INTER_AREA).astype(int)
    for top in range(0, below.shape[0], 256):
        for left in range(0, below.shape[1], 256):
            at = slice(top, top + 256), slice(left, left + 256)
            as_stored, as_drawn = np.array_equal(below[at], stored[at]), np.abs(below[at] - drawn[at]).max() <= 1
            assert as_stored or as_drawn
    assert any("are drawn from level 0" in note for note in slide.notes)


def test_the_middle_focal_plane_is_read_and_said() -> None:
    path = shared("slides/synthetic/syn_aperio_zstack.svs")
    slide = dfx.open_slide(path)
    with tifffile.TiffFile(path) as tif:
        planes = [p.asarray() for p in tif.pages if p.shape == (800, 1000, 3)]
    assert np.array_equal(decoded(slide, 0), planes[1])
    assert not np.array_equal(planes[0], planes[1])
    assert any("focal planes" in note for note in slide.notes)


def test_areas_of_a_leica_slide_lie_where_they_lie_on_the_glass() -> None:
    slide = dfx.open_slide(shared("slides/synthetic/syn_leica_two_areas.scn"))
    pixels = decoded(slide, 0)
    assert pixels.shape == (3072, 4096, 3)
    assert (pixels[:256] == 255).all()  # glass between and around
    assert (pixels[256:1024, 512:1536] != 255).any()


def save(path: Path, image: NDArray[Any], **options: Any) -> Path:
    tifffile.imwrite(path, image, tile=(64, 64), metadata=None, **options)
    return path


@pytest.fixture(scope="module")
def picture() -> NDArray[np.uint8]:
    """Smooth enough for lossy codecs to come close."""
    y, x = np.mgrid[0:200, 0:300]
    return np.stack([(x * 0.8) % 256, (y * 1.2) % 256, (x + y) * 0.5], axis=2).astype(np.uint8)


CODECS = ["none", "lzw", "zlib", "zstd", "jpeg", "jpeg2000", "webp", "jpegxl", "jpegxr"]


@pytest.mark.parametrize("codec", CODECS)
def test_a_tile_cut_short_is_an_error_and_never_grey(codec: str, picture: NDArray[np.uint8], tmp_path: Path) -> None:
    path = save(
        tmp_path / f"{codec}.tif",
        picture,
        photometric="rgb",
        compression=None if codec == "none" else codec,
        compressionargs={"lossless": True} if codec in ("webp", "jpegxl") else None,
    )
    whole = dfx.open_slide(path)
    want = decoded(whole, 0)
    assert np.abs(want.astype(int) - picture).max() <= (40 if codec == "jpeg" else 8)
    part = whole.levels[0].parts[0]
    offset, count = int(part.offsets[0, 1, 1]), int(part.counts[0, 1, 1])
    for kept in (count // 3, count // 2, count - 40):
        cut = tmp_path / f"cut{kept}.tif"
        data = bytearray(path.read_bytes())
        if codec in ("none", "jpegxr"):  # any bytes are pixels there: what can be noticed is that some are missing
            with tifffile.TiffFile(path) as tif:
                tag = tif.pages[0].tags[325]
                order = tif.byteorder
            index = 1 * part.counts.shape[2] + 1
            size = tag.dtype_name if hasattr(tag, "dtype_name") else tag.dtype.name
            width = {"SHORT": ("H", 2), "LONG": ("I", 4), "LONG8": ("Q", 8)}[size]
            struct.pack_into(order + width[0], data, tag.valueoffset + index * width[1], kept)
        else:
            data[offset + kept : offset + count] = bytes(count - kept)
        cut.write_bytes(data)
        slide = dfx.open_slide(cut)
        with pytest.raises(SlideError, match=r"tile \d+ \(row 1, column 1\) of level 0"):
            decoded(slide, 0)


def test_white_is_zero_and_palettes_become_what_they_mean(tmp_path: Path) -> None:
    grey = np.arange(128 * 128, dtype=np.uint32).reshape(128, 128).astype(np.uint8)
    slide = dfx.open_slide(save(tmp_path / "miniswhite.tif", grey, photometric="miniswhite"))
    assert np.array_equal(decoded(slide, 0)[..., 0], 255 - grey)
    table = np.random.default_rng(0).integers(0, 256, (3, 256)).astype(np.uint16) * 257
    slide = dfx.open_slide(save(tmp_path / "palette.tif", grey, photometric="palette", colormap=table))
    assert np.array_equal(decoded(slide, 0), (table >> 8).astype(np.uint8).T[grey])
    assert slide.levels[0].colour == "rgb"


@pytest.mark.parametrize(("extra", "colour"), [("unassalpha", "rgba"), ("assocalpha", "rgba-associated")])
def test_alpha_is_laid_over_white(extra: str, colour: str, tmp_path: Path) -> None:
    rgba = np.random.default_rng(1).integers(0, 256, (64, 64, 4)).astype(np.uint8)
    if extra == "assocalpha":
        rgba[..., :3] = np.minimum(rgba[..., :3], rgba[..., 3:])
    slide = dfx.open_slide(save(tmp_path / "a.tif", rgba, photometric="rgb", extrasamples=[extra]))
    assert slide.levels[0].colour == colour
    alpha = rgba[..., 3:] / 255.0
    want = rgba[..., :3] * (alpha if extra == "unassalpha" else 1) + 255 * (1 - alpha)
    assert np.abs(slide.region(0, (0, 0, 64, 64), rgb=True) - want).max() <= 1


@pytest.mark.parametrize("kind", ["uint16", "two channels", "cielab", "ycbcr without JPEG"])
def test_channels_that_are_no_colours_can_be_read_but_not_taken_for_a_picture(kind: str, tmp_path: Path) -> None:
    shape, dtype, options = {
        "uint16": ((64, 64, 3), np.uint16, {"photometric": "rgb"}),
        "two channels": ((64, 64, 2), np.uint8, {"photometric": "minisblack", "planarconfig": "contig"}),
        "cielab": ((64, 64, 3), np.uint8, {"photometric": "cielab"}),
        "ycbcr without JPEG": ((64, 64, 3), np.uint8, {"photometric": "ycbcr"}),
    }[kind]
    slide = dfx.open_slide(save(tmp_path / "x.tif", np.ones(shape, dtype), **options))  # type: ignore[arg-type]
    assert decoded(slide, 0).shape[:2] == (64, 64)
    with pytest.raises(SlideError, match="not 8-bit grey, RGB or RGBA"):
        slide.thumbnail()
    with pytest.raises(SlideError, match="not 8-bit grey, RGB or RGBA"):
        dfx.patches(slide, dfx.PatchGrid.over(slide, resolution=1, units="baseline", mask=None))


def test_two_images_of_one_size_are_not_guessed_between(tmp_path: Path) -> None:
    image = np.zeros((128, 128, 3), np.uint8)
    with tifffile.TiffWriter(tmp_path / "two.tif") as out:
        for _ in range(2):
            out.write(image, tile=(64, 64), photometric="rgb", metadata=None)
    with pytest.raises(SlideError, match="2 images of 128 x 128"):
        dfx.open_slide(tmp_path / "two.tif")


def test_one_huge_strip_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "strip.tif"
    tifffile.imwrite(
        path, shape=(20_000, 20_000, 3), dtype=np.uint8, photometric="rgb", rowsperstrip=20_000, metadata=None
    )
    with pytest.raises(SlideError, match=r"20000 x 20000 pixels.*tiled pyramid"):
        dfx.open_slide(path)


# Metadata given by the user


def test_overrides_go_before_the_file_and_imply_nothing(made_slide: Path) -> None:
    slide = dfx.open_slide(made_slide)
    assert slide.mpp == (0.5, 0.5)
    assert slide.power == 20
    assert dfx.open_slide(made_slide, mpp=0.25).mpp == (0.25, 0.25)
    assert dfx.open_slide(made_slide, mpp=(0.25, 0.5)).mpp == (0.25, 0.5)
    assert dfx.open_slide(made_slide, mpp=0.25).power == 20
    assert dfx.open_slide(str(made_slide), power=40).power == 40


@pytest.mark.parametrize("mpp", [0, -1, float("nan"), float("inf"), "0.5", True, (1, 2, 3), [0.5, None]])
def test_metadata_that_can_not_be_is_refused(made_slide: Path, mpp: Any) -> None:
    with pytest.raises((dfx.CallError, dfx.CallTypeError), match="mpp must be"):
        dfx.open_slide(made_slide, mpp=mpp)


@pytest.mark.parametrize("dpi", [72, 96, 300])
def test_a_default_resolution_is_not_believed(dpi: int, tmp_path: Path, picture: NDArray[np.uint8]) -> None:
    path = save(tmp_path / "d.tif", picture, photometric="rgb", resolution=(dpi, dpi), resolutionunit="inch")
    assert dfx.open_slide(path).mpp is None


# Files


def test_what_is_no_slide_is_refused_by_name(tmp_path: Path, made_slide: Path) -> None:
    (tmp_path / "text.svs").write_text("not a slide, whatever its name says " * 20)
    (tmp_path / "empty.svs").touch()
    (tmp_path / "cut.svs").write_bytes(made_slide.read_bytes()[: made_slide.stat().st_size // 2])
    for name in ("text.svs", "empty.svs", "cut.svs", "missing.svs", "."):
        with pytest.raises(SlideError) as caught:
            dfx.open_slide(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(SlideError, match="does not exist"):
        dfx.open_slide("memory://nowhere/slide.svs")
    with pytest.raises(dfx.CallTypeError):
        dfx.open_slide(7)  # type: ignore[arg-type]


def test_a_slide_pickles_to_its_address_and_reads_the_same(slide: dfx.Slide) -> None:
    data = pickle.dumps(slide)
    assert len(data) < 600
    OPENED.clear()
    again = pickle.loads(data)
    assert np.array_equal(decoded(again, 1), decoded(slide, 1))
    assert pickle.loads(data) is again  # a process opens a slide once


def test_a_slide_that_changed_is_not_read_on(made_slide: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.svs"
    shutil.copy(made_slide, copy)
    data = pickle.dumps(dfx.open_slide(copy))
    with copy.open("r+b") as file:
        file.seek(5000)
        file.write(b"changed")
    OPENED.clear()
    with pytest.raises(SlideError, match="changed since it was opened"):
        pickle.loads(data)


def test_a_file_that_differs_in_its_middle_only_is_not_taken_for_the_other(made_slide: Path, tmp_path: Path) -> None:
    whole = dfx.open_slide(made_slide)
    part = whole.levels[0].parts[0]
    pixels = decoded(whole, 0)
    data = bytearray(made_slide.read_bytes())
    (one, two), counts = part.offsets[0, 2, 2:4].tolist(), part.counts[0, 2, 2:4].tolist()
    assert min(one, two) > 65_536
    assert max(one, two) + max(counts) < len(data) - 65_536
    data[one : one + counts[0]] = bytes(counts[0])
    (tmp_path / "other.svs").write_bytes(data)
    other = dfx.open_slide(tmp_path / "other.svs")
    assert other.identity == whole.identity  # so nothing that was read may be known by that
    with pytest.raises(SlideError, match="tile 16"):
        decoded(other, 0)
    assert np.array_equal(decoded(whole, 0), pixels)


def test_threads_share_a_slide_and_read_the_right_bytes(slide: dfx.Slide, made_pixels: NDArray[np.uint8]) -> None:
    rng = np.random.default_rng(0)
    corners = rng.integers(0, [1100, 1400], (300, 2)).tolist()
    barrier = threading.Barrier(8)

    def look(i: int) -> bool:
        if i < 8:
            barrier.wait()
        y, x = corners[i]
        return np.array_equal(
            slide.region(0, (y, x, y + 100, x + 100), rgb=True), made_pixels[y : y + 100, x : x + 100]
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(look, range(len(corners))))


def test_files_are_closed_when_the_slide_is_gone(made_slide: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(50):
        dfx.open_slide(made_slide).thumbnail(32)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


# The lazy level


def test_a_level_is_lazy_and_chunked_in_whole_tiles(slide: dfx.Slide, made_pixels: NDArray[np.uint8]) -> None:
    level = slide.level(0)
    assert level.shape == made_pixels.shape
    assert all(size % 256 == 0 for axis in level.chunks[:2] for size in axis[:-1])
    with dask.config.set(scheduler="sync"):
        assert np.array_equal(level[5:900:7, 30:40].compute(), made_pixels[5:900:7, 30:40])
        assert np.array_equal(level[17, ::-3, 1].compute(), made_pixels[17, ::-3, 1])
        assert np.array_equal(level[[3, 999, 4]].compute(), made_pixels[[3, 999, 4]])
        assert level[5:5].compute().shape == (0, 1600, 3)
    with pytest.raises(dfx.ResolutionError, match="levels 0 to 2"):
        slide.level(3)


def test_a_thumbnail_is_the_area_average(slide: dfx.Slide, made_pixels: NDArray[np.uint8]) -> None:
    thumbnail = slide.thumbnail(800)  # between level 0 and level 1, so made of level 0
    assert thumbnail.shape == (650, 800, 3)
    assert np.abs(thumbnail - made_pixels.reshape(650, 2, 800, 2, 3).mean((1, 3))).max() <= 0.5


def test_a_large_thumbnail_is_made_in_bands_that_meet(
    slide: dfx.Slide, made_pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = slide.picture(slide.view(0.5, "baseline"))
    monkeypatch.setattr("dfx.slides.slide.MOST_THUMBNAIL_PIXELS", 2**18)
    banded = slide.picture(slide.view(0.5, "baseline"))
    assert np.abs(whole.astype(int) - banded).max() <= 1


def test_tissue_is_where_the_tissue_is(slide: dfx.Slide) -> None:
    mask = slide.tissue_mask()
    thumbnail = slide.picture(slide.view(1.25, "power"))
    assert mask.shape == thumbnail.shape[:2] == (81, 100)
    assert 0.2 < mask.mean() < 0.9
    assert thumbnail[mask].mean() < thumbnail[~mask].mean() - 30
