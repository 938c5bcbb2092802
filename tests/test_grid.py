"""Grid and resolution, against slow oracles in plain numpy and Python."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import dfx
from dfx import resolution as res
from dfx.errors import CallError, CallTypeError, ResolutionError
from dfx.grid import PatchGrid, covered
from dfx.masks.tissue import otsu, otsu_threshold


@dataclass
class Bare:
    """As much of a slide as a grid asks for."""

    size: tuple[int, int]
    downsamples: tuple[float, ...] = (1.0, 4.0, 16.0)
    mpp: tuple[float, float] | None = (0.25, 0.25)
    power: float | None = 40.0
    tissue: NDArray[np.bool_] | None = None
    identity: str = "bare"
    bounds: tuple[int, int, int, int] | None = None

    def view(self, resolution: Any, units: res.Units) -> res.View:
        return res.view(self.downsamples, self.size, resolution, units, mpp=self.mpp, power=self.power, name="bare")

    def tissue_mask(self, method: object = "otsu") -> NDArray[np.bool_]:
        assert self.tissue is not None
        return self.tissue


sizes = st.tuples(st.integers(1, 5000), st.integers(1, 5000))
pyramids = st.sampled_from([(1.0,), (1.0, 2.0005), (1.0, 4.0, 16.0), (1.0, 2.0, 4.0, 8.0), (1.0, 3.0012, 9.1)])
shapes = st.tuples(st.integers(1, 700), st.integers(1, 700))


@given(sizes, pyramids, shapes, shapes, st.floats(0.1, 8), st.sampled_from(["mpp", "power", "baseline"]))
@settings(max_examples=150, deadline=None)
def test_a_grid_covers_the_slide_as_the_reference_does(
    size: tuple[int, int],
    downsamples: tuple[float, ...],
    shape: tuple[int, int],
    stride: tuple[int, int],
    factor: float,
    units: res.Units,
) -> None:
    value = {"mpp": 0.25 * factor, "power": 40 / factor, "baseline": 1 / factor}[units]
    bare = Bare(size, downsamples)
    scales = [
        {"mpp": 0.25 * ds / value, "power": (1 / 40 * ds) / (1 / value), "baseline": ds / (1 / value)}[units]
        for ds in downsamples
    ]
    level = max((n for n, s in enumerate(scales) if round(s, 3) <= 1), default=0)
    wanted = [round(round(side / downsamples[level]) * scales[level]) for side in size]  # half to even, as numpy
    if min(wanted) < 1:
        with pytest.raises(ResolutionError, match="smaller than one pixel"):
            bare.view(value, units)
        return
    if (wanted[0] // stride[1] + 1) * (wanted[1] // stride[0] + 1) > 20_000:
        return
    grid = PatchGrid.over(bare, shape=shape, stride=stride, resolution=value, units=units, mask=None)
    assert grid.view.level == level
    assert abs(grid.view.size_xy[0] - wanted[0]) <= 1  # round() of Python floats may differ in the last digit
    width, height = grid.view.size_xy
    oracle = {
        (x, y, x + shape[1], y + shape[0]) for y in range(0, height, stride[0]) for x in range(0, width, stride[1])
    }
    rows = grid.coordinates
    assert rows.dtype == np.int64
    assert len(rows) == len(oracle) == len(grid)
    assert {tuple(r) for r in rows.tolist()} == oracle


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_the_mask_keeps_what_a_slow_look_keeps(data: st.DataObject) -> None:
    size = data.draw(st.tuples(st.integers(1, 3000), st.integers(1, 3000)))
    rows, columns = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    mask = np.random.default_rng(data.draw(st.integers(0, 2**32))).random((rows, columns)) < data.draw(st.floats(0, 1))
    shape = data.draw(st.tuples(st.integers(1, 900), st.integers(1, 900)))
    ratio = data.draw(st.sampled_from([0.0, 0.25, 0.5, 0.99, 1.0]))
    origins = data.draw(
        st.lists(st.tuples(st.integers(0, size[0] - 1), st.integers(0, size[1] - 1)), min_size=1, max_size=20)
    )
    kept = covered(np.array(origins), shape, size, mask, ratio)
    for (x, y), got in zip(origins, kept, strict=True):
        sx, sy = columns / size[0], rows / size[1]
        x0, x1 = (int(min(np.float32(v * sx), columns)) for v in (x, x + shape[1]))
        y0, y1 = (int(min(np.float32(v * sy), rows)) for v in (y, y + shape[0]))
        x0, y0 = min(x0, columns - 1), min(y0, rows - 1)
        window = mask[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
        true = int(window.sum())
        assert got == (true > 0 and (true == window.size or true > window.size * ratio))


def test_patches_finer_than_a_mask_cell_are_kept() -> None:
    grid = PatchGrid.over(Bare((2220, 2967)), shape=64, resolution=1.0, units="baseline", mask=np.ones((10, 10)))
    assert len(grid) == 35 * 47


def test_min_mask_ratio_drops_patches_at_the_edge_of_tissue() -> None:
    mask = np.zeros((8, 8), bool)
    mask[:, :3] = True  # patches of 2 cells: full, half, none, none
    bare = Bare((800, 800))
    all_touched = PatchGrid.over(bare, shape=200, resolution=1.0, units="baseline", mask=mask)
    mostly = PatchGrid.over(bare, shape=200, resolution=1.0, units="baseline", mask=mask, min_mask_ratio=0.5)
    assert sorted(set(all_touched.coordinates[:, 0].tolist())) == [0, 200]
    assert sorted(set(mostly.coordinates[:, 0].tolist())) == [0]


def test_a_block_is_spatially_compact_and_the_order_is_that_of_the_docstring() -> None:
    grid = PatchGrid.over(Bare((8000, 8000)), shape=100, resolution=1.0, units="baseline", mask=None)
    order = sorted(((x // 100) // 16, y, x) for x in range(0, 8000, 100) for y in range(0, 8000, 100))
    assert [(x, y) for _, y, x in order] == [tuple(r) for r in grid.coordinates[:, :2].tolist()]
    block = grid.coordinates[:256]
    assert np.ptp(block[:, 0]) == np.ptp(block[:, 1]) == 1500


@pytest.mark.parametrize("kind", ["array", "png", "npy", "3-D"])
def test_a_mask_may_be_an_array_or_a_file(kind: str, tmp_path: Path) -> None:
    mask = np.zeros((10, 10), np.uint8)
    mask[2:4, 3:6] = 200
    given: Any = mask
    if kind == "png":
        cv2.imwrite(str(tmp_path / "m é.png"), mask)
        given = tmp_path / "m é.png"
    elif kind == "npy":
        np.save(tmp_path / "m.npy", mask)
        given = str(tmp_path / "m.npy")
    elif kind == "3-D":
        given = np.stack([mask * 0, mask, mask * 0], axis=2)
    grid = PatchGrid.over(Bare((1000, 1000)), shape=100, resolution=1.0, units="baseline", mask=given)
    assert sorted(map(tuple, grid.coordinates[:, :2].tolist())) == [(x, y) for x in (300, 400, 500) for y in (200, 300)]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"shape": 0}, CallError),
        ({"shape": 12.5}, CallTypeError),
        ({"shape": (1, 2, 3)}, CallTypeError),
        ({"shape": "224"}, CallTypeError),
        ({"stride": -1}, CallError),
        ({"stride": 1, "resolution": 0.001, "units": "mpp"}, CallError),
        ({"resolution": 0}, CallError),
        ({"resolution": float("nan")}, CallError),
        ({"resolution": "0.5"}, CallTypeError),
        ({"resolution": True}, CallTypeError),
        ({"units": "pixels"}, CallError),
        ({"units": "level", "resolution": 0.5}, CallError),
        ({"units": "level", "resolution": 7}, ResolutionError),
        ({"units": "level", "resolution": -1}, CallError),
        ({"min_mask_ratio": 1.5}, CallError),
        ({"min_mask_ratio": "all"}, CallTypeError),
        ({"mask": 7}, CallTypeError),
        ({"mask": np.zeros(5)}, CallError),
        ({"mask": np.array([["a"]])}, CallError),
        ({"mask": "nowhere.png"}, CallError),
    ],
)
def test_a_bad_grid_is_refused(change: dict[str, Any], error: type[Exception]) -> None:
    given = {"shape": 224, "resolution": 0.5, "units": "mpp", "mask": None} | change
    with pytest.raises(error) as caught:
        PatchGrid.over(Bare((20_000, 20_000)), **given)
    assert isinstance(caught.value, dfx.DfxError)


@pytest.mark.parametrize(("units", "value", "lack"), [("mpp", 0.5, "mpp"), ("power", 10, "power")])
def test_units_that_the_slide_can_not_place_are_an_error_with_the_remedy(
    units: res.Units, value: float, lack: str
) -> None:
    bare = Bare((1000, 1000), mpp=None, power=None)
    with pytest.raises(ResolutionError, match=rf"bare has no .*{lack}="):
        PatchGrid.over(bare, resolution=value, units=units, mask=None)
    assert len(PatchGrid.over(bare, resolution=1, units="level", mask=None)) == 4


def test_positions_go_back_to_the_baseline() -> None:
    grid = PatchGrid.over(Bare((4000, 4000)), shape=(100, 200), resolution=(0.5, 1.0), units="mpp", mask=None)
    assert np.allclose(grid.to_baseline(), grid.coordinates * [2, 4, 2, 4])


def test_a_grid_survives_pickling_and_its_digest_tells_grids_apart() -> None:
    one = PatchGrid.over(Bare((4000, 4000)), mask=None)
    two = PatchGrid.over(Bare((4000, 4000)), mask=None, stride=200)
    assert pickle.loads(pickle.dumps(one)).digest == one.digest != two.digest


@given(st.integers(0, 2**32), st.integers(1, 200), st.integers(0, 255), st.integers(0, 255))
@settings(max_examples=100, deadline=None)
def test_otsu_is_scikit_images(seed: int, size: int, low: int, high: int) -> None:
    from skimage.filters import threshold_otsu

    rng = np.random.default_rng(seed)
    grey = rng.integers(min(low, high), max(low, high) + 1, (size, 7)).astype(np.uint8)
    grey[: size // 3] //= 3
    if len(np.unique(grey)) == 1:
        assert otsu_threshold(grey) == grey[0, 0]
    else:
        assert otsu_threshold(grey) == threshold_otsu(grey)


def test_an_even_picture_has_no_tissue() -> None:
    assert not otsu(np.full((20, 20, 3), 240, np.uint8)).any()
    assert not math.isnan(otsu_threshold(np.zeros((1, 1), np.uint8)))
