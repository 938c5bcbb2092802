"""The lazy arrays: lazy, small, one task a block, and right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cloudpickle
import dask
import dask.array as da
import distributed
import numpy as np
import pytest
import zarr
from nets import Means, means
from numpy.typing import NDArray

import dfx
from dfx import arrays
from dfx.errors import CallError, CallTypeError, SlideError, StoreError
from dfx.plan import Options
from dfx.slides.cache import OPENED
from dfx.slides.level import Level
from dfx.store import Store


@pytest.fixture
def grid(slide: dfx.Slide) -> dfx.PatchGrid:
    return dfx.PatchGrid.over(slide, shape=64, resolution=0.5, units="mpp", mask="tissue")


def test_patches_and_features_belong_to_the_rows_of_the_grid(slide: dfx.Slide, grid: dfx.PatchGrid) -> None:
    patches, features = dfx.patches(slide, grid, block_size=50), dfx.features(slide, grid, Means(), block_size=50)
    assert isinstance(patches, da.Array)
    assert patches.shape == (len(grid), 64, 64, 3)
    assert features.shape == (len(grid), 6)
    pixels, got = dask.compute(patches, features, scheduler="threads")
    assert np.allclose(got, means(pixels), atol=1e-5)
    x, y = grid.coordinates[60, :2]
    assert np.array_equal(pixels[60], slide.region(0, (y, x, y + 64, x + 64), rgb=True))
    assert np.array_equal(patches[60].compute(scheduler="sync"), pixels[60])


def test_nothing_is_read_before_compute(slide: dfx.Slide, grid: dfx.PatchGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a tile was decoded")

    monkeypatch.setattr(Level, "decode", refuse)
    dfx.patches(slide, grid)
    dfx.features(slide, grid, Means())
    with pytest.raises(AssertionError, match="decoded"):
        dfx.patches(slide, grid).compute(scheduler="sync")


def graph(array: da.Array) -> dict[Any, Any]:
    return dict(dask.optimize(array)[0].__dask_graph__())


def test_one_task_a_block_below_4_kb_however_large_the_slide(
    slide: dfx.Slide, tmp_path: Path, resnet18: dfx.EncoderSpec
) -> None:
    grid = dfx.PatchGrid.over(slide, shape=64, stride=16, resolution=0.5, units="mpp", mask="tissue")
    plan = arrays.measured(arrays.make_plan(slide, grid, [resnet18], Options()), "cpu")
    store = Store.prepare(tmp_path / "a-slide-with-a-name-as-long-as-those-of-TCGA-are-DX1.5B3C2D1E.zarr", plan)
    written = arrays.written(arrays.lazy_features(plan), store.target)
    blocks = plan.blocks
    assert blocks > 5
    tasks = graph(written)
    assert written.numblocks[0] == blocks
    assert len(tasks) <= 2 * blocks  # the block, and an alias that moves no data
    assert sum(type(task).__name__ != "Alias" for task in tasks.values()) == blocks
    assert max(len(cloudpickle.dumps(task)) for task in tasks.values()) < 4096
    for lazy in (dfx.patches(slide, grid), dfx.features(slide, grid, resnet18)):
        assert len(graph(lazy)) <= 2 * blocks
        assert max(len(cloudpickle.dumps(task)) for task in graph(lazy).values()) < 4096


def test_a_run_sends_one_task_a_block_and_nothing_of_other_blocks(
    slide: dfx.Slide, grid: dfx.PatchGrid, tmp_path: Path
) -> None:
    plan = arrays.make_plan(slide, grid, [dfx.load_encoder(Means())], Options(block_size=4))
    store = Store.prepare(tmp_path / "a.zarr", plan)
    tasks = arrays.Tasks.of(arrays.written(arrays.lazy_features(plan), store.target))
    assert len(set(tasks.keys)) == plan.blocks
    some = tasks.part({n: tasks.keys[n] for n in (1, 3)})
    assert some.keys() == {tasks.keys[1], tasks.keys[3]}  # neither an alias nor a neighbour
    dask.get(some, [tasks.keys[1], tasks.keys[3]])
    assert store.missing() == [block for block in range(plan.blocks) if block not in (1, 3)]


def test_no_pixel_and_no_weight_travels_with_a_task(slide: dfx.Slide, grid: dfx.PatchGrid) -> None:
    import torch

    heavy = torch.nn.Sequential(Means(), torch.nn.Linear(6, 2_000_000))
    lazy = dfx.features(slide, grid, heavy)
    assert max(len(cloudpickle.dumps(task)) for task in graph(lazy).values()) < 4096


def test_the_same_array_has_the_same_name_and_another_has_another(slide: dfx.Slide, grid: dfx.PatchGrid) -> None:
    encoder = dfx.load_encoder(Means())
    one = dfx.features(slide, grid, encoder)
    assert one.name == dfx.features(slide, grid, encoder).name
    assert one.name != dfx.features(slide, grid, encoder, batch_size=3).name
    assert one.name != dfx.features(slide, grid, dfx.load_encoder(Means(), mean=(0.1, 0, 0))).name
    other = dfx.PatchGrid.over(slide, shape=64, resolution=0.5, units="mpp", mask=None)
    assert one.name != dfx.features(slide, other, encoder).name


def test_an_empty_grid_gives_empty_arrays(slide: dfx.Slide) -> None:
    grid = dfx.PatchGrid.over(slide, shape=64, resolution=0.5, units="mpp", mask=np.zeros((5, 5)))
    assert dfx.patches(slide, grid).compute().shape == (0, 64, 64, 3)
    assert dfx.features(slide, grid, Means()).compute().shape == (0, 6)


def test_other_processes_open_the_slide_and_give_the_same(
    processes: distributed.Client, slide: dfx.Slide, grid: dfx.PatchGrid, resnet18: dfx.EncoderSpec
) -> None:
    OPENED.clear()
    far = dfx.features(slide, grid, resnet18, block_size=40).compute(scheduler=processes)
    near = dfx.features(slide, grid, resnet18, block_size=40).compute(scheduler="sync")
    assert np.allclose(far, near, atol=1e-5)


def test_a_module_of_main_reaches_workers_in_other_processes(
    processes: distributed.Client, slide: dfx.Slide, grid: dfx.PatchGrid
) -> None:
    import torch

    import __main__

    class OfTheNotebook(Means):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    OfTheNotebook.__module__, OfTheNotebook.__qualname__ = "__main__", "OfTheNotebook"
    __main__.OfTheNotebook = OfTheNotebook  # type: ignore[attr-defined]
    try:
        with processes.as_current():
            got = dfx.features(slide, grid, OfTheNotebook()).compute()
    finally:
        del __main__.OfTheNotebook
    want = dfx.features(slide, grid, Means()).compute(scheduler="sync")
    assert np.allclose(got, 2 * want, atol=1e-5)


def test_a_worker_that_joins_later_has_the_module_too(slide: dfx.Slide, grid: dfx.PatchGrid) -> None:
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        distributed.Client(cluster) as client,
    ):
        lazy = dfx.features(slide, grid, Means(), block_size=30)
        first = set(client.scheduler_info()["workers"])
        cluster.scale(2)
        client.wait_for_workers(2)
        (late,) = set(client.scheduler_info(n_workers=-1)["workers"]) - first
        with dask.annotate(workers=[late]):
            got = client.compute(lazy, workers=[late], optimize_graph=True).result()
    assert np.allclose(got, dfx.features(slide, grid, Means()).compute(scheduler="sync"), atol=1e-5)


def test_blocks_that_are_not_chunks_are_refused(slide: dfx.Slide, grid: dfx.PatchGrid) -> None:
    lazy = dfx.features(slide, grid, Means(), block_size=50)
    target = zarr.create_array({}, shape=lazy.shape, chunks=(30, 6), dtype="f4")
    with pytest.raises(StoreError, match="block_size=30"):
        arrays.written(lazy, target)


@pytest.mark.parametrize(
    ("change", "error"),
    [({"block_size": 0}, CallError), ({"block_size": 2.5}, CallTypeError), ({"batch_size": -1}, CallError)],
)
def test_bad_options_are_refused(
    change: dict[str, Any], error: type[Exception], slide: dfx.Slide, grid: dfx.PatchGrid
) -> None:
    with pytest.raises(error):
        dfx.features(slide, grid, Means(), **change)


def test_a_slide_that_fails_says_so_through_dask(slide: dfx.Slide, tmp_path: Path) -> None:
    copy = tmp_path / "broken.svs"
    data = bytearray(Path(slide.url).read_bytes())
    part = slide.levels[0].parts[0]
    at = int(part.offsets[0, 2, 3])
    data[at : at + 200] = bytes(200)
    copy.write_bytes(data)
    broken = dfx.open_slide(copy)
    grid = dfx.PatchGrid.over(broken, shape=64, resolution=0.5, units="mpp", mask=None)
    with pytest.raises(SlideError, match=r"tile 17 \(row 2, column 3\) of level 0 of .*broken.svs"):
        dfx.features(broken, grid, Means()).compute(scheduler="threads")


def test_query_planning_is_refused(slide: dfx.Slide, grid: dfx.PatchGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(da, "array_expr_enabled", lambda: True)
    with pytest.raises(CallError, match="query-planning"):
        dfx.patches(slide, grid)


def level_mean(slide: dfx.Slide) -> NDArray[Any]:
    return np.asarray(slide.level(0).mean((0, 1)).compute(scheduler="threads"))


def test_a_level_is_reduced_without_holding_it(slide: dfx.Slide, made_pixels: NDArray[np.uint8]) -> None:
    assert np.allclose(level_mean(slide), made_pixels.mean((0, 1)))
