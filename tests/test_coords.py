"""Patches that TRIDENT and CLAM laid, taken as they are: the same squares, resampled to the same size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cloudpickle
import cv2
import dask
import h5py
import numpy as np
import pytest
from nets import Means, means
from numpy.typing import NDArray

import dfx
from dfx import PatchGrid, arrays
from dfx.errors import CallError, CallTypeError
from dfx.export import export
from dfx.plan import Options
from dfx.store import Store, finish

TRIDENT = {"patch_size": 64, "level0_magnification": 20, "target_magnification": 10, "overlap": 0, "name": "made"}


def written(path: Path, corners: Any, attributes: dict[str, Any]) -> Path:
    with h5py.File(path, "w") as file:
        file["coords"] = np.asarray(corners).reshape(-1, 2)
        file["coords"].attrs.update(attributes)
    return path


def cut(pixels: NDArray[np.uint8], corners: NDArray[Any], size: int, to: int) -> NDArray[np.uint8]:
    """Squares of an image, white beyond it, averaged to a size."""
    height, width = pixels.shape[:2]
    white = np.full((height + size, width + size, 3), 255, np.uint8)
    white[:height, :width] = pixels
    squares = [white[y : y + size, x : x + size] for x, y in corners.tolist()]
    return np.stack([cv2.resize(square, (to, to), interpolation=cv2.INTER_AREA) for square in squares])


def test_the_squares_of_trident_are_read_and_resampled_to_its_size(
    slide: dfx.Slide, made_pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    corners = np.array([[x, y] for y in range(0, 1300, 128) for x in range(0, 1600, 128)])
    grid = PatchGrid.from_h5(written(tmp_path / "a.h5", corners, TRIDENT | {"patch_size_level0": 128}), slide)
    assert grid.shape_yx == (128, 128)
    assert grid.pixels_yx == (64, 64)
    assert grid.stride_yx == (128, 128)  # a lattice: two bytes a step
    assert sorted(grid.coordinates[:, :2].tolist()) == sorted(corners.tolist())
    assert np.array_equal(grid.to_baseline(), grid.coordinates)
    expected = cut(made_pixels, grid.coordinates[:, :2], 128, 64)
    assert np.array_equal(dfx.patches(slide, grid).compute(), expected)
    features = dfx.features(slide, grid, Means()).compute()
    np.testing.assert_allclose(features, means(expected), atol=1e-5)


def test_the_order_is_that_of_a_grid_over_the_slide(slide: dfx.Slide, tmp_path: Path) -> None:
    over = PatchGrid.over(slide, shape=32, resolution=1.0, units="mpp", mask=None)
    corners = np.random.default_rng(0).permutation(over.to_baseline()[:, :2])
    path = written(tmp_path / "a.h5", corners, TRIDENT | {"patch_size": 32})
    grid = PatchGrid.from_h5(path, slide)
    assert np.array_equal(grid.coordinates, over.to_baseline())
    assert np.array_equal(dfx.patches(slide, grid).compute(), dfx.patches(slide, over).compute())


def test_contours_of_clam_begin_anywhere(slide: dfx.Slide, made_pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    contours = [(31, 7, 5, 4), (803, 411, 6, 3)]
    corners = np.array([[x + 96 * i, y + 96 * j] for x, y, n, m in contours for i in range(n) for j in range(m)])
    path = written(tmp_path / "a.h5", corners, {"patch_size": 96, "patch_level": 0, "custom_downsample": 2})
    grid = PatchGrid.from_h5(path, slide)
    assert grid.stride_yx == (1, 1)
    assert (grid.shape_yx, grid.pixels_yx) == ((96, 96), (48, 48))
    assert sorted(grid.coordinates[:, :2].tolist()) == sorted(corners.tolist())
    expected = cut(made_pixels, grid.coordinates[:, :2], 96, 48)
    assert np.array_equal(dfx.patches(slide, grid).compute(), expected)


def test_coarse_patches_are_read_from_a_coarse_level(slide: dfx.Slide, tmp_path: Path) -> None:
    corners = np.array([[13, 26], [403, 1001], [1599, 1299]])
    path = written(tmp_path / "a.h5", corners, {"patch_size": 64, "patch_level": 1, "downsample": [4.0, 4.0]})
    grid = PatchGrid.from_h5(path, slide)
    assert (grid.view.level, grid.shape_yx, grid.pixels_yx) == (1, (256, 256), (64, 64))
    level = np.asarray(slide.level(1).compute())
    places = np.rint(grid.coordinates[:, :2] / 4).astype(int)
    assert np.array_equal(dfx.patches(slide, grid).compute(), cut(level, places, 64, 64))


@pytest.mark.parametrize("downsample", [3.0, 49.0, 4.000061, 15.99])
def test_whole_positions_stay_whole_at_every_downsample(downsample: float) -> None:
    from dfx.resolution import View

    view = View(1, (downsample, downsample), downsample, (2**20, 2**20), 1.0, "baseline")
    xy = np.stack([np.arange(100_000)] * 2, axis=1)
    corners, size = view.rectangles(xy, (448, 449))
    assert np.array_equal(corners, np.rint(xy / downsample))
    assert size == (round(449 / downsample), round(448 / downsample))


def test_what_dfx_exports_comes_back(slide: dfx.Slide, tmp_path: Path) -> None:
    over = PatchGrid.over(slide, shape=64, resolution=1.0, units="mpp", stride=32)
    plan = arrays.make_plan(slide, over, [dfx.load_encoder(Means())], Options())
    store = stored(plan, tmp_path / "made.zarr")
    for path in export(store, "trident", tmp_path / "t"):
        grid = PatchGrid.from_h5(path, slide)
        assert np.array_equal(grid.coordinates, over.to_baseline())
        assert np.array_equal(dfx.patches(slide, grid)[:9].compute(), dfx.patches(slide, over)[:9].compute())
    clam = PatchGrid.from_h5(export(store, "clam", tmp_path / "c")[0], slide)  # which knows no overlap
    assert sorted(clam.coordinates.tolist()) == sorted(over.to_baseline().tolist())


def stored(plan: Any, path: Path) -> Path:
    store = Store.prepare(path, plan)
    with dask.config.set(scheduler="synchronous"):
        arrays.written(arrays.lazy_features(plan), store.target).compute()
    finish(path)
    return path


def test_a_store_of_such_patches_says_so_and_is_exported_again(slide: dfx.Slide, tmp_path: Path) -> None:
    corners = np.array([[5, 9], [300, 77], [1001, 640]])
    path = written(tmp_path / "a.h5", corners, TRIDENT | {"patch_size_level0": 128})
    grid = PatchGrid.from_h5(path, slide)
    plan = arrays.make_plan(slide, grid, [dfx.load_encoder(Means())], Options())
    assert plan.fingerprint()["pixels"] == [64, 64]
    store = stored(plan, tmp_path / "made.zarr")
    found = dfx.open_features(store)
    assert np.array_equal(found.to_baseline(), grid.coordinates)
    assert found.attrs["patches"]["pixels"] == [64, 64]
    with h5py.File(export(store, "trident", tmp_path)[1]) as file:
        attributes = {name: file["coords"].attrs[name] for name in TRIDENT}
        assert attributes == TRIDENT
        assert file["coords"].attrs["patch_size_level0"] == 128
        assert np.array_equal(file["coords"][:], grid.coordinates[:, :2])
    assert Store.prepare(store, plan).missing() == []
    other = PatchGrid.from_h5(written(path, corners, TRIDENT | {"patch_size": 32, "patch_size_level0": 128}), slide)
    with pytest.raises(dfx.StoreError, match="pixels: stored"):
        Store.prepare(store, arrays.make_plan(slide, other, [dfx.load_encoder(Means())], Options()))


def test_a_task_stays_below_4_kb_where_positions_need_four_bytes(slide: dfx.Slide, resnet18: dfx.EncoderSpec) -> None:
    from dataclasses import replace

    grid = PatchGrid.over(slide, shape=64, stride=16, resolution=0.5, units="mpp", mask=None)
    wide = replace(grid, steps_xy=grid.steps_xy.astype(np.uint32) * 16 + 2**17, stride_yx=(1, 1), resampled_yx=(32, 32))
    graph = dask.optimize(dfx.features(slide, wide, resnet18))[0].__dask_graph__()
    assert max(len(cloudpickle.dumps(task)) for task in dict(graph).values()) < 4096


def test_no_patches_make_an_empty_grid(slide: dfx.Slide, tmp_path: Path) -> None:
    grid = PatchGrid.from_h5(written(tmp_path / "a.h5", np.empty((0, 2), np.int64), TRIDENT), slide)
    assert len(grid) == 0
    assert dfx.patches(slide, grid).shape == (0, 64, 64, 3)


@pytest.mark.parametrize(
    ("corners", "attributes", "message"),
    [
        ([[0, 0]], {}, "doesn't say how large its patches are"),
        ([[0, 0]], {"patch_size": 64, "patch_level": 9}, "has levels 0 to 2"),
        ([[0, 0]], TRIDENT | {"patch_size": "large"}, "patch_size = 'large'"),
        ([[0, 0]], TRIDENT | {"target_magnification": 0}, "target_magnification = "),
        ([[0, 0]], TRIDENT | {"level0_width": 9000, "level0_height": 9000}, "of a slide of 9000 x 9000 pixels"),
        ([[0, 0], [1600, 5]], TRIDENT, "give the file of this slide"),
        ([[-1, 0]], TRIDENT, "below 0"),
        ([[np.nan, 0]], TRIDENT, "no level-0 pixels"),
        ([[0, 0]], TRIDENT | {"patch_size": 100_000}, "use a smaller one"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(
    slide: dfx.Slide, tmp_path: Path, corners: Any, attributes: dict[str, Any], message: str
) -> None:
    with pytest.raises(dfx.DfxError, match=message):
        PatchGrid.from_h5(written(tmp_path / "a.h5", corners, attributes), slide)


def test_what_is_no_file_of_coordinates_is_refused(slide: dfx.Slide, tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("no")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["features"] = np.zeros((3, 2))
    with h5py.File(tmp_path / "shape.h5", "w") as file:
        file["coords"] = np.zeros((3, 5))
    for name in ("text.h5", "other.h5", "shape.h5", "absent.h5"):
        with pytest.raises(CallError, match=name):
            PatchGrid.from_h5(tmp_path / name, slide)
    with pytest.raises(CallTypeError):
        PatchGrid.from_h5(3, slide)  # type: ignore[arg-type]
    with pytest.raises(CallTypeError):
        PatchGrid.from_h5(tmp_path / "text.h5", "slide.svs")  # type: ignore[arg-type]
