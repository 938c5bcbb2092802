"""Several encoders in one pass: tiles decoded once, an array each, resumed as one."""

from __future__ import annotations

import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import pytest
import zarr
from conftest import WSI
from nets import Means, means
from numpy.typing import NDArray
from torch import Tensor, nn

import dfx
from dfx import arrays, cli
from dfx.encoders import encode
from dfx.errors import CallError, CallTypeError, StoreError
from dfx.plan import Options
from dfx.slides.level import Level
from dfx.store import Store


class Corner(nn.Module):
    """Gives what lies in the upper left corner, as float16."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 0, 0].half()


@pytest.fixture
def both() -> dfx.DeepFeatureExtractor:
    return dfx.DeepFeatureExtractor([Means(), Corner()], verbose=False)


def expected(path: Path) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.int64]]:
    slide = dfx.open_slide(path)
    grid = dfx.PatchGrid.over(slide, shape=64, resolution=0.5, units="mpp")
    patches = dfx.patches(slide, grid).compute(scheduler="sync")
    return means(patches), (patches[:, 0, 0].astype(np.float32) / 255).astype(np.float16), grid.coordinates


def test_each_encoder_has_its_own_array_of_its_own_width_and_dtype(
    both: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path, processes: distributed.Client
) -> None:
    result = both.run([made_slide], save_dir=tmp_path, client=processes, block_size=50, **WSI)
    first, second, coordinates = expected(made_slide)
    group = zarr.open_group(str(tmp_path / "made.zarr"), mode="r")
    assert group["features/Means"].chunks == (50, 6)
    assert group["features/Corner"].dtype == np.float16
    assert np.allclose(group["features/Means"][...], first, atol=1e-5)
    assert np.array_equal(group["features/Corner"][...], second)
    assert np.array_equal(group["coordinates"][...], coordinates)
    assert group.attrs["dfx"]["status"] == "complete"
    found = dfx.open_features(result[made_slide], "Corner")  # type: ignore[index]
    assert found.encoders == ("Means", "Corner")
    assert found.encoder["dimension"] == 3
    assert np.array_equal(found.features.compute(), second)


def test_which_of_several_is_wanted_must_be_said(
    both: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    both.run([made_slide], save_dir=tmp_path, client=client, **WSI)
    store = dfx.open_features(tmp_path / "made.zarr")
    assert len(store.coordinates)
    with pytest.raises(StoreError, match=r"Means, Corner: say which with encoder="):
        _ = store.features
    with pytest.raises(StoreError, match="holds features of Means, Corner, not of resnet18"):
        dfx.open_features(tmp_path / "made.zarr", "resnet18")


def test_arrays_in_memory_are_named_and_of_their_own_dtype(
    both: dfx.DeepFeatureExtractor, made_slide: Path, client: distributed.Client
) -> None:
    result: Any = both.run([made_slide], client=client, **WSI | {"output_type": "dict"})
    first, second, _ = expected(made_slide)
    features = result[made_slide]["features"]
    assert list(features) == ["Means", "Corner"]
    assert np.allclose(features["Means"], first, atol=1e-5)
    assert features["Corner"].dtype == np.float16
    assert np.array_equal(features["Corner"], second)


def test_beyond_the_threshold_they_are_lazy(
    both: dfx.DeepFeatureExtractor, made_slide: Path, client: distributed.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfx.memory.fits", lambda *args: False)
    result: Any = both.run([made_slide], client=client, **WSI | {"output_type": "dict"})
    features = result[made_slide]["features"]
    assert not isinstance(features["Corner"], np.ndarray)
    assert np.array_equal(features["Corner"].compute(), expected(made_slide)[1])


def test_every_tile_is_decoded_once_for_all(
    made_slide: Path, tmp_path: Path, client: distributed.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int, int]] = []
    original = Level.decode

    def decode(self: Level, source: Any, n: int, part: Any, row: int, column: int, **options: Any) -> Any:
        calls.append((n, row, column))
        return original(self, source, n, part, row, column, **options)

    monkeypatch.setattr(Level, "decode", decode)
    common: dict[str, Any] = WSI | {"auto_get_mask": False, "patch_input_shape": 256}
    dfx.DeepFeatureExtractor(Means(), verbose=False).run([made_slide], save_dir=tmp_path / "1", client=client, **common)
    one, calls[:] = sorted(calls), []
    dfx.DeepFeatureExtractor([Means(), Corner()], verbose=False).run(
        [made_slide], save_dir=tmp_path / "2", client=client, **common
    )
    assert sorted(calls) == one != []


def test_a_block_counts_when_its_last_array_has_it(
    both: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    both.run([made_slide], save_dir=tmp_path, client=client, block_size=50, **WSI)
    store = tmp_path / "made.zarr"
    before = {path: path.read_bytes() for path in store.rglob("c/*/0")}
    (store / "features/Corner/c/1/0").unlink()
    kept = store / "features/Means/c/0/0"
    stamp = kept.stat().st_mtime_ns
    both.run([made_slide], save_dir=tmp_path, client=client, block_size=50, **WSI)
    assert {path: path.read_bytes() for path in store.rglob("c/*/0")} == before
    assert kept.stat().st_mtime_ns == stamp


def test_another_set_of_encoders_is_another_run(
    both: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    both.run([made_slide], save_dir=tmp_path, client=client, **WSI)
    one = dfx.DeepFeatureExtractor(Means(), verbose=False)
    with pytest.raises(dfx.RunError, match="another run"):
        one.run([made_slide], save_dir=tmp_path, client=client, **WSI)
    one.run([made_slide], save_dir=tmp_path, client=client, overwrite=True, **WSI)
    assert dfx.open_features(tmp_path / "made.zarr").features.shape[1] == 6


def test_a_task_of_three_encoders_is_below_4_kb(slide: dfx.Slide, tmp_path: Path, resnet18: dfx.EncoderSpec) -> None:
    specs = [resnet18, *(dfx.load_encoder(name, weights="random") for name in ("vit_tiny_patch16_224", "resnet50"))]
    grid = dfx.PatchGrid.over(slide, shape=64, stride=16, resolution=0.5, units="mpp")
    plan = arrays.make_plan(slide, grid, specs, Options())
    lazy = arrays.written(arrays.lazy_features(plan), Store.prepare(tmp_path / "a.zarr", plan).target)
    tasks = dict(lazy.__dask_graph__())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = dict(lazy.__dask_optimize__(tasks, lazy.__dask_keys__()))
    heavy = [task for task in graph.values() if type(task).__name__ != "Alias"]
    assert len(heavy) == plan.blocks > 3
    assert max(len(pickle.dumps(task)) for task in heavy) < 4096


def test_loose_patches_take_several_too(both: dfx.DeepFeatureExtractor, tmp_path: Path) -> None:
    patches = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3)).astype(np.uint8)
    found: Any = both.run(patches)
    assert np.allclose(found["features"]["Means"], means(patches), atol=1e-5)
    path: Any = both.run(patches, save_dir=tmp_path, output_type="zarr")
    store = dfx.open_features(path, "Corner")
    assert np.array_equal(store.features.compute(), found["features"]["Corner"])


def test_a_list_that_can_not_be_is_refused() -> None:
    with pytest.raises(CallError, match="empty list"):
        dfx.DeepFeatureExtractor([])
    with pytest.raises(CallError, match="given twice"):
        dfx.DeepFeatureExtractor(["resnet18", "resnet18"], weights="random")
    with pytest.raises(CallError, match="2 models need weights"):
        dfx.DeepFeatureExtractor(["resnet18", "resnet50"], weights=["random"])
    with pytest.raises(CallTypeError, match="not a list"):
        dfx.DeepFeatureExtractor("resnet18", weights=["random"])


def test_two_of_one_name_are_told_apart(made_slide: Path, tmp_path: Path, client: distributed.Client) -> None:
    common: dict[str, Any] = {"save_dir": tmp_path, "client": client, **WSI}
    dfx.DeepFeatureExtractor([Means(), Means()], verbose=False).run([made_slide], **common)
    assert dfx.open_features(tmp_path / "made.zarr").encoders == ("Means", "Means-2")


def test_from_the_command_line(made_slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["extract", str(made_slide), "--encoder", "resnet18", "--encoder", "vit_tiny_patch16_224"]
    call += ["--weights", "random", "--resolution", "2", "--units", "mpp", "--patch", "112", "--out", str(tmp_path)]
    assert cli.main([*call, "--quiet"]) == 0
    store = tmp_path / "made.zarr"
    wanted = dfx.open_features(store, "vit_tiny_patch16_224")
    slide = dfx.open_slide(made_slide)
    grid = dfx.PatchGrid.over(slide, shape=112, resolution=2)
    patches = dfx.patches(slide, grid).compute(scheduler="sync")
    alone = encode(dfx.load_encoder("vit_tiny_patch16_224", weights="random"), patches)
    assert np.allclose(wanted.features.compute(), alone, atol=1e-4)
    assert cli.main(["show", str(store), "--out", str(tmp_path / "a.png")]) == 2
    assert "--encoder" in capsys.readouterr().err
    assert cli.main(["show", str(store), "--encoder", "resnet18", "--out", str(tmp_path / "a.png")]) == 0
    shutil.rmtree(store)
