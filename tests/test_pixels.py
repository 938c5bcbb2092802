"""Every pixel of a patch is copied from a tile or filled; missing tiles; fast reading of odd tiles."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs as ic
import numpy as np
import pytest
import tifffile
from layouts import Layout, texture, write
from numpy.typing import NDArray

import dfx
from dfx import kernel, reader
from dfx.errors import TileError
from dfx.slides import jpeg

Pixels = NDArray[Any]


def read(slide: dfx.Slide, factor: float, shape: int = 32, **options: Any) -> tuple[dfx.PatchGrid, Pixels]:
    """All patches at a factor, by one thread, whose buffers the next call has too."""
    grid = dfx.PatchGrid.over(slide, shape=shape, resolution=1 / factor, units="baseline", mask=None)
    out = kernel.batch_buffer(len(grid), (shape, shape))
    reader.read_patches(slide, grid.view, grid.origins(grid.steps_xy), (shape, shape), out, **options)
    return grid, out.copy()


GAPS = {
    "one Leica area": Layout(vendor="leica", size_yx=(256, 384), areas=((48, 64, 120, 200),)),
    "Leica areas side by side": Layout(
        vendor="leica", size_yx=(256, 384), areas=((48, 64, 100, 118), (48, 182, 100, 90))
    ),
    "a Leica area beyond the glass": Layout(vendor="leica", size_yx=(256, 384), areas=((192, 256, 120, 200),)),
    "missing tiles": Layout(missing=((0, 0), (0, 9), (0, 34))),
    "missing tiles of Aperio": Layout(vendor="aperio", missing=((0, 0), (0, 9), (0, 34))),
    "missing strips": Layout(tile_yx=None, missing=((0, 2), (0, 6))),
    "missing tiles in planes": Layout(planar=True, missing=((0, 8),)),
    "cut tiles": Layout(codec="jpeg", cut=True, missing=((0, 34),)),
    "damaged tiles": Layout(codec="jpeg", damaged=((0, 0), (0, 9), (0, 34))),
    "all tiles missing": Layout(size_yx=(100, 100), missing=((0, 0), (0, 1), (0, 2), (0, 3))),
}


@pytest.mark.parametrize("factor", [1, 1.5, 2, 4])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", GAPS)
def test_patches_never_show_pixels_of_another_slide(name: str, fast: bool, factor: float, tmp_path: Path) -> None:
    layout = GAPS[name]
    written = write(tmp_path / ("a.scn" if layout.vendor == "leica" else "a.svs"), layout)
    slide = dfx.open_slide(written.path, mpp=0.25)
    patches = []
    for colour in (0, 200):
        tifffile.imwrite(tmp_path / "b.tif", np.full((420, 420, 3), colour, np.uint8), tile=(64, 64), metadata=None)
        read(dfx.open_slide(tmp_path / "b.tif"), factor, fast=fast)
        grid, got = read(slide, factor, fast=fast, damaged=set())
        patches.append(got)
    assert np.array_equal(*patches)
    if layout.codec == "zlib":
        height, width = written.levels[0].shape[:2]
        for (x0, y0, x1, y1), patch in zip((grid.coordinates * factor).round().astype(int), patches[0], strict=True):
            if (written.levels[0][y0:y1, x0:x1] == 255).all():
                assert (patch == 255).all()
            beyond = (patch[int((height - y0) / factor) + 1 :], patch[:, int((width - x0) / factor) + 1 :])
            assert all((part == 255).all() for part in beyond)


@pytest.mark.parametrize("name", GAPS)
def test_boxes_that_need_no_filling_are_those_that_tiles_cover(name: str, tmp_path: Path) -> None:
    layout = GAPS[name]
    written = write(tmp_path / ("a.scn" if layout.vendor == "leica" else "a.svs"), layout)
    level = dfx.open_slide(written.path).levels[0]
    covered = np.zeros((len(level.parts), *level.shape_yx), np.bool_)
    for p, part in enumerate(level.parts):
        for r, c in np.argwhere(part.present).tolist():
            (top, left), (height, width) = part.origin_yx, part.extent(r, c)
            y, x = top + r * part.tile_yx[0], left + c * part.tile_yx[1]
            covered[p, y : y + height, x : x + width] = True
    rng = np.random.default_rng(0)
    corners = rng.integers(-40, max(level.shape_yx) + 40, (3000, 2))
    boxes = np.concatenate([corners, corners + rng.integers(1, 150, (3000, 2))], axis=1)
    inside = (boxes[:, :2] >= 0).all(axis=1) & (boxes[:, 2:] <= level.shape_yx).all(axis=1)
    wanted = [
        ok and any(c[y0:y1, x0:x1].all() for c in covered) for ok, (y0, x0, y1, x1) in zip(inside, boxes, strict=True)
    ]
    assert np.array_equal(level.covers(boxes), wanted)
    for box in boxes[~inside][:50]:  # tiles that a box only seems to touch are not decoded
        for part in level.parts:
            for r, c in part.touching(box[None]):
                y, x = part.origin_yx[0] + r * part.tile_yx[0], part.origin_yx[1] + c * part.tile_yx[1]
                height, width = part.extent(r, c)
                assert y < box[2] and box[0] < y + height and x < box[3] and box[1] < x + width  # noqa: PT018


def test_every_reused_buffer_is_poisoned_when_it_is_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfx.slides.buffers.POISON", True)
    buffers: list[Callable[[], Pixels]] = [
        lambda: reader.canvas(20, 31),
        lambda: kernel.batch_buffer(3, (5, 7)),
        lambda: jpeg.scratch_buffer((16, 16, 3)),
        lambda: reader.POOL.empty((2, 9, 9, 3)),
    ]
    for hand_out in buffers:
        for _ in range(2):
            buffer = hand_out()
            assert (buffer.reshape(-1)[0::2] == 0xA5).all()
            assert (buffer.reshape(-1)[1::2] == 0x5A).all()
            buffer.fill(7)
            del buffer
    code = "from dfx.slides.buffers import POISON; print(POISON)"
    for value in ("", "0", "1"):
        env = os.environ | {"DFX_POISON": value}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(value == "1")


def test_an_empty_slice_of_a_huge_level_takes_no_memory(tmp_path: Path) -> None:
    side = 200_000
    tiles = (b"" for _ in range((side // 8_000) ** 2))
    with tifffile.TiffWriter(tmp_path / "huge.tif", bigtiff=True) as out:
        options: dict[str, Any] = {"photometric": "rgb", "compression": "zlib", "metadata": None}
        out.write(tiles, shape=(side, side, 3), dtype=np.uint8, tile=(8_000, 8_000), **options)
    level = dfx.open_slide(tmp_path / "huge.tif").level(0)
    assert level[7:7].compute(scheduler="sync").shape == (0, side, 3)


# Missing tiles


def openslides(path: Path, n: int) -> Pixels:
    """A level as OpenSlide shows it, over white."""
    import openslide

    other = openslide.OpenSlide(path)
    rgba = np.asarray(other.read_region((0, 0), n, other.level_dimensions[n])).astype(int)
    alpha = rgba[..., 3:]
    return np.asarray((rgba[..., :3] * alpha + (255 - alpha) * 255) // 255)


MISSING = {
    "level 1": ((1, 5),),
    "level 1, at the slide's end": ((1, 3), (1, 11)),
    "level 2": ((2, 0),),
    "level 0 and so its covers": ((0, 30),),
    "neighbours across a border": ((0, 3), (0, 4), (0, 19), (0, 20)),
    "several levels": ((0, 0), (1, 1), (2, 0), (1, 10)),
}


@pytest.mark.parametrize("factors", [(1, 4, 8), (1, 2, 4), (1, 3, 9)])
@pytest.mark.parametrize("name", MISSING)
def test_missing_tiles_are_drawn_from_the_finer_level_as_openslide_draws_them(
    name: str, factors: tuple[int, ...], tmp_path: Path
) -> None:
    size_yx = (720, 1440) if factors == (1, 3, 9) else (576, 1024)
    layout = Layout(vendor="aperio", size_yx=size_yx, factors=factors, codec="none", missing=MISSING[name])
    written = write(tmp_path / "a.svs", layout)
    slide = dfx.open_slide(written.path)
    for n, level in enumerate(slide.levels):
        off = np.abs(slide.region(n, (0, 0, *level.shape_yx), rgb=True) - openslides(written.path, n))
        if factors != (1, 3, 9):  # the rest is OpenSlide's rounding, at each level that it draws from
            assert off.max() <= n
        else:  # tiles end within pixels: OpenSlide lets two tiles share the pixels on their border
            assert off.mean() < 0.5
        assert np.abs(slide.region(n, (0, 0, *level.shape_yx), rgb=True) - written.levels[n].astype(int)).max() <= 1
    assert any("are drawn from level" in note for note in slide.notes)


@pytest.mark.parametrize("factor", [4, 5.5])
def test_patches_thumbnails_and_tissue_show_missing_tiles_as_they_are_drawn(factor: float, tmp_path: Path) -> None:
    layout = Layout(vendor="aperio", size_yx=(512, 1024), factors=(1, 4), codec="none", missing=((1, 0), (1, 6)))
    gaps, whole = write(tmp_path / "a.svs", layout), write(tmp_path / "b.svs", replace(layout, missing=()))
    want = gaps.levels[1].astype(int)
    for tile in (0, 6):  # what is drawn is level 0, averaged
        y, x = tile // 4 * 64, tile % 4 * 64
        block = gaps.levels[0][4 * y : 4 * y + 256, 4 * x : 4 * x + 256].reshape(64, 4, 64, 4, 3)
        assert np.abs(want[y : y + 64, x : x + 64] - block.mean((1, 3))).max() <= 0.5
    slide = dfx.open_slide(gaps.path)
    with tifffile.TiffWriter(tmp_path / "c.tif") as out:  # the same two levels, with no gap
        for n, level in enumerate(gaps.levels):
            out.write(level, tile=(64, 64), photometric="rgb", metadata=None, subfiletype=int(n > 0))
    same = dfx.open_slide(tmp_path / "c.tif", mpp=0.25, power=40)
    for fast in (False, True):
        assert np.abs(read(slide, factor, fast=fast)[1].astype(int) - read(same, factor)[1]).max() <= 1
    assert np.abs(slide.thumbnail(200).astype(int) - same.thumbnail(200)).max() <= 1
    assert np.abs(slide.level(1)[:, 10:200:7].compute(scheduler="sync") - want[:, 10:200:7]).max() <= 1
    assert not np.array_equal(slide.thumbnail(200), dfx.open_slide(whole.path).thumbnail(200))


def test_a_damaged_tile_of_the_finer_level_is_named_where_it_would_be_drawn_from(tmp_path: Path) -> None:
    layout = Layout(vendor="aperio", size_yx=(512, 1024), factors=(1, 4), missing=((1, 0),), damaged=((0, 17),))
    slide = dfx.open_slide(write(tmp_path / "a.svs", layout).path)
    with pytest.raises(TileError, match=r"tile 17 \(row 1, column 1\) of level 0 .*a\.svs"):
        read(slide, 4)
    damaged: set[str] = set()
    _, got = read(slide, 4, damaged=damaged)
    assert [name.split(" of ")[1] for name in damaged] == ["level 0"]
    assert (got[0] == 255).all()  # within the tile that can't be drawn


@pytest.mark.parametrize("missing", [((0, 0), (0, 9)), ((1, 0),), ((0, 3), (1, 1))])
def test_missing_tiles_of_an_unknown_vendor_are_white_as_openslides_are(missing: Any, tmp_path: Path) -> None:
    layout = Layout(size_yx=(256, 384), factors=(1, 2), missing=missing)
    written = write(tmp_path / "a.tif", layout)
    slide = dfx.open_slide(written.path)
    for n, want in enumerate(written.levels):
        got = slide.region(n, (0, 0, *want.shape[:2]), rgb=True)
        assert np.array_equal(got, want)
        assert np.array_equal(got, openslides(written.path, n))


# Fast reading


def jpeg_tiff(path: Path, encode: Callable[[Pixels], bytes], *, cut: bool, more: int = 0, rgb: bool = False) -> Path:
    """Write 64 px tiles of 300 x 420 pixels, those at the border cut, all of them larger by `more`."""
    image = texture(np.random.default_rng(0), 300, 420, 3) // 4 + np.mgrid[0:420][:, None].astype(np.uint8) // 3
    data = []
    for top in range(0, 300, 64):
        for left in range(0, 420, 64):
            tile = image[top : top + 64 + more, left : left + 64 + more]
            if not cut:  # padded by black
                tile = np.pad(tile, [(0, 64 + more - tile.shape[0]), (0, 64 + more - tile.shape[1]), (0, 0)])
            data.append(encode(np.ascontiguousarray(tile)))
    with tifffile.TiffWriter(path) as out:
        options: dict[str, Any] = {"photometric": "rgb" if rgb else "ycbcr", "compression": "jpeg", "metadata": None}
        out.write(iter(data), shape=image.shape, dtype=np.uint8, tile=(64, 64), **options)
    return path


def attempt(slide: dfx.Slide, factor: int, fast: bool) -> Pixels | str:
    try:
        return read(slide, factor, 8, fast=fast)[1].astype(int)
    except TileError as e:
        return str(e)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("kind", ["444", "422", "420", "411", "440", "rgb", "one component", "larger", "cut short"])
def test_fast_reading_reads_what_exact_reading_reads(kind: str, cut: bool, tmp_path: Path) -> None:

    def encode(tile: Pixels) -> bytes:
        if kind == "one component":
            return bytes(ic.jpeg8_encode(np.ascontiguousarray(tile[..., 0]), level=90))
        if kind == "rgb":
            return bytes(ic.jpeg8_encode(tile, level=90, outcolorspace="rgb"))
        data = bytes(ic.jpeg8_encode(tile, level=90, subsampling=kind if kind.isdigit() else "420"))
        return data[: len(data) // 2] if kind == "cut short" else data

    more = 16 if kind == "larger" else 0
    slide = dfx.open_slide(jpeg_tiff(tmp_path / "a.tif", encode, cut=cut, more=more, rgb=kind == "rgb"))
    for factor in (2, 4, 8):
        exact, fast = (attempt(slide, factor, fast) for fast in (False, True))
        if isinstance(exact, str) or isinstance(fast, str):
            assert exact == fast
            assert kind in ("larger", "cut short")
            continue
        off = np.abs(exact - fast)
        assert off.mean() < 3
        assert off.max() < 25
        edge = reader.read_patches  # tiles at the border are decoded whole: no padding is mixed into their last pixels
        grid = dfx.PatchGrid.over(slide, shape=8, resolution=1 / factor, units="baseline", mask=None)
        last = grid.coordinates[grid.coordinates[:, 0] * factor >= 6 * 64, :2]
        views = [edge(slide, grid.view, last, (8, 8), fast=fast).astype(int) for fast in (False, True)]
        assert len(last)
        assert np.abs(views[0] - views[1]).max() <= 1
