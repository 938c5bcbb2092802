"""The pixels of patches, against an oracle that reads the whole level with tifffile."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import oracle
import pytest
import tifffile
from conftest import shared
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import dfx
from dfx import reader
from dfx.resolution import Units, View
from dfx.slides.cache import Tiles
from dfx.slides.level import Level

ODD = "aperio_odd.svs", "philips_sparse.tiff", "generic_gray.tif", "strips.tif", "leica_two_areas.scn"
SLIDES: dict[Any, tuple[dfx.Slide, list[NDArray[np.uint8]]]] = {}


def synthetic(folder: Path, size: tuple[int, int], factors: tuple[int, ...], tile: tuple[int, int]) -> Any:
    """A lossless pyramid and the pixels of its levels; noise, so that no wrong pixel goes unseen."""
    key = (size, factors, tile)
    if key not in SLIDES:
        path = folder / f"{abs(hash(key))}.tif"
        base = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
        levels = []
        with tifffile.TiffWriter(path) as out:
            for n, factor in enumerate(factors):
                shape = (max(1, size[1] // factor), max(1, size[0] // factor))
                level = base if n == 0 else np.asarray(cv2.resize(base, shape, interpolation=cv2.INTER_AREA), np.uint8)
                levels.append(level)
                out.write(level, tile=tile, photometric="rgb", compression="zlib", metadata=None, subfiletype=n > 0)
        SLIDES[key] = dfx.open_slide(path, mpp=0.25, power=40), levels
    return SLIDES[key]


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_grid_and_pixels_are_those_of_the_whole_level_in_plain_numpy(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    size = data.draw(
        st.sampled_from([(700, 500), (333, 1021), (64, 64), (513, 257), (31, 3001), (2003, 45)]), label="rows, columns"
    )
    factors = data.draw(st.sampled_from([(1,), (1, 2), (1, 4), (1, 2, 4), (1, 3)]), label="factors")
    tile = data.draw(st.sampled_from([(64, 64), (128, 16), (256, 256)]), label="tile")
    units: Units = data.draw(st.sampled_from(["mpp", "power", "baseline", "level"]), label="units")
    factor = data.draw(st.sampled_from([0.5, 0.8, 1.0, 1.5, 2.0, 2.7, 4.0, 7.3]), label="factor")
    value = {"mpp": 0.25 * factor, "power": 40 / factor, "baseline": 1 / factor, "level": len(factors) - 1}[units]
    shape = data.draw(st.tuples(st.integers(5, 150), st.integers(5, 150)), label="shape")
    stride = data.draw(st.tuples(st.integers(30, 300), st.integers(30, 300)), label="stride")
    ratio = data.draw(st.sampled_from([0.0, 0.3, 0.9]), label="min_mask_ratio")
    mask = None
    if data.draw(st.booleans(), label="masked"):
        cells = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)), label="cells")
        mask = np.random.default_rng(data.draw(st.integers(0, 99))).random(cells) < 0.4
    slide, levels = synthetic(tmp_path_factory.getbasetemp(), size, factors, tile)

    heights, widths = zip(*(level.shape[:2] for level in levels), strict=True)
    downsamples = [(heights[0] / h + widths[0] / w) / 2 for h, w in zip(heights, widths, strict=True)]
    n, scale, ds = oracle.level_and_scale(downsamples, value, units, 0.25, 40)
    own = oracle.own_factors((widths[0], heights[0]), (factors[n], factors[n]), ds)  # levels have lost odd rows
    base = own if units == "level" else (ds, ds)
    to_baseline = base[0] / scale, base[1] / scale
    size_xy = (int(np.rint(np.rint(widths[0] / base[0]) * scale)), int(np.rint(np.rint(heights[0] / base[1]) * scale)))
    wanted = oracle.positions(size_xy, shape, stride, mask, ratio)

    grid = dfx.PatchGrid.over(
        slide, shape=shape, stride=stride, resolution=value, units=units, mask=mask, min_mask_ratio=ratio
    )
    assert {tuple(r) for r in grid.coordinates[:, :2].tolist()} == wanted
    got = dfx.patches(slide, grid, block_size=37).compute(scheduler="sync")
    assert got.shape == (len(wanted), *shape, 3)
    assert got.dtype == np.uint8
    for i in np.random.default_rng(0).permutation(len(grid))[:12]:
        x, y = grid.coordinates[i, :2].tolist()
        want = oracle.patch_at(levels[n], x, y, shape, scale, ds, own, to_baseline)
        off = np.abs(got[i] - np.clip(want, 0, 255)).max()
        resampled = (want != np.rint(want)).any()
        assert off <= (1.5 if resampled else 0), (i, off)  # OpenCV works with fixed-point weights


def test_native_patches_are_the_files_own_pixels(made_slide: Path, made_pixels: NDArray[np.uint8]) -> None:
    slide = dfx.open_slide(made_slide)
    grid = dfx.PatchGrid.over(slide, shape=(100, 150), resolution=0.5, units="mpp", mask=None)
    patches = dfx.patches(slide, grid).compute(scheduler="sync")
    assert len(patches) == 13 * 11
    for (x0, y0, x1, y1), patch in zip(grid.coordinates.tolist(), patches, strict=True):
        own = made_pixels[y0:y1, x0:x1]
        assert np.array_equal(patch[: own.shape[0], : own.shape[1]], own)
        assert (patch[own.shape[0] :] == 255).all()
        assert (patch[:, own.shape[1] :] == 255).all()


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs"])
def test_native_patches_of_real_slides_are_openslides(name: str) -> None:
    import openslide

    path = shared(f"slides/{name}")
    slide, other = dfx.open_slide(path), openslide.OpenSlide(path)
    grid = dfx.PatchGrid.over(slide, shape=300, resolution=0, units="level", mask="tissue")
    patches = dfx.patches(slide, grid).compute(scheduler="sync")
    for i in range(0, len(grid), 7):
        x, y = grid.coordinates[i, :2].tolist()
        inside = slide.dimensions[1] - y, slide.dimensions[0] - x
        want = np.asarray(other.read_region((x, y), 0, (300, 300)))[..., :3]
        assert np.array_equal(patches[i, : inside[0], : inside[1]], want[: inside[0], : inside[1]])


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", *(f"synthetic/syn_{n}" for n in ODD)])
def test_pixels_copied_straight_out_of_tiles_are_those_cut_from_a_canvas(
    name: str, factor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = dfx.open_slide(shared(f"slides/{name}"), mpp=0.25)
    width, height = (size // factor for size in slide.dimensions)
    ys = *range(0, height, max(16, height // 5)), *range(height - 40, height, 16)  # the last patches overhang
    xy = np.array([(x, y) for y in ys for x in range(0, width, 80)])
    view = View(0, (1 / factor, 1 / factor), 1.0, (width, height), 1 / factor, "baseline")
    straight = reader.read_patches(slide, view, xy, (48, 96), stride_yx=(16, 80))
    monkeypatch.setattr(reader, "whole_factor", lambda *args: 0)
    assert np.array_equal(straight, reader.read_patches(slide, view, xy, (48, 96)))
    assert (straight == 255).any()
    assert straight.min() < 200


def test_memory_is_taken_up_again_only_when_its_last_view_is_gone() -> None:
    pool = reader.BufferPool(3000)
    first = pool.empty((10, 10, 3))
    view, address = first[2:].reshape(-1), first.ctypes.data
    del first
    other = pool.empty((10, 10, 3))
    assert not np.shares_memory(view, other)
    view[:] = 7
    other[:] = 9
    assert (view == 7).all()
    del view
    again = pool.empty((300,))
    assert again.ctypes.data == address
    assert pool.empty((299,)).ctypes.data != address
    some = [pool.empty((1000,)) for _ in range(9)]
    del some
    assert len(pool._free) == 3


def counted(slide: dfx.Slide, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every call of the tile decoder from now on."""
    calls: list[int] = []
    original = Level.decode

    def decode(self: Level, source: Any, n: int, part: Any, row: int, column: int, **options: Any) -> Any:
        calls.append(row * 1000 + column)
        return original(self, source, n, part, row, column, **options)

    monkeypatch.setattr(Level, "decode", decode)
    return calls


def test_each_tile_is_decoded_once_in_a_sub_block(slide: dfx.Slide, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(slide, monkeypatch)
    grid = dfx.PatchGrid.over(slide, shape=64, stride=32, resolution=0, units="level", mask=None)
    origins = grid.coordinates[: reader.MOST_PATCHES, :2]
    reader.read_patches(slide, grid.view, origins, (64, 64))
    assert len(calls) == len(set(calls)) > 0


@pytest.fixture(scope="module")
def large_slide(tmp_path_factory: pytest.TempPathFactory) -> dfx.Slide:
    """Many blocks; its tiles are small to keep it quick."""
    path = tmp_path_factory.mktemp("large") / "large.tif"
    image = np.zeros((2048, 2048, 3), np.uint8)
    tifffile.imwrite(path, image, tile=(32, 32), photometric="rgb", compression="zlib", metadata=None)
    return dfx.open_slide(path, mpp=0.25)


@pytest.mark.parametrize(("shape", "stride", "most"), [(28, 28, 1.1), (56, 28, 1.3), (28, 14, 1.3)])
@pytest.mark.parametrize("threads", [1, 2])
def test_tiles_that_blocks_share_are_decoded_once_over_the_slide(
    shape: int, stride: int, most: float, threads: int, large_slide: dfx.Slide, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "dfx.slides.slide.TILES", Tiles(2**20)
    )  # holds as many of these tiles as 64 MiB holds of 256 px
    calls = counted(large_slide, monkeypatch)
    grid = dfx.PatchGrid.over(large_slide, shape=shape, stride=stride, resolution=0.25, mask=None)
    dfx.patches(large_slide, grid).max(axis=(1, 2, 3)).compute(scheduler="threads", num_workers=threads)
    assert len(set(calls)) == 64 * 64
    assert len(calls) <= most * 64 * 64


def test_kept_tiles_are_bounded_in_bytes() -> None:
    tiles = Tiles(1000)
    for i in range(100):
        tiles.put(i, np.zeros(90, np.uint8))
        tiles.put(i, np.zeros(90, np.uint8))
    assert tiles.get(0) is None
    assert sum(tiles.get(i) is not None for i in range(100)) == 11
    tiles.put("large", np.zeros(300, np.uint8))
    assert tiles.get("large") is None
    tiles.clear()
    assert tiles.get(99) is None


def test_only_the_tiles_under_patches_are_decoded(slide: dfx.Slide, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(slide, monkeypatch)
    grid = dfx.PatchGrid.over(slide, shape=16, resolution=0, units="level", mask=None)
    reader.read_patches(slide, grid.view, np.array([[0, 0], [700, 0], [0, 600]]), (16, 16))
    assert sorted(calls) == [0, 2, 2000]


def test_sub_blocks_cover_every_patch_once_and_stay_small() -> None:
    rng = np.random.default_rng(0)
    corners = np.cumsum(rng.integers(0, 900, (500, 2)), axis=0)
    boxes = np.concatenate([corners, corners + 448], axis=1)
    runs = list(reader.sub_blocks(boxes))
    assert [i for start, stop in runs for i in range(start, stop)] == list(range(500))
    for start, stop in runs:
        extent = boxes[start:stop, 2:].max(0) - boxes[start:stop, :2].min(0)
        assert stop - start <= reader.MOST_PATCHES
        assert extent.prod() * 3 <= reader.MOST_CANVAS_BYTES or stop - start == 1
    assert list(reader.sub_blocks(np.empty((0, 4), np.int64))) == []


def test_a_thread_reuses_its_canvas_and_no_other_threads() -> None:
    first = reader.canvas(500, 500)
    assert np.shares_memory(first, reader.canvas(400, 300))
    others: list[bool] = []
    thread = threading.Thread(target=lambda: others.append(np.shares_memory(first, reader.canvas(400, 300))))
    thread.start()
    thread.join()
    assert others == [False]


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "synthetic/syn_aperio_jpeg_rgb.svs", "made"])
def test_fast_reading_is_close_to_the_average_of_areas_and_is_asked_for(
    name: str, factor: int, made_slide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("simplejpeg")
    slide = dfx.open_slide(made_slide if name == "made" else shared(f"slides/{name}"), mpp=0.25)
    width, height = (size // factor for size in slide.dimensions)
    xy = np.array([(x, y) for y in range(0, height, 24) for x in range(0, width, 48)])
    view = View(0, (1 / factor, 1 / factor), 1.0, (width, height), 1 / factor, "baseline")
    exact = reader.read_patches(slide, view, xy, (24, 48))
    calls = counted(slide, monkeypatch)
    fast = reader.read_patches(slide, view, xy, (24, 48), fast=True)
    off = np.abs(exact.astype(int) - fast)
    assert len(calls) == len(set(calls)) > 0
    assert 0 < off.mean() < 4
    assert np.abs(exact.mean((0, 1, 2)) - fast.mean((0, 1, 2))).max() < 1  # no shift of colour


@pytest.mark.parametrize("name", ["aperio_j2k.svs", "generic_webp.tif", "philips_sparse.tiff", "strips.tif"])
def test_fast_reading_changes_nothing_where_it_can_do_nothing(name: str) -> None:
    pytest.importorskip("simplejpeg")
    slide = dfx.open_slide(shared(f"slides/synthetic/syn_{name}"), mpp=0.25)
    for mpp in (0.25, 0.6):
        grid = dfx.PatchGrid.over(slide, shape=48, resolution=mpp, mask=None)
        fast = dfx.patches(slide, grid, reading="fast").compute(scheduler="sync")
        assert np.array_equal(fast, dfx.patches(slide, grid).compute(scheduler="sync"))
