"""Hamamatsu NDPI: levels of one focal plane, their true size, and pixels of the right tile or an error."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from hamamatsu import Page, Picture, jpeg, page, write_ndpi
from numpy.typing import NDArray
from PIL import Image

import dfx
from dfx.errors import SlideError, TileError


def picture(rows: int = 128, columns: int = 256, seed: int = 0) -> Picture:
    """Every run of it differs from every other."""
    small = np.random.default_rng(seed).integers(0, 256, (-(-rows // 8), -(-columns // 8), 3))
    return np.repeat(np.repeat(small, 8, 0), 8, 1)[:rows, :columns].astype(np.uint8)


def plain(colour: str, rows: int, columns: int) -> Picture:
    out = np.full((rows, columns, 3), 20, np.uint8)
    out[..., "rgb".index(colour)] = 220
    return out


def decoded(slide: dfx.Slide, n: int) -> NDArray[Any]:
    return np.asarray(slide.level(n).compute(scheduler="sync"))


# Focal planes

R, G, B = ("r", -4000), ("g", 0), ("b", 4000)
PLANES: dict[str, tuple[list[tuple[str, int, int]], str, int]] = {  # (colour, z, level) in the file; read; levels
    "plane after plane": ([(c, z, n) for c, z in (R, G, B) for n in (0, 1, 2)], "g", 3),
    "level after level, macro first": ([("m", 0, 0)] + [(c, z, n) for n in (2, 0, 1) for c, z in (B, R, G)], "g", 3),
    "none at 0": ([(c, z, n) for c, z in (("r", -3000), ("b", 5000)) for n in (0, 1)], "r", 2),
    "the plane at 0 has fewer levels": ([(*R, 0), (*R, 1), (*R, 2), (*G, 0), (*G, 2)], "g", 2),
    "the plane at 0 lacks the finest": ([(*G, 1), (*G, 2), (*B, 0), (*B, 1)], "b", 2),
    "one plane, not at 0": ([("b", 7000, 0), ("b", 7000, 1)], "b", 2),
}


@pytest.mark.parametrize("case", PLANES)
def test_levels_are_those_of_the_focal_plane_nearest_to_0(case: str, tmp_path: Path) -> None:
    written, colour, levels = PLANES[case]
    pages = []
    for c, z, n in written:
        if c == "m":
            pages += [page(plain("r", 128, 256), -1, z, None), page(plain("r", 64, 128), -2, z, None)]
        else:
            pages.append(page(plain(c, 128 >> n, 256 >> n), 20 / 2**n, z))
    slide = dfx.open_slide(write_ndpi(tmp_path / "s.ndpi", pages))
    assert len(slide.levels) == levels
    assert slide.dimensions == (256, 128)
    assert slide.mpp == pytest.approx((0.5, 0.5))
    assert slide.power == 20
    for n in range(levels):
        assert "rgb"[int(decoded(slide, n).reshape(-1, 3).mean(axis=0).argmax())] == colour
    assert any("focal planes; the plane at" in note for note in slide.notes) == (case != "one plane, not at 0")
    if case == "plane after plane":
        other = openslide.OpenSlide(tmp_path / "s.ndpi")
        assert np.array_equal(np.asarray(other.read_region((0, 0), 0, slide.dimensions))[..., :3], decoded(slide, 0))


def test_two_images_of_one_size_in_one_focal_plane_are_not_guessed_between(tmp_path: Path) -> None:
    pages = [page(picture(seed=n), 20, z) for n, z in enumerate((None, None, 500))]
    with pytest.raises(SlideError, match="several images of 256 x 128 pixels in one focal plane"):
        dfx.open_slide(write_ndpi(tmp_path / "s.ndpi", pages))


# Sizes and restart intervals


@pytest.mark.parametrize("size", [(127, 255), (130, 262), (0, 0), (128, 0)])
@pytest.mark.parametrize("run", [None, (8, 64)])
def test_a_level_has_the_size_of_its_jpeg(size: tuple[int, int], run: tuple[int, int] | None, tmp_path: Path) -> None:
    shape = size if all(size) else (128, 256)
    fine, coarse = picture(512, 1024), picture(*shape, seed=1)
    runs = run if run and shape[1] % run[1] == 0 else (8, -(-shape[1] // 8) * 8) if run else None
    level = page(coarse, 5, run_yx=runs)
    level = replace(level, size_yx=(128, 256), jpeg=level.jpeg.says(*size))
    slide = dfx.open_slide(write_ndpi(tmp_path / "s.ndpi", [page(fine, 20, run_yx=(8, 256)), level]))
    assert [level.shape_yx for level in slide.levels] == [(512, 1024), shape]
    assert np.abs(decoded(slide, 1).astype(int) - coarse).mean() < 3
    assert max(slide.thumbnail(200).shape) == 200
    grid = dfx.PatchGrid.over(slide, shape=64, resolution=2.0, units="mpp", mask=None)
    assert len(dfx.patches(slide, grid).compute(scheduler="sync"))


def test_a_level_too_long_for_a_jpeg_header_is_read(tmp_path: Path) -> None:
    fine = picture(16, 66_048)
    slide = dfx.open_slide(write_ndpi(tmp_path / "s.ndpi", [page(fine, 20, run_yx=(8, 2_064))]))
    assert slide.dimensions == (66_048, 16)
    assert np.abs(decoded(slide, 0).astype(int) - fine).mean() < 3
    without = replace(page(fine, 20, run_yx=(8, 2_064)), starts=None)
    with pytest.raises(SlideError, match=r"66048 x 16 pixels is one JPEG .* too large to read whole: convert"):
        dfx.open_slide(write_ndpi(tmp_path / "t.ndpi", [without]))


@pytest.mark.parametrize("subsampling", ["444", "422", "420"])
@pytest.mark.parametrize("run", [(16, 64), (16, 256), (32, 256), (48, 256), (16, 96), None])
def test_any_restart_interval_gives_the_pixels_of_the_whole_jpeg(
    run: tuple[int, int] | None, subsampling: str, tmp_path: Path
) -> None:
    if subsampling != "420" and run and run[1] < 256:
        run = 8, run[1]  # a run of less than a row is one unit high
    if run == (16, 96) or run == (8, 96):  # runs go from one row of units into the next
        kind = {"444": 0, "422": 1, "420": 2}[subsampling]
        made = write_ndpi(
            tmp_path / "s.ndpi", [by_pillow(picture(120, 250), subsampling=kind, restart_marker_blocks=5)]
        )
    else:
        made = write_ndpi(tmp_path / "s.ndpi", [page(picture(120, 250), 20, run_yx=run, subsampling=subsampling)])
    slide = dfx.open_slide(made)
    with tifffile.TiffFile(made) as tif:
        tags = tif.pages[0].tags
        data = made.read_bytes()[tags[273].value[0] :][: tags[279].value[0]]
    want = imagecodecs.jpeg8_decode(data)
    off = np.abs(decoded(slide, 0).astype(int) - want)
    assert off.max() == 0 if subsampling == "444" or run is None else off.mean() < 3  # chroma is smoothed in each tile
    if subsampling != "420" and run is not None and run[0] == 8 and run[1] == 64:
        full = write_ndpi(tmp_path / "f.ndpi", [page(picture(), 20, run_yx=run, subsampling=subsampling)])
        region = openslide.OpenSlide(full).read_region((0, 0), 0, (256, 128))  # it misplaces tiles where one is cut
        assert np.array_equal(np.asarray(region)[..., :3], decoded(dfx.open_slide(full), 0))


def by_pillow(image: Picture, **options: Any) -> Page:
    """A level as Pillow encodes it, with each restart marker listed."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=95, **options)
    data = out.getvalue()
    scan = data.index(b"\xff\xda")
    first = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
    starts = [first] + [n + 2 for n in range(first, len(data) - 1) if data[n] == 255 and 0xD0 <= data[n + 1] <= 0xD7]
    return Page(replace(jpeg(picture(8, 8), None), data=data, starts=starts), image.shape[:2], 20, 0, starts)


def test_a_progressive_level_is_read_whole(tmp_path: Path) -> None:
    made = by_pillow(picture(), subsampling=0, progressive=True, restart_marker_blocks=8)
    assert made.starts is not None
    made = replace(made, starts=made.starts[:128])  # as many as its runs, which are no tiles
    slide = dfx.open_slide(write_ndpi(tmp_path / "s.ndpi", [made]))
    assert slide.levels[0].tile_yx == (128, 256)
    assert np.abs(decoded(slide, 0).astype(int) - picture()).mean() < 3


# Restart markers

Spoil = Callable[[list[int]], list[int]]


def moved(starts: list[int], by: int) -> list[int]:
    return [s + by if 20 <= n < 30 else s for n, s in enumerate(starts)]


FAULTS: dict[str, Spoil] = {
    "some begin 40 bytes late": lambda s: moved(s, 40),
    "some begin 3 bytes early": lambda s: moved(s, -3),
    "each is the next": lambda s: [*s[:20], *s[21:31], s[30] + 40, *s[31:]],
    "each is eight on": lambda s: [*s[:20], *s[28:38], *s[30:]],
    "two are exchanged": lambda s: [*s[:20], s[21], s[20], *s[22:]],
    "two are equal": lambda s: [*s[:20], s[21], *s[21:]],
    "the last are missing": lambda s: s[:-9],
    "there are more": lambda s: [*s, s[-1] + 9],
    "one is missing in the middle": lambda s: [*s[:20], *s[21:], s[-1] + 30],
    "the last lie past the end": lambda s: [*s[:-2], s[-2] + 10**6, s[-1] + 10**6],
    "the first is wrong": lambda s: [s[0] + 200, *s[1:]],
    "all are from the file's beginning": lambda s: [one + 12 for one in s],
    "there is only one": lambda s: s[:1],
}

ALL_LATER = ("one is missing in the middle", "all are from the file's beginning")
"""Faults that leave few positions right."""


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_restart_positions_never_show_other_pixels(fault: str, remote: bool, tmp_path: Path) -> None:
    fine = page(picture(), 20)
    assert fine.starts is not None
    wrong = FAULTS[fault](list(fine.starts))
    fine = replace(fine, starts=wrong)
    path = write_ndpi(tmp_path / "s.ndpi", [fine, page(picture(64, 128, 1), 10)])
    url: str | Path = path
    if remote:
        url = f"memory://{tmp_path.name}/slide"
        fsspec.filesystem("memory").pipe_file(url.removeprefix("memory://"), path.read_bytes())
    slide = dfx.open_slide(url)
    errors: dict[int, str] = {}
    for n in range(64):  # tile after tile
        y, x = n // 4 * 8, n % 4 * 64
        try:
            tile = slide.region(0, (y, x, y + 8, x + 64), rgb=True)
        except TileError as e:
            errors[n] = str(e)
            continue
        assert np.abs(tile.astype(int) - picture()[y : y + 8, x : x + 64]).mean() < 3
    for n, error in errors.items():
        assert f"tile {n} (row {n // 4}, column {n % 4}) of level 0" in error
        assert "restart marker" in error
    assert len(errors) <= (12 if fault not in ALL_LATER else 64)
    whole = any("is read whole" in note for note in slide.notes)
    assert whole != bool(errors) or fault == "the first is wrong"


def test_a_large_level_whose_restart_positions_can_not_be_used_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = page(picture(), 20)
    monkeypatch.setattr("dfx.slides.ndpi.MOST_TILE_BYTES", 2**16)
    assert fine.starts is not None
    path = write_ndpi(tmp_path / "s.ndpi", [replace(fine, starts=fine.starts[:-1])])
    with pytest.raises(
        SlideError, match=r"lists 63 restart markers .* where 64 are needed, and it is too large to read whole"
    ):
        dfx.open_slide(path)


def test_missing_restart_markers_and_a_missing_end_are_errors_of_their_tile(tmp_path: Path) -> None:
    fine = page(picture(), 20)
    assert fine.starts is not None
    data = bytearray(fine.jpeg.data)
    data[fine.starts[20] - 2 : fine.starts[20]] = b"\0\0"
    data[-2:] = b"\0\0"
    fine = replace(fine, jpeg=replace(fine.jpeg, data=bytes(data)))
    slide = dfx.open_slide(write_ndpi(tmp_path / "s.ndpi", [fine]))
    for n, message in ((19, "marker 3 is not after"), (20, "marker 3 is not before"), (63, "cut short")):
        y, x = n // 4 * 8, n % 4 * 64
        with pytest.raises(TileError, match=rf"tile {n} .*{message}"):
            slide.region(0, (y, x, y + 8, x + 64), rgb=True)
    assert slide.region(0, (0, 0, 32, 256), rgb=True).shape == (32, 256, 3)


# Names and sizes of files


@pytest.mark.parametrize("at", [12, 2**32 + 10, 5 * 2**30])
def test_an_ndpi_file_is_known_by_its_tags_whatever_its_name(at: int, tmp_path: Path) -> None:
    pages = [page(picture(), 20, 3000), page(picture(64, 128, 1), 10, 3000), page(plain("r", 40, 90), -1, 0, None)]
    first = write_ndpi(tmp_path / "slide.ndpi", pages, at=at)
    for name in ("slide.ndpi", "slide.tif", "slide.svs", "slide"):
        path = first if name == first.name else first.rename(tmp_path / name)
        slide = dfx.open_slide(path)
        first = path
        assert (slide.vendor, slide.power, slide.mpp) == ("hamamatsu", 20, pytest.approx((0.5, 0.5)))
        assert [level.dimensions for level in slide.levels] == [(256, 128), (128, 64)]
        for n, want in enumerate((picture(), picture(64, 128, 1))):
            assert np.abs(decoded(slide, n).astype(int) - want).mean() < 3


@pytest.mark.parametrize("at", [12, 2**32 + 10])
def test_a_loop_of_directories_is_an_error_in_ndpi_too(at: int, tmp_path: Path) -> None:
    path = write_ndpi(tmp_path / "s.ndpi", [page(picture(), 20)], at=at, loop=True)
    with pytest.raises(SlideError, match="form a loop"):
        dfx.open_slide(path)


def test_another_tiff_does_not_become_ndpi_by_its_name(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "s.tif") as out:
        for n in range(2):
            image = picture(256 >> n, 512 >> n)
            out.write(image, tile=(64, 64), photometric="rgb", subfiletype=n, metadata=None)
    shutil.copy(tmp_path / "s.tif", tmp_path / "s.ndpi")
    slide = dfx.open_slide(tmp_path / "s.ndpi")
    assert slide.vendor == "generic-tiff"
    assert [level.dimensions for level in slide.levels] == [(512, 256), (256, 128)]
    assert np.array_equal(decoded(slide, 1), picture(128, 256))
