"""xarray opens a store as it is: its arrays name their dimensions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import pytest
import xarray
from conftest import WSI
from nets import Means
from torch import Tensor, nn

import dfx


class Pair(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))[:, :2]


def test_a_store_opens_in_xarray(
    made_slide: Path, tmp_path: Path, extractor: dfx.DeepFeatureExtractor, client: distributed.Client
) -> None:
    store = extractor.run([made_slide], save_dir=tmp_path, client=client, **WSI)[made_slide]  # type: ignore[index, call-overload]
    found = dfx.open_features(store)
    with xarray.open_zarr(store) as dataset:
        assert dataset.features.dims == ("patch", "feature")
        assert dataset.coordinates.dims == ("patch", "corner")
        assert dataset.mask.dims == ("y", "x")
        assert dataset.features.chunks == found.features.chunks
        assert np.array_equal(dataset.features.values, found.features.compute())
        assert np.array_equal(dataset.coordinates.values, found.coordinates.compute())
        assert dataset.coordinates.dtype == np.int64
        assert found.mask is not None
        assert np.array_equal(dataset.mask.values, found.mask.cells)
        assert dataset.mask.dtype == bool
    with xarray.open_zarr(store, consolidated=False) as dataset:
        assert dict(dataset.sizes) == {"patch": len(found.coordinates), "feature": 6, "corner": 4, "y": 81, "x": 100}


def test_encoders_of_different_width_open_as_one_group(
    made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    extractor = dfx.DeepFeatureExtractor([Means(), Pair()], verbose=False)
    store = extractor.run([made_slide], save_dir=tmp_path, client=client, **WSI)[made_slide]  # type: ignore[index, call-overload]
    with xarray.open_datatree(store, engine="zarr") as tree:
        n = tree["coordinates"].sizes["patch"]
        features = tree["features"].to_dataset()
        assert dict(features.sizes) == {"patch": n, "feature_Means": 6, "feature_Pair": 2}
        assert np.array_equal(features.Pair.values, dfx.open_features(store, "Pair").features.compute())
    with xarray.open_zarr(store, group="features") as dataset:
        assert set(dataset) == {"Means", "Pair"}


def test_loose_patches_and_slides_without_patches_open_too(
    made_slide: Path, tmp_path: Path, extractor: dfx.DeepFeatureExtractor, client: distributed.Client
) -> None:
    loose: Any = np.zeros((3, 8, 8, 3), np.uint8)
    store = extractor.run(loose, labels=[1, 2, 3], save_dir=tmp_path, output_type="zarr")
    with xarray.open_zarr(store) as dataset:
        assert dataset.labels.dims == ("patch",)
        assert dict(dataset.sizes) == {"patch": 3, "feature": 6}
    with pytest.warns(UserWarning, match="no patch"):
        empty = extractor.run([made_slide], masks=[np.zeros((4, 4))], save_dir=tmp_path, client=client, **WSI)
    with xarray.open_zarr(empty[made_slide]) as dataset:  # type: ignore[index, call-overload]
        assert dataset.sizes["patch"] == 0


def test_a_store_in_a_bucket_opens_with_storage_options(
    moto: str, made_slide: Path, extractor: dfx.DeepFeatureExtractor, client: distributed.Client
) -> None:
    import s3fs

    options = {"key": "a", "secret": "b", "client_kwargs": {"endpoint_url": f"http://{moto}"}}
    s3fs.S3FileSystem(**options).call_s3("create_bucket", Bucket="xarray")
    run: dict[str, Any] = {"save_dir": "s3://xarray/out", "storage_options": options, "client": client, **WSI}
    store = extractor.run([made_slide], **run)[made_slide]  # type: ignore[index, call-overload]
    with xarray.open_zarr(store, storage_options=options) as dataset:
        wanted = dfx.open_features(store, storage_options=options).features
        assert np.array_equal(dataset.features.values, wanted.compute(scheduler="sync"))


def test_a_store_without_names_of_dimensions_is_read_and_resumed(
    made_slide: Path, tmp_path: Path, extractor: dfx.DeepFeatureExtractor, client: distributed.Client
) -> None:
    run: dict[str, Any] = {"save_dir": tmp_path, "client": client, **WSI}
    store = extractor.run([made_slide], **run)[made_slide]  # type: ignore[index, call-overload]
    before = dfx.open_features(store).features.compute()
    for file in store.rglob("zarr.json"):
        said = json.loads(file.read_text())
        said.pop("dimension_names", None)
        said.pop("consolidated_metadata", None)
        file.write_text(json.dumps(said))
    assert np.array_equal(dfx.open_features(store).features.compute(), before)
    (store / "features" / "c" / "0" / "0").unlink()
    assert extractor.run([made_slide], **run)[made_slide] == store  # type: ignore[index, call-overload]
    assert np.array_equal(dfx.open_features(store).features.compute(), before)
