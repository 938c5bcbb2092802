"""Patches of slides of every layout, against plain numpy that knows what was written; buffers are poisoned."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from layouts import CODECS, Layout, Written, write

import dfx
from dfx.reader import read_patches
from dfx.resolution import Units

ANEW = os.environ.get("DFX_FUZZ") == "1"
"""Whether the long test draws other layouts each time, to search; else a failure is due to a change."""
SLIDES: dict[Layout, tuple[dfx.Slide, Written]] = {}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfx.slides.buffers.POISON", True)


def opened(layout: Layout, folder: Path) -> tuple[dfx.Slide, Written]:
    if layout not in SLIDES:
        suffix = {"leica": ".scn", "aperio": ".svs"}.get(layout.vendor, ".tif")
        written = write(folder / f"{len(SLIDES)}{suffix}", layout)
        SLIDES[layout] = dfx.open_slide(written.path, mpp=0.25, power=40), written
    return SLIDES[layout]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """A layout that can be written."""
    vendor = draw(st.sampled_from(["generic", "generic", "aperio", "leica"]))
    factors = draw(st.sampled_from([(1,), (1, 2), (1, 4), (1, 2, 4), (1, 3)]))
    sizes = [(256, 384), (192, 576), (333, 421), (97, 130)] if vendor != "leica" else [(384, 576)]
    options: dict[str, Any] = {
        "vendor": vendor,
        "factors": factors,
        "size_yx": draw(st.sampled_from(sizes)),
        "codec": draw(st.sampled_from(sorted(CODECS))),
        "seed": draw(st.integers(0, 3)),
    }
    if vendor == "leica":
        corner, size = st.integers(0, 20).map(lambda n: 12 * n), st.sampled_from([96, 120, 180])
        options["areas"] = tuple(draw(st.lists(st.tuples(corner, corner, size, size), min_size=1, max_size=3)))
        options["tile_yx"] = draw(st.sampled_from([(64, 64), (48, 32)]))
    else:
        tiles = [(64, 64), (128, 16), (256, 256), (16, 48)]
        options["tile_yx"] = draw(st.sampled_from(tiles if vendor == "aperio" else [*tiles, None]))
        kinds = (
            ["rgb", "rgba"]
            if options["codec"] == "webp"
            else ["rgb", "rgb", "rgba", "grey", "white-is-zero", "palette"]
        )
        options["kind"] = draw(st.sampled_from(kinds))
        planes = options["kind"] in ("rgb", "rgba") and options["codec"] != "webp"
        # A JPEG stream of four components is CMYK or of no known colours, and is refused.
        options["planar"] = planes and (draw(st.booleans()) or (options["codec"], options["kind"]) == ("jpeg", "rgba"))
        options["cut"] = options["codec"] != "lzw" and draw(st.booleans())  # LZW cut short is refused
        options |= {flag: draw(st.booleans()) for flag in ("big_endian", "big_tiff")}
        options["sub_ifds"] = vendor == "generic" and draw(st.booleans())
    if factors == (1, 3) and options["tile_yx"] and vendor != "leica":
        # Such a level may be one of factor 4 that is padded to whole tiles, so it is left out (test_levels.py).
        sides = zip(options["size_yx"], options["tile_yx"], strict=True)
        assume(any(side // 3 % tile for side, tile in sides))
    tile = st.tuples(st.integers(0, len(factors) - 1), st.integers(0, 9))
    if options["codec"] != "none" or options["tile_yx"]:  # tifffile writes no such strips
        options["missing"] = tuple(draw(st.lists(tile, max_size=4)))
    if vendor != "aperio" and options["codec"] != "none":
        options["damaged"] = tuple(draw(st.lists(tile, max_size=1)))
    return Layout(**options)


def check(data: st.DataObject, folder: Path) -> None:
    """Draw a layout and a grid of patches; compare some of them."""
    layout = data.draw(layouts(), label="layout")
    units: Units = data.draw(st.sampled_from(["mpp", "power", "baseline", "level"]), label="units")
    factor = data.draw(st.sampled_from([0.5, 0.8, 1.0, 1.0, 1.5, 2.0, 2.0, 3.0, 4.0, 5.3, 8.0]), label="factor")
    level = data.draw(st.integers(0, len(layout.factors) - 1), label="level")
    value = {"mpp": 0.25 * factor, "power": 40 / factor, "baseline": 1 / factor, "level": level}[units]
    shape = data.draw(st.tuples(st.integers(3, 120), st.integers(3, 120)), label="shape")
    if data.draw(st.booleans(), label="aligned"):  # to tiles, so that patches are copied without a canvas
        shape = max(16, shape[0] // 16 * 16), max(16, shape[1] // 16 * 16)
    stride = tuple(data.draw(st.sampled_from([s, max(1, s // 2), s + 7]), label="stride") for s in shape)
    mask = None
    if data.draw(st.booleans(), label="masked"):
        cells = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20)), label="cells")
        mask = np.random.default_rng(data.draw(st.integers(0, 99))).random(cells) < 0.5
    slide, written = opened(layout, folder)

    n, scale, ds = oracle.level_and_scale(written.downsamples, value, units, 0.25, 40)
    height, width = written.levels[0].shape[:2]
    size_xy = (int(np.rint(np.rint(width / ds) * scale)), int(np.rint(np.rint(height / ds) * scale)))
    if min(size_xy) < 1:
        return
    grid = dfx.PatchGrid.over(
        slide, shape=shape, stride=stride, resolution=value, units=units, mask=mask, mask_origin="slide"
    )
    if units == "level":  # tests of geometry hold sizes; here pixels are at issue
        size_xy = grid.view.size_xy
    own, to_baseline = grid.view.downsample_xy or (ds, ds), grid.view.to_baseline
    wanted = oracle.positions(size_xy, shape, stride, mask, 0.0)  # type: ignore[arg-type]
    assert {tuple(r) for r in grid.coordinates[:, :2].tolist()} == wanted
    if not wanted:
        return
    some = np.sort(np.random.default_rng(0).permutation(len(grid))[:30])
    origins = grid.coordinates[some, :2]
    damaged: set[str] | None = set() if layout.damaged else None
    got = read_patches(slide, grid.view, origins, shape, stride_yx=grid.stride_yx, damaged=damaged)
    for (x, y), patch in zip(origins.tolist()[:6], got, strict=False):
        want = oracle.patch_at(written.levels[n], x, y, shape, scale, ds, own, to_baseline)
        off = np.abs(patch - np.clip(want, 0, 255)).max()
        resampled = (want != np.rint(want)).any()
        # OpenCV works with fixed-point weights; a pixel that is drawn from the finer level is rounded twice.
        assert off <= (1.5 if resampled else 0) + (layout.vendor == "aperio" and n > 0), (x, y, off)
    if layout.codec != "jpeg":
        fast = read_patches(slide, grid.view, origins, shape, stride_yx=grid.stride_yx, damaged=damaged, fast=True)
        assert np.array_equal(got, fast)


HEALTH = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@given(data=st.data())
@settings(max_examples=50, derandomize=True, deadline=None, suppress_health_check=HEALTH)
def test_patches_of_every_layout_are_those_of_plain_numpy(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check(data, tmp_path_factory.getbasetemp())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@given(data=st.data())
@settings(max_examples=3000, derandomize=not ANEW, deadline=None, suppress_health_check=HEALTH)
def test_patches_of_every_layout_are_those_of_plain_numpy_at_length(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check(data, tmp_path_factory.getbasetemp())


@given(layout=layouts())
@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=HEALTH)
def test_levels_of_every_layout_are_what_was_written(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> None:
    layout = Layout(**{**vars(layout), "damaged": ()})
    slide, written = opened(layout, tmp_path_factory.getbasetemp())
    for n, want in enumerate(written.levels):
        assert slide.level(n).shape[:2] == want.shape[:2]
        most = 1 if layout.vendor == "aperio" and n else 0  # .5 may be rounded up or down
        assert np.abs(slide.region(n, (0, 0, *want.shape[:2]), rgb=True).astype(int) - want).max() <= most, n
        if slide.levels[n].colour == "rgb":
            lazy = slide.level(n)[5:, ::3].compute(scheduler="sync").astype(int)
            assert np.abs(lazy - want[5:, ::3]).max() <= most, n


def test_slides_read_at_once_in_threads_keep_their_pixels(tmp_path: Path) -> None:
    kinds = [
        Layout(codec="jpeg", missing=((0, 4),), factors=(1, 2)),
        Layout(codec="zlib", planar=True, missing=((0, 9),)),
        Layout(vendor="leica", size_yx=(384, 576), areas=((24, 24, 180, 240),), factors=(1, 4), codec="jpeg"),
        Layout(vendor="aperio", size_yx=(384, 576), factors=(1, 4), missing=((1, 1), (0, 5)), codec="jpeg"),
        Layout(kind="rgba", codec="webp", cut=True, damaged=((0, 3),)),
    ]
    slides = [opened(kind, tmp_path) for kind in kinds]
    barrier = threading.Barrier(8)

    def look(i: int) -> None:
        if i < 8:
            barrier.wait()
        slide, written = slides[i % len(slides)]
        factor = (1, 2, 1.5, 4)[i % 4]
        grid = dfx.PatchGrid.over(slide, shape=48, stride=40, resolution=1 / factor, units="baseline", mask=None)
        n, scale, ds = oracle.level_and_scale(written.downsamples, 1 / factor, "baseline", 0.25, 40)
        xy = grid.coordinates[np.random.default_rng(i).permutation(len(grid))[:12], :2]
        damaged: set[str] | None = set() if written.layout.damaged else None
        got = read_patches(slide, grid.view, xy, (48, 48), stride_yx=(40, 40), damaged=damaged)
        for (x, y), patch in zip(xy[:4].tolist(), got, strict=False):
            own, to_baseline = grid.view.downsample_xy or (ds, ds), grid.view.to_baseline
            want = oracle.patch_at(written.levels[n], x, y, (48, 48), scale, ds, own, to_baseline)
            assert np.abs(patch - np.clip(want, 0, 255)).max() <= 1.5, (i, x, y)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(look, range(80)))
