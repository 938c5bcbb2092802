"""Exports, read back as the tools that they are for read them: by the keys and attributes that those look up.

The readers here are written from what NOTES on those tools say; none of their code is in them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import geopandas
import h5py
import numpy as np
import pytest
import torch
import zarr
from conftest import WSI
from nets import Means
from numpy.typing import NDArray

import dfx
from dfx import cli
from dfx.errors import CallError, StoreError
from dfx.export import FORMATS, export
from dfx.slides.synthetic import write_slide

HALF = [{"resolution": 0.5, "units": "mpp"}]
JOB = "20x_64px_0px_overlap"


class Twos(Means):
    """Another encoder, of another width."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[:, :2] * 2


def extracted(folder: Path, slide: Path, model: Any = None, **options: Any) -> Path:
    extractor = dfx.DeepFeatureExtractor(model or Means(), verbose=False)
    return Path(extractor.run([slide], save_dir=folder, **(WSI | options))[slide])


@pytest.fixture(scope="module")
def store(made_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One encoder, 20x, whole level-0 pixels."""
    return extracted(tmp_path_factory.mktemp("one"), made_slide)


@pytest.fixture(scope="module")
def several(made_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two encoders, patches that overlap by half at 10x."""
    coarse = [{"resolution": 1.0, "units": "mpp"}]
    options = {"input_resolutions": coarse, "stride_shape": (32, 32)}
    return extracted(tmp_path_factory.mktemp("two"), made_slide, [Means(), Twos()], **options)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0.5 mpp of a scanner that has 0.499: positions that are no whole level-0 pixels."""
    folder = tmp_path_factory.mktemp("uneven")
    return extracted(folder, write_slide(folder / "scan.svs", 1200, 1000, mpp=0.499))


@pytest.fixture(scope="module")
def empty(made_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.warns(UserWarning, match="no patch under its mask"):
        return extracted(tmp_path_factory.mktemp("none"), made_slide, masks=[np.zeros((8, 8), bool)])


@pytest.fixture(scope="module")
def placeless(made_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a slide that says nothing of its resolution."""
    import tifffile

    folder = tmp_path_factory.mktemp("bare")
    pixels = np.random.default_rng(0).integers(0, 200, (300, 400, 3), np.uint8)
    tifffile.imwrite(folder / "bare.tif", pixels, tile=(64, 64), photometric="rgb")
    return extracted(
        folder, folder / "bare.tif", input_resolutions=[{"resolution": 1.0, "units": "baseline"}], masks=[None]
    )


def features_of(path: Path, encoder: str | None = None) -> NDArray[Any]:
    return np.asarray(dfx.open_features(path, encoder).features.compute())


def read_trident(path: Path) -> tuple[NDArray[Any], NDArray[Any], dict[str, Any]]:
    """What TRIDENT's slide encoders take: features, coordinates, and what stands on these."""
    with h5py.File(path, "r") as file:
        attributes = dict(file["coords"].attrs)
        for needed in ("patch_size", "patch_size_level0", "level0_magnification", "target_magnification", "overlap"):
            assert needed in attributes, needed
        return file["features"][:], file["coords"][:], attributes


def test_trident_finds_patches_and_features_in_its_job_folder(store: Path, tmp_path: Path) -> None:
    written = export(store, "trident", tmp_path)
    assert written == [
        tmp_path / JOB / "patches" / "made_patches.h5",
        tmp_path / JOB / "features_Means" / "made.h5",
    ]
    features, coords, attributes = read_trident(written[1])
    assert np.array_equal(features, features_of(store))
    assert features.dtype == np.float32
    assert np.array_equal(coords, dfx.open_features(store).to_baseline()[:, :2])
    assert coords.dtype == np.int64
    with h5py.File(written[0]) as file:
        assert np.array_equal(file["coords"][:], coords)
        patches = dict(file["coords"].attrs)
    assert patches.pop("savetodir") == str(written[0].parent)
    assert attributes.pop("savetodir") == str(written[1].parent)
    assert (
        attributes
        == patches
        == {
            "patch_size": 64,
            "patch_size_level0": 64,
            "level0_magnification": 20,
            "target_magnification": 20,
            "overlap": 0,
            "name": "made",
            "level0_width": 1600,
            "level0_height": 1300,
        }
    )
    assert all(isinstance(attributes[name], np.integer) for name in attributes if name != "name")


def test_encoders_that_trident_knows_lie_where_it_looks_for_them(store: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "made.zarr"
    shutil.copytree(store, renamed)
    group = zarr.open_group(str(renamed), mode="r+")
    said: Any = group.attrs["dfx"]
    group.attrs["dfx"] = said | {"encoder": said["encoder"] | {"name": "CONCH-v1.5"}}
    assert export(renamed, "trident", tmp_path / "out")[1].parent.name == "features_conch_v15"


def test_positions_off_the_pixels_are_rounded_to_the_nearest(uneven: Path, tmp_path: Path) -> None:
    (_, path) = export(uneven, "trident", tmp_path)
    _, coords, attributes = read_trident(path)
    exact = dfx.open_features(uneven).coordinates.compute()[:, :2] * (0.5 / 0.499)
    assert (exact != np.round(exact)).any()
    assert np.array_equal(coords, np.round(exact))
    assert np.abs(coords - exact).max() <= 0.5
    assert path.parts[-3] == JOB  # 0.5 mpp is 20x, whatever the scanner
    size = attributes["patch_size"] * attributes["level0_magnification"] / attributes["target_magnification"]
    assert size == pytest.approx(64 * 0.5 / 0.499)
    assert attributes["patch_size_level0"] == round(size)


def test_overlap_and_magnification_are_those_that_the_encoder_saw(several: Path, tmp_path: Path) -> None:
    _, path, other = export(several, "trident", tmp_path)
    assert path.parts[-3:] == ("10x_64px_32px_overlap", "features_Means", "made.h5")
    assert other.parts[-2] == "features_Twos"
    _, coords, attributes = read_trident(path)
    assert (attributes["patch_size"], attributes["patch_size_level0"], attributes["overlap"]) == (64, 128, 32)
    assert not (coords % 64).any()
    assert np.array_equal(read_trident(other)[0], features_of(several, "Twos"))


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_slide_features_are_those_of_all_patches(several: Path, tmp_path: Path, pool: str) -> None:
    path = export(several, "trident", tmp_path, encoder="Twos", pool=pool)[-1]  # type: ignore[arg-type]
    assert path.parts[-2] == f"slide_features_{pool}-Twos"
    features, coords, _ = read_trident(path)
    expected = getattr(features_of(several, "Twos").astype(np.float64), pool)(axis=0)
    assert features.shape == (2,)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected, rtol=1e-6)
    assert len(coords) == len(features_of(several, "Twos"))


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_slide_features_leave_out_what_is_not_finite_and_say_so(store: Path, tmp_path: Path, pool: Any) -> None:
    holed = tmp_path / "holed.zarr"
    shutil.copytree(store, holed)
    array: Any = zarr.open_array(holed, path="features", mode="r+")
    array[3, 2], array[5] = np.nan, np.inf
    with pytest.warns(UserWarning, match=f"2 of {array.shape[0]} patches of .*holed.zarr .*NaN or infinite: .*{pool}"):
        (*_, path) = export(holed, "trident", tmp_path / "out", pool=pool)
    rest = np.delete(features_of(store), [3, 5], axis=0).astype(np.float64)
    with h5py.File(path) as file:
        assert np.allclose(file["features"][:], getattr(rest, pool)(axis=0))
    array[...] = np.nan
    with pytest.raises(StoreError, match=f"so the slide has no {pool}"):
        export(holed, "trident", tmp_path / "none", pool=pool)


def test_clam_reads_a_bag_by_its_tensor_and_by_its_h5(uneven: Path, tmp_path: Path) -> None:
    patches, bag, tensor = export(uneven, "clam", tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in (patches, bag, tensor)] == [
        "patches/scan.h5",
        "h5_files/scan.h5",
        "pt_files/scan.pt",
    ]
    loaded = torch.load(tensor, weights_only=True)
    assert loaded.dtype == torch.float32
    assert np.array_equal(loaded.numpy(), features_of(uneven))
    exact = dfx.open_features(uneven).to_baseline()[:, :2]
    with h5py.File(bag) as file:
        assert file["features"].dtype == np.float32
        assert np.array_equal(file["features"][:], loaded.numpy())
        assert file["coords"].dtype == np.int32
        assert np.array_equal(file["coords"][:], np.rint(exact))
    with h5py.File(patches) as file:
        assert np.array_equal(file["coords"][:], np.rint(exact))
        attributes = file["coords"].attrs
        assert (attributes["patch_level"], attributes["patch_size"]) == (0, round(64 * 0.5 / 0.499))
        assert attributes["downsample"].tolist() == [1, 1]
        assert attributes["level_dim"].tolist() == attributes["downsampled_level_dim"].tolist() == [1200, 1000]


def test_stamp_infers_positions_in_microns(uneven: Path, tmp_path: Path) -> None:
    (path,) = export(uneven, "stamp", tmp_path)
    assert path == tmp_path / "Means" / "scan.h5"
    with h5py.File(path) as file:
        assert "stamp_version" not in file.attrs  # a newer one than the reader's is refused there
        assert file.attrs["unit"] == "um"
        assert file.attrs["feat_type"] == "tile"
        assert file.attrs["extractor"] == "Means"
        size_um, size_px = file.attrs["tile_size_um"], file.attrs["tile_size_px"]
        assert size_um / size_px == pytest.approx(0.5)  # the mpp that STAMP works out
        assert size_px == 64
        feats, coords = file["feats"][:], file["coords"][:]
    assert feats.dtype == np.float16
    np.testing.assert_array_equal(feats, features_of(uneven).astype(np.float16))
    assert coords.dtype == np.float32
    np.testing.assert_allclose(coords, dfx.open_features(uneven).coordinates.compute()[:, :2] * 0.5, rtol=1e-6)


def test_features_beyond_float16_are_refused_and_leave_nothing(made_slide: Path, tmp_path: Path) -> None:
    class Large(Means):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = super().forward(x) * 1e6
            found[x.amin((1, 2, 3)) > 0.5, 0] = torch.nan  # which does not hide that others are too large
            return found

    with pytest.raises(StoreError, match="beyond float16"):
        export(extracted(tmp_path / "in", made_slide, Large()), "stamp", tmp_path / "out")
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == []


def test_anndata_has_a_row_a_patch_with_its_place(uneven: Path, tmp_path: Path) -> None:
    (path,) = export(uneven, "anndata", tmp_path)
    table = anndata.read_h5ad(path)
    assert np.array_equal(table.X, features_of(uneven))
    boxes = dfx.open_features(uneven).to_baseline()
    np.testing.assert_allclose(table.obsm["spatial"], (boxes[:, :2] + boxes[:, 2:]) / 2)
    assert np.array_equal(table.obs[["x", "y"]], np.rint(boxes[:, :2]))
    assert json.loads(table.uns["dfx"])["encoder"]["name"] == "Means"
    backed = anndata.read_h5ad(path, backed="r")
    assert backed.X[:2].shape == (2, 6)
    backed.file.close()


def test_spatialdata_has_tiles_and_a_table_an_encoder(several: Path, tmp_path: Path) -> None:
    (path,) = export(several, "spatialdata", tmp_path)
    root = zarr.open_group(str(path), mode="r")
    spec: Any = root.attrs["tile_spec"]
    assert {name: spec["tiles"][name] for name in ("height", "width", "stride_height", "stride_width", "mpp")} == {
        **{"height": 64, "width": 64, "stride_height": 32, "stride_width": 32},
        "mpp": 1.0,
    }
    assert spec["tiles"]["base_downsample"] == 2.0
    shapes = geopandas.read_parquet(path / "shapes" / "tiles" / "shapes.parquet")
    boxes = dfx.open_features(several).to_baseline()
    assert np.array_equal(shapes.geometry.bounds.to_numpy(), boxes)
    assert np.array_equal(shapes[["x", "y"]], boxes[:, :2])
    assert shapes["tile_id"].tolist() == list(range(len(boxes)))
    for name in ("Means", "Twos"):
        table = anndata.read_zarr(str(path / "tables" / f"{name}_tiles"))
        assert np.array_equal(table.X, features_of(several, name))
        links = table.uns["spatialdata_attrs"]
        assert (links["region"], links["region_key"], links["instance_key"]) == ("tiles", "library_id", "tile_id")
        assert table.obs["library_id"].dtype == "category"
        assert set(table.obs["library_id"]) == {"tiles"}
        assert table.obs["tile_id"].tolist() == list(range(len(boxes)))
        assert table.obs_names.tolist() == [str(i) for i in range(len(boxes))]
    assert root.metadata.consolidated_metadata is not None


@pytest.mark.parametrize("to", FORMATS)
def test_a_slide_without_patches_becomes_files_without_rows(empty: Path, tmp_path: Path, to: Any) -> None:
    found = {}
    for path in export(empty, to, tmp_path):
        if path.suffix == ".h5":
            with h5py.File(path) as file:
                found |= {name: file[name].shape for name in file}
        elif path.suffix == ".h5ad":
            found["features"] = anndata.read_h5ad(path).shape
        elif path.suffix == ".zarr":
            found["features"] = anndata.read_zarr(str(path / "tables" / "Means_tiles")).shape
            assert len(geopandas.read_parquet(path / "shapes" / "tiles" / "shapes.parquet")) == 0
        else:
            found["features"] = tuple(torch.load(path, weights_only=True).shape)
    assert found.pop("features", None) or found.pop("feats") == (0, 6)
    assert found.pop("coords", (0, 2)) == (0, 2)
    assert not found


def test_the_mean_of_nothing_is_left_out_with_a_warning(empty: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has no patches, so it has no mean"):
        written = export(empty, "trident", tmp_path, pool="mean")
    assert [path.parent.name for path in written] == ["patches", "features_Means"]


def test_a_folder_gives_its_complete_stores_and_names_the_others(store: Path, uneven: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for path in (store, uneven):
        shutil.copytree(path, folder / path.name)
    shutil.copytree(store, folder / "half.zarr")
    group = zarr.open_group(str(folder / "half.zarr"), mode="r+")
    said: Any = group.attrs["dfx"]
    group.attrs["dfx"] = said | {"status": "failed", "failure": "a tile"}
    with pytest.warns(UserWarning, match=r"not complete, so not exported: half\.zarr of"):
        assert [path.name for path in export(folder, "stamp", tmp_path / "out")] == ["made.h5", "scan.h5"]
    with pytest.raises(StoreError, match="is failed, not complete: a tile"):
        export(folder / "half.zarr", "stamp", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_command_line_prints_what_it_wrote(
    store: Path, uneven: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["export", str(store), str(uneven), "--to", "stamp", "--out", str(tmp_path)]
    assert cli.main(line) == cli.DONE
    assert [Path(path).relative_to(tmp_path).as_posix() for path in capsys.readouterr().out.split()] == [
        "Means/made.h5",
        "Means/scan.h5",
    ]
    assert cli.main(line) == cli.BAD_CALL
    assert "exists: pass overwrite=True (--overwrite)" in capsys.readouterr().err


def test_nothing_is_written_when_one_of_the_stores_lacks_what_the_format_needs(
    store: Path, placeless: Path, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match="without microns per pixel, which STAMP needs"):
        export([store, placeless], "stamp", tmp_path / "out")
    with pytest.raises(StoreError, match="neither microns per pixel nor objective power"):
        export([store, placeless], "trident", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(export(placeless, "clam", tmp_path / "out")) == 3  # pixels are all that it needs


def test_what_is_no_square_goes_only_where_it_may(made_slide: Path, tmp_path: Path) -> None:
    oblong = extracted(tmp_path / "in", made_slide, patch_input_shape=(64, 128))
    for to in ("trident", "clam", "stamp"):
        with pytest.raises(StoreError, match="are squares"):
            export(oblong, to, tmp_path / "out")  # type: ignore[arg-type]
    (path,) = export(oblong, "spatialdata", tmp_path / "out")
    bounds = geopandas.read_parquet(path / "shapes/tiles/shapes.parquet").geometry.bounds
    assert set(bounds["maxx"] - bounds["minx"]) == {128}
    assert set(bounds["maxy"] - bounds["miny"]) == {64}


def test_files_that_are_there_stay_unless_told(store: Path, several: Path, tmp_path: Path) -> None:
    patches, features = export(store, "trident", tmp_path)
    before = features.read_bytes()
    with pytest.raises(CallError, match=r"features_Means/made\.h5 exists"):
        export(store, "trident", tmp_path)
    assert features.read_bytes() == before
    features.write_bytes(b"")
    seen = patches.stat().st_mtime_ns
    export(store, "trident", tmp_path, overwrite=True)
    assert np.array_equal(read_trident(features)[0], features_of(store))
    assert patches.stat().st_mtime_ns == seen  # the same patches: other encoders' features lie beside them
    assert list(tmp_path.rglob("*.partial")) == []


def test_a_second_encoder_joins_the_patches_of_the_first(several: Path, tmp_path: Path) -> None:
    export(several, "trident", tmp_path, encoder="Means")
    written = export(several, "trident", tmp_path, encoder="Twos")
    assert [p.parent.name for p in written] == ["patches", "features_Twos"]
    with h5py.File(written[0], "r+") as file:
        file["coords"][0] = 5
    with pytest.raises(CallError, match=r"made_patches\.h5 exists"):  # other patches: features would not belong
        export(several, "trident", tmp_path, encoder="Twos", overwrite=False)


def test_only_what_an_export_made_is_replaced(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(store, folder / "made.zarr")
    with pytest.raises(StoreError, match="was not exported by dfx"):  # the store itself
        export(folder / "made.zarr", "spatialdata", folder, overwrite=True)
    assert len(features_of(folder / "made.zarr"))
    (path,) = export(store, "spatialdata", tmp_path / "out")
    with pytest.raises(CallError, match="exists"):
        export(store, "spatialdata", tmp_path / "out")
    (path / "shapes" / "stale").write_text("")
    export(store, "spatialdata", tmp_path / "out", overwrite=True)
    assert not (path / "shapes" / "stale").exists()


def test_two_stores_of_one_name_are_told_apart_before_anything_is_written(
    store: Path, several: Path, tmp_path: Path
) -> None:
    with pytest.raises(CallError, match="both become"):
        export([store, several], "stamp", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_formats_with_one_place_ask_whose_features(several: Path, tmp_path: Path) -> None:
    for to in ("clam", "anndata"):
        with pytest.raises(StoreError, match=r"Means, Twos.*say whose with encoder="):
            export(several, to, tmp_path)  # type: ignore[arg-type]
    (path,) = export(several, "anndata", tmp_path, encoder="Twos")
    assert np.array_equal(anndata.read_h5ad(path).X, features_of(several, "Twos"))
    with pytest.raises(StoreError, match="not of nobody"):
        export(several, "stamp", tmp_path, encoder="nobody")


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", ".."])
def test_a_store_that_names_another_place_writes_nothing_outside(store: Path, tmp_path: Path, name: str) -> None:
    crafted = tmp_path / "in" / "made.zarr"
    shutil.copytree(store, crafted)
    group = zarr.open_group(str(crafted), mode="r+")
    said: Any = group.attrs["dfx"]
    group.attrs["dfx"] = said | {"encoder": said["encoder"] | {"name": name}}
    out = tmp_path / "out"
    try:
        written = export(crafted, "stamp", out)
    except StoreError:
        written = []
    assert all(out in path.resolve().parents for path in written)
    assert {p.name for p in tmp_path.iterdir()} <= {"in", "out"}


def test_a_bad_call_says_what_there_is(store: Path, tmp_path: Path) -> None:
    with pytest.raises(CallError, match="trident, clam, stamp, anndata, spatialdata, not to 'csv'"):
        export(store, "csv", tmp_path)  # type: ignore[arg-type]
    with pytest.raises(CallError, match="mean or max of a trident export"):
        export(store, "clam", tmp_path, pool="mean")
    with pytest.raises(CallError, match="no store"):
        export([], "clam", tmp_path)
    with pytest.raises(StoreError, match="no store of dfx"):
        export(tmp_path / "nowhere.zarr", "clam", tmp_path)


def test_features_pass_through_in_parts(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dfx.export import source

    largest = 0
    rows = source.Source.rows

    def watched(self: Any, features: Any, dtype: Any = None) -> Any:
        nonlocal largest
        for place, part in rows(self, features, dtype):
            largest = max(largest, len(part))
            yield place, part

    monkeypatch.setattr(source, "ROWS", 16)
    monkeypatch.setattr(source.Source, "rows", watched)
    for to in ("trident", "clam", "stamp"):
        paths = export(store, to, tmp_path / to)  # type: ignore[arg-type]
        assert largest == 16
        with h5py.File(paths[-1] if to != "clam" else paths[1]) as file:
            found = file["feats" if to == "stamp" else "features"][:]
        np.testing.assert_allclose(found, features_of(store), rtol=1e-3)
    assert np.array_equal(torch.load(tmp_path / "clam/pt_files/made.pt", weights_only=True), features_of(store))


READ = """
import sys
from spatialdata import match_table_to_element, read_zarr
from wsidata import open_wsi
sdata = read_zarr(sys.argv[1])
assert set(sdata.tables) == {"Means_tiles", "Twos_tiles"}, sdata
table = match_table_to_element(sdata, "tiles", table_name="Twos_tiles")
slide = open_wsi(sys.argv[2], store=sys.argv[1])
spec = slide.tile_spec("tiles")
assert (spec.height, spec.stride_width, spec.mpp, spec.base_width) == (64, 32, 1.0, 128), spec
found = slide.fetch.features_anndata("Twos", "tiles", tile_graph=False)
assert (found.X == table.X).all()
assert (found.obsm["spatial"] == sdata.shapes["tiles"][["x", "y"]].to_numpy()).all()
print(*found.shape, float(found.X.sum()))
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_spatialdata_and_lazyslide_read_it_in_their_own_environment(
    several: Path, made_slide: Path, tmp_path: Path
) -> None:
    """wsidata is what LazySlide opens slides with; it brings spatialdata, and an older dask than dfx's."""
    (path,) = export(several, "spatialdata", tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "wsidata>=0.9"], check=True)
    isolated = [python, "-I", "-W", "ignore", "-c", READ, path, made_slide]
    done = subprocess.run(isolated, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    features = features_of(several, "Twos")
    n, dim, total = done.stdout.split()[-3:]
    assert (int(n), int(dim)) == features.shape
    assert float(total) == pytest.approx(features.sum(dtype=np.float64), rel=1e-4)
