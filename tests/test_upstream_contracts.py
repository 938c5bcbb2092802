"""Behaviours of Dask, distributed, zarr, tifffile and cloudpickle that dfx leans on: an upgrade fails here first."""

from __future__ import annotations

import inspect
import io
import types
from pathlib import Path

import cloudpickle
import dask
import dask.array as da
import distributed
import numpy as np
import pytest
import tifffile
import zarr


@pytest.fixture
def array(tmp_path: Path) -> zarr.Array:
    return zarr.create_array(
        str(tmp_path / "a"),
        shape=(100, 4),
        chunks=(10, 4),
        dtype="f4",
        fill_value=np.nan,
        compressors=None,
        config={"write_empty_chunks": True},
    )


def test_to_zarr_of_an_existing_array_at_one_chunk_keeps_a_task_a_block(array: zarr.Array) -> None:
    lazy = da.from_array(np.arange(200, dtype="u2").reshape(100, 2), chunks=(10, 2))
    mapped = da.map_blocks(lambda x: np.repeat(x, 2, axis=1).astype("f4"), lazy, chunks=(lazy.chunks[0], (4,)))
    with dask.config.set({"array.chunk-size": 10 * 4 * 4}):
        written = da.to_zarr(mapped, array, compute=False)
    assert isinstance(written, da.Array)  # sliceable, unlike a Delayed
    assert written.numblocks[0] == 10
    assert len(dict(dask.optimize(written)[0].__dask_graph__())) <= 20
    assert not (Path(str(array.store_path.store.root)) / "c").exists()  # nothing is written before compute
    dask.compute(written.blocks[3:5], scheduler="sync")
    names = sorted(p.name for p in (Path(str(array.store_path.store.root)) / "c").iterdir())
    assert names == ["3", "4"]
    assert np.array_equal(array[30:50, 0], np.arange(60, 100, 2))


def test_a_chunk_of_nothing_but_fill_is_written_when_asked(array: zarr.Array) -> None:
    array[0:10] = np.nan
    assert (Path(str(array.store_path.store.root)) / "c" / "0" / "0").stat().st_size == 160


def test_a_zarr_array_pickles_small(array: zarr.Array) -> None:
    import pickle

    assert len(pickle.dumps(array)) < 1500


def test_consolidating_keeps_attributes_and_an_update_keeps_the_consolidation(tmp_path: Path) -> None:
    group = zarr.create_group(str(tmp_path / "g"), attributes={"dfx": {"status": "running"}})
    group.create_array("x", shape=(3,), dtype="i8")
    with pytest.warns(UserWarning, match="Consolidated metadata"):
        zarr.consolidate_metadata(str(tmp_path / "g"))
    zarr.open_group(str(tmp_path / "g"), mode="r+").attrs["dfx"] = {"status": "complete"}
    again = zarr.open_group(str(tmp_path / "g"), mode="r")
    assert again.attrs["dfx"] == {"status": "complete"}
    assert again.metadata.consolidated_metadata is not None


def test_query_planning_can_be_asked_for() -> None:
    assert da.array_expr_enabled() is False


def test_the_console_scripts_are_dask_worker_and_dask_scheduler_as_subcommands() -> None:
    from importlib.metadata import entry_points

    assert {"worker", "scheduler"} <= {e.name for e in entry_points(group="dask_cli")}


def test_persisted_blocks_are_futures_one_a_block() -> None:
    with distributed.Client(processes=False, n_workers=1, dashboard_address=":0", set_as_default=False) as client:
        held = client.persist(da.ones((100, 4), chunks=(10, 4)).blocks[2:5])
        futures = {f.key for f in distributed.futures_of(held)}
        assert {tuple(k[0]) for k in np.array(held.__dask_keys__(), object).reshape(3, 1, 3)} == futures


def test_get_worker_is_an_error_outside_a_task() -> None:
    with pytest.raises(ValueError, match="No worker found"):
        distributed.get_worker()


def test_a_tiff_decoder_is_a_pure_function_of_bytes(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "t.tif", image, tile=(64, 64), photometric="rgb", compression="zlib")
    with tifffile.TiffFile(tmp_path / "t.tif") as tif:
        page = tif.pages[0]
        decode, offsets, counts = page.decode, page.dataoffsets, page.databytecounts
        assert page.jpegtables is None
    data = (tmp_path / "t.tif").read_bytes()
    tile, _, _ = decode(data[offsets[3] : offsets[3] + counts[3]], 3, jpegtables=None, jpegheader=None)
    assert np.array_equal(tile[0], image[64:, 64:])
    assert decode(None, 0)[0] is None


def test_series_are_reached_by_index_and_have_levels_of_pages(tmp_path: Path) -> None:
    image = np.zeros((3, 64, 64), np.uint16)
    tifffile.imwrite(tmp_path / "t.ome.tif", image, metadata={"axes": "CYX"})
    with tifffile.TiffFile(tmp_path / "t.ome.tif") as tif:
        level = tif.series[0].levels[0]
        assert level.axes == "CYX"
        assert level.shape == (3, 64, 64)
        assert level.keyframe.axes == "YX"
        assert len(list(level.pages)) == 3


def test_cloudpickle_takes_functions_and_classes_apart_as_given_modules_need_it() -> None:
    shared = [1]

    def function(x: int, y: int = 2) -> int:
        return x + y + shared[0]

    class Local:
        pass

    pickler = cloudpickle.Pickler(io.BytesIO())
    _, (code, scope, *_), (attributes, slots), *_, set_state = pickler.reducer_override(function)
    assert code is function.__code__
    assert scope is not function.__globals__
    assert attributes == vars(function)
    assert {"__globals__", "__defaults__", "__closure__"} <= set(slots)
    assert set_state is cloudpickle.cloudpickle._function_setstate
    empty = types.FunctionType(code, {}, None, None, (types.CellType(),))
    set_state(empty, (attributes, slots))
    assert empty(1) == 4
    make, (*args, tracker, extra), *others = pickler.reducer_override(Local)
    assert isinstance(tracker, str)
    assert make(*args, tracker, extra) is Local
    assert make(*args, None, extra) is not Local  # without the number, a process makes a class of its own
    assert others


def test_the_names_that_dfx_calls_are_there() -> None:
    assert "large-graph-warning-threshold" in dask.config.get("distributed.admin")
    assert "fancy" in inspect.signature(da.from_array).parameters
    assert "loop" in inspect.signature(distributed.as_completed.__init__).parameters
