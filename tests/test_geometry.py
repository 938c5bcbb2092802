"""Where a level's pixels lie on the baseline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nets import Means
from pyramids import LINE, ROUND, lined, lines, mosaic, philips_xml, pyramid, smaller, write

import dfx
from dfx import resolution as res
from dfx.resolution import Units
from dfx.slides.factors import Image, downsample_xy

LAYOUTS: dict[str, dict[str, Any]] = {
    "odd sizes": {"size_xy": (1501, 1003), "factors": [(2, 2), (4, 4)]},
    "long": {"size_xy": (6001, 155), "factors": [(2, 2), (4, 4), (16, 16)], "tags": False},
    "tall": {"size_xy": (155, 6001), "factors": [(3, 3), (9, 9)], "tags": False},
    "long, rounded up": {"size_xy": (6001, 133), "factors": [(4, 4), (16, 16)], "tags": False, "rounding": "up"},
    "tall, rounded": {"size_xy": (141, 4999), "factors": [(2, 2), (3, 3)], "tags": False, "rounding": "nearest"},
    "padded": {"size_xy": (1300, 900), "factors": [(2, 2), (4, 4), (16, 16)], "pad": 64},
    "padded by more than a tile": {"size_xy": (1300, 900), "factors": [(2, 2), (4, 4)], "pad": 112},
    "padded along one axis": {"size_xy": (1300, 1024), "factors": [(2, 2), (4, 4)], "pad": 64},
    "padded, and nothing says so": {"size_xy": (1300, 900), "factors": [(2, 2), (4, 4)], "pad": 64, "tags": False},
    "other factors along y": {"size_xy": (1301, 1700), "factors": [(2, 4), (4, 16)]},
    "padded, other factors along y": {"size_xy": (1300, 1700), "factors": [(2, 4), (3, 5)], "pad": 64},
    "other factors along x, and nothing says so": {"size_xy": (1500, 900), "factors": [(3, 2)], "tags": False},
}


@pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_line_lies_where_it_lies_on_the_baseline_whichever_level_is_read(
    layout: str, order: str, tmp_path: Path
) -> None:
    told = LAYOUTS[layout]
    at = tuple(int(0.9 * (size - LINE)) for size in told["size_xy"])
    slide = dfx.open_slide(pyramid(tmp_path / "a.tif", at_xy=at, byteorder=order, **told), power=20)  # type: ignore[arg-type]
    wanted: list[tuple[Any, Units]] = [(0.5 * f, "mpp") for f in (1, 2, 3.3, 4, 8, 16)]
    wanted += [(n, "level") for n in range(len(slide.levels))] + [(5, "power"), ((0.5, 0.25), "baseline")]
    for resolution, units in wanted:
        picture, view = mosaic(slide, resolution, units)
        own = slide.levels[view.level].downsample_xy or (view.downsample,) * 2
        for axis, found in enumerate(lines(picture)):
            pixel = max(own[axis], view.to_baseline[axis])
            off = found * view.to_baseline[axis] - at[axis] - LINE / 2
            assert abs(off) <= pixel, (resolution, units, axis, off, view)


@pytest.mark.parametrize("pad", [64, 112])
def test_padding_is_no_part_of_the_slide(pad: int, tmp_path: Path) -> None:
    slide = dfx.open_slide(pyramid(tmp_path / "a.tif", (1301, 900), (100, 100), [(2, 2), (4, 4)], pad=pad))
    assert [level.dimensions for level in slide.levels] == [(1301, 900), (650, 450), (325, 225)]
    assert [level.downsample_xy for level in slide.levels] == [(1, 1), (2, 2), (4, 4)]
    for n, level in enumerate(slide.levels):
        pixels = np.asarray(slide.level(n).compute(scheduler="sync"))
        assert np.array_equal(pixels, smaller(lined((1301, 900), (100, 100)), (2**n, 2**n), "down", None)), n
        grid = dfx.PatchGrid.over(slide, shape=100, resolution=n, units="level", mask=None)
        patches = np.asarray(dfx.patches(slide, grid).compute(scheduler="sync"))
        for (x0, y0, _, _), patch in zip(grid.coordinates.tolist(), patches, strict=True):
            own = pixels[y0 : y0 + 100, x0 : x0 + 100]
            assert np.array_equal(patch[: own.shape[0], : own.shape[1]], own)  # a level's own pixels
            assert (patch[own.shape[0] :] == 255).all()
            assert (patch[:, own.shape[1] :] == 255).all()
        assert level.dimensions == grid.view.size_xy


@pytest.mark.parametrize("layout", ["padded", "padded, other factors along y", "long", "tall"])
def test_masks_and_thumbnails_are_not_stretched_by_a_level(layout: str, tmp_path: Path) -> None:
    told = LAYOUTS[layout]
    at = tuple(int(0.6 * size) for size in told["size_xy"])
    slide = dfx.open_slide(pyramid(tmp_path / "a.tif", at_xy=at, **told), power=20)  # type: ignore[arg-type]
    mask = slide.tissue_mask()
    for picture in (slide.thumbnail(max(told["size_xy"]) // 8), np.where(mask[..., None], np.uint8(0), np.uint8(200))):
        for axis, found in enumerate(lines(picture)):
            pixel = told["size_xy"][axis] / picture.shape[1 - axis]
            assert abs(found * pixel - at[axis] - LINE / 2) <= max(pixel, 16), axis


@given(
    whole=st.tuples(st.integers(2, 20_000), st.integers(2, 20_000)),
    factor=st.sampled_from([2, 3, 4, 5, 8, 10, 16, 32]),
    rounding=st.sampled_from(["down", "up", "nearest"]),
    value=st.floats(0.3, 40),
    units=st.sampled_from(["mpp", "level"]),
    shape=st.tuples(st.integers(1, 500), st.integers(1, 500)),
)
def test_positions_are_the_references_and_pixels_lie_less_than_one_off(
    whole: tuple[int, int], factor: int, rounding: str, value: float, units: Units, shape: tuple[int, int]
) -> None:
    level = tuple(max(1, int(ROUND[rounding](n / factor))) for n in whole)
    mean = (whole[0] / level[0] + whole[1] / level[1]) / 2
    own = downsample_xy(Image(whole), Image(level))  # type: ignore[arg-type]
    if own is None:
        assert max(level) <= 2  # nothing can be said of so small a one
        return
    if min(level) > 2 * factor:
        assert own == (factor, factor)
    try:
        asked = value if units == "mpp" else 1
        args: tuple[Any, ...] = [1.0, mean], whole, asked, units
        view, plain = res.view(*args, mpp=(0.5, 0.5), downsamples_xy=[None, own]), res.view(*args, mpp=(0.5, 0.5))
    except dfx.ResolutionError:
        return
    assert (view.level, view.scale_xy, view.downsample) == (plain.level, plain.scale_xy, plain.downsample)
    true = own if view.level else (1.0, 1.0)
    origins = np.stack([np.linspace(0, n - 1, 40).astype(int) for n in view.size_xy], axis=1)
    corners, size = view.rectangles(origins, shape)
    expected, expected_size = plain.rectangles(origins, shape)
    for axis in (0, 1):
        where = origins[:, axis] * view.to_baseline[axis] / true[axis]
        if abs(whole[axis] / true[axis] - whole[axis] / view.downsample) < 1:
            assert view.to_baseline[axis] == plain.to_baseline[axis]
            assert view.size_xy[axis] == plain.size_xy[axis]
            assert np.array_equal(corners[:, axis], expected[:, axis])
            assert size[axis] == expected_size[axis]
        else:
            assert view.size_xy[axis] == plain.size_xy[axis] or units == "level"
            assert np.abs(corners[:, axis] - where).max() <= 0.5 + 1e-6
            extent = shape[1 - axis] * view.to_baseline[axis] / true[axis]
            assert abs(size[axis] - max(1, extent)) <= 0.5 + 1e-6


# Stores


def test_features_of_levels_that_lay_elsewhere_before_are_not_mixed_with_those_of_now(tmp_path: Path) -> None:
    """A store of a version that read the mean factor is not resumed where that was wrong, and is where it was not."""
    for name, size in (("long", (6001, 155)), ("plain", (601, 403))):
        slide = pyramid(tmp_path / f"{name}.tif", size, (100, 100), [(2, 2), (4, 4)], tags=False)
        dfx.DeepFeatureExtractor(Means(), verbose=False).run(
            [slide],
            patch_mode=False,
            patch_input_shape=(32, 32),
            input_resolutions=[{"resolution": 2.0, "units": "mpp"}],
            auto_get_mask=False,
            output_type="zarr",
            save_dir=tmp_path / name,
        )
        store = json.loads((tmp_path / name / f"{name}.zarr" / "zarr.json").read_text())
        mean = (6001 / 3000 + 155 / 77) / 2  # wrong along x: level 1 is chosen by it
        assert store["attributes"]["dfx"]["fingerprint"].get("downsample") == ([2, mean] if name == "long" else None)


def test_squares_of_other_tools_lie_on_level_0_whichever_level_they_are_read_from(tmp_path: Path) -> None:
    import h5py

    at = 5000, 60
    slide = dfx.open_slide(pyramid(tmp_path / "a.tif", (6001, 155), at, [(2, 2), (4, 4)], tags=False))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["coords"] = np.array([[x, 0] for x in range(0, 6001, 128)])
        told = {"patch_size": 32, "target_magnification": 5, "level0_magnification": 20, "patch_size_level0": 128}
        file["coords"].attrs.update(told)
    grid = dfx.PatchGrid.from_h5(tmp_path / "a.h5", slide)
    assert grid.view.level > 0
    patches = np.asarray(dfx.patches(slide, grid).compute(scheduler="sync")).astype(float)
    dark = np.clip(255 - patches[:, :10].mean(axis=(1, 3)) - 75, 0, None)
    where = grid.coordinates[:, 0, None] + (np.arange(32) + 0.5) * 4
    assert abs((dark * where).sum() / dark.sum() - at[0] - LINE / 2) <= 4


@pytest.mark.parametrize("kind", ["aperio", "philips"])
def test_levels_that_openslide_reads_lie_where_it_reads_them(kind: str, tmp_path: Path) -> None:
    """Of a long slide by the factor of each axis; where OpenSlide has a factor from the file, by that."""
    import openslide

    size, at, factors = (6001, 155), (5200, 80), (1, 4, 16)
    image = lined(size, at)
    if kind == "aperio":
        description = {"description": "Aperio Image Library v11\r\n6001x155 (64x64) RAW|AppMag = 20|MPP = 0.5"}
        rest = {"description": "Aperio Image Library v11\r\n6001x155 -> less"}
        levels = [smaller(image, (f, f), "down", None) for f in factors]
    else:
        description, rest = (
            philips_xml([0.0005 * f for f in factors]) | {"software": "Philips DP v1.0"},
            {"subfiletype": 1},
        )
        levels = [image, *(smaller(image, (f, f), "down", 64) for f in factors[1:])]
    path = write(tmp_path / "a.tif", [(level, rest if n else description) for n, level in enumerate(levels)])
    slide = dfx.open_slide(path, backend="openslide")
    assert [level.downsample for level in slide.levels] == list(openslide.OpenSlide(path).level_downsamples)
    assert [level.downsample_xy for level in slide.levels] == [(f, f) for f in factors]
    for mpp in (0.5, 2, 8):
        picture, view = mosaic(slide, mpp, "mpp")
        own = slide.levels[view.level].downsample_xy or (1, 1)
        for axis, found in enumerate(lines(picture)):
            off = found * view.to_baseline[axis] - at[axis] - LINE / 2
            assert abs(off) <= max(own[axis], view.to_baseline[axis]) + 1, (mpp, axis, off)
