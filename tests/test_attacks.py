"""What a hostile or hasty user tries: no wrong number is stored, nothing of theirs is lost, nothing hangs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import pytest
import tifffile
import torch
import zarr
from conftest import WSI
from nets import Means, means
from torch import nn

import dfx
from dfx.encoders import encode, output
from dfx.errors import CallError, CallTypeError, EncoderError, RunError, SlideError, StoreError
from dfx.slides.cache import TILES
from dfx.slides.synthetic import write_slide

# Encoders that are not what they seem


def test_a_named_networks_pooling_does_not_depend_on_what_was_built_before() -> None:
    patches = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3)).astype(np.uint8)
    found = {
        p: encode(dfx.load_encoder("vit_tiny_patch16_224", weights="random", pooling=p), patches)
        for p in ("mean", "cls", "cls+mean")
    }
    assert not np.allclose(found["mean"], found["cls"])
    assert found["cls+mean"].shape == (2, 2 * found["cls"].shape[1])
    assert np.allclose(found["cls+mean"][:, : found["cls"].shape[1]], found["cls"], atol=1e-5)
    with pytest.raises(EncoderError, match="can't build 'resnet18'"):
        output(dfx.load_encoder("resnet18", weights="random", pooling="cls"), (224, 224))


class Odd(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = self.value
        value = value() if callable(value) else value["a"] if isinstance(value, dict) else value
        value = value[0] if isinstance(value, list) else value
        return x.mean((2, 3)) * float(value)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ([1.0], [3.0]),
        ({"a": 1.0}, {"a": 3.0}),
        (torch.tensor(1.0), torch.tensor(3.0)),
        (np.float32(1), np.float32(3)),
        (lambda: 1.0, lambda: 3.0),
        ((lambda k: lambda: k)(1.0), (lambda k: lambda: k)(3.0)),
    ],
    ids=["list", "dict", "tensor", "numpy", "lambda", "closure"],
)
def test_modules_that_differ_in_an_attribute_of_any_kind_are_told_apart(one: Any, two: Any) -> None:
    patches = np.full((1, 8, 8, 3), 51, np.uint8)
    module = Odd(one)
    first = dfx.load_encoder(module)
    assert np.allclose(encode(first, patches), 0.2)
    module.value = two
    second = dfx.load_encoder(module)
    assert first.weights_digest != second.weights_digest
    assert np.allclose(encode(second, patches), 0.6)
    assert np.allclose(encode(first, patches), 0.2)


def test_a_class_that_was_redefined_is_another_encoder_and_one_that_was_not_is_the_same() -> None:
    def define(factor: int) -> nn.Module:
        space: dict[str, Any] = {"nn": nn, "__name__": "__main__"}
        exec(f"class Net(nn.Module):\n def forward(self, x):\n  return x.mean((2, 3)) * {factor}\n", space)
        module: nn.Module = space["Net"]()
        return module

    digests = [dfx.load_encoder(define(factor)).weights_digest for factor in (1, 7, 1)]
    assert digests[0] == digests[2] != digests[1]


def test_the_digest_of_a_module_is_that_of_other_processes() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests'); import dfx, torch; from nets import Means;"
        "torch.manual_seed(0); net = torch.nn.Sequential(Means(), torch.nn.Linear(6, 2));"
        "print(dfx.load_encoder(net).weights_digest)"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]


class Shrinking(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))[:, : 1 if len(x) > 2 else 3]


class Complex(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) * 1j


def test_rows_of_another_width_are_refused_and_not_stretched(
    made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    with pytest.raises(RunError, match=r"gave 1 numbers a patch .* but 3 when it was planned"):
        dfx.DeepFeatureExtractor(Shrinking(), verbose=False).run([made_slide], client=client, save_dir=tmp_path, **WSI)
    with pytest.raises(EncoderError, match="real numbers"):
        output(dfx.load_encoder(Complex()), (8, 8))


class RowsList(nn.Module):
    @staticmethod
    def infer_batch(model: Any, batch: torch.Tensor, *, device: str) -> Any:
        x = batch.float() / 255
        return list(torch.cat([x.mean((1, 2)), (x * x).mean((1, 2))], dim=1))


def test_a_list_of_rows_is_right_also_when_there_are_as_many_as_numbers_in_each() -> None:
    patches = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    assert np.allclose(encode(dfx.load_encoder(RowsList()), patches, batch_size=6), means(patches), atol=1e-5)


def test_options_that_would_be_ignored_are_refused() -> None:
    with pytest.raises(CallError, match="prepares patches by itself"):
        dfx.load_encoder(RowsList(), mean=(0.5, 0.5, 0.5))
    with pytest.raises(EncoderError, match="leave out pooling"):
        output(dfx.load_encoder(Means(), pooling="cls"), (8, 8))
    for bad in ({"std": (1, 1, float("nan"))}, {"mean": (float("inf"), 0, 0)}, {"input_size": 0}, {"input_size": "a"}):
        with pytest.raises((CallError, CallTypeError)):
            dfx.load_encoder("resnet18", weights="random", **bad)  # type: ignore[arg-type]


def test_many_modules_at_once_are_all_kept_and_none_for_ever() -> None:
    import gc
    import weakref

    patches = np.full((1, 8, 8, 3), 255, np.uint8)
    specs = [dfx.load_encoder(Odd(float(i))) for i in range(20)]
    assert [round(float(encode(spec, patches)[0, 0])) for spec in specs] == list(range(20))
    from dfx.encoders import network

    network.NETWORKS.clear()
    last = weakref.ref(specs[-1].module)
    del specs
    gc.collect()
    assert last() is None


def test_modules_that_can_not_be_used_are_refused_with_the_reason(tmp_path: Path) -> None:
    import threading

    locked = Means()
    locked.lock = threading.Lock()  # type: ignore[assignment]
    for module in (locked, nn.LazyLinear(3), nn.Linear(3, 3, device="meta")):
        with pytest.raises(EncoderError, match="can't be copied"):
            dfx.load_encoder(module)
    with pytest.raises(EncoderError, match=r"resnet18\.foo"):
        dfx.load_encoder("resnet18.foo", weights="random")
    torch.save({1: torch.zeros(3)}, tmp_path / "numbers.pt")
    with pytest.raises(EncoderError, match="hold no state dict"):
        dfx.load_encoder("resnet18", weights=tmp_path / "numbers.pt")
    with pytest.raises(EncoderError, match="are not a file"):
        dfx.load_encoder("resnet18", weights="~nobody-at-all/x.pt")


# Slides, grids and tiles


def test_a_grid_of_another_slide_is_refused(slide: dfx.Slide, tmp_path: Path) -> None:
    other = dfx.open_slide(write_slide(tmp_path / "other.svs", 900, 700, seed=1))
    grid = dfx.PatchGrid.over(other, shape=64)
    for call in (lambda: dfx.patches(slide, grid), lambda: dfx.features(slide, grid, Means())):
        with pytest.raises(CallError, match="another slide"):
            call()
    for wrong in (("slide.svs", grid), (slide, None)):
        with pytest.raises(CallTypeError):
            dfx.patches(*wrong)  # type: ignore[arg-type]
    with pytest.raises(CallTypeError):
        dfx.PatchGrid.over("slide.svs")  # type: ignore[arg-type]


@pytest.mark.parametrize("compression", ["lzw", "packbits"])
def test_a_tile_that_decodes_to_too_little_is_not_filled_up(compression: str, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    path = tmp_path / "t.tif"
    tifffile.imwrite(path, image, tile=(64, 64), photometric="rgb", compression=compression, metadata=None)
    slide = dfx.open_slide(path)
    assert np.array_equal(slide.region(0, (0, 0, 64, 64), rgb=True), image)
    slide.levels[0].parts[0].counts[0, 0, 0] -= 40
    TILES.clear()
    with pytest.raises(SlideError, match=r"tile 0 .* damaged"):
        slide.region(0, (0, 0, 64, 64), rgb=True)


def test_what_is_no_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.svs")
    with pytest.raises(SlideError, match="pipe or device"):
        dfx.open_slide(tmp_path / "pipe.svs")
    for name in ("a" * 300, "\udcff.svs", "a\0b.svs", ""):
        with pytest.raises(SlideError):
            dfx.open_slide(name)


@pytest.mark.parametrize("n", ["a", 0.5, None, True])
def test_a_level_is_asked_for_by_number(n: Any, slide: dfx.Slide) -> None:
    with pytest.raises(CallTypeError):
        slide.level(n)


@pytest.mark.parametrize(
    ("resolution", "units"),
    [(float("nan"), "level"), (float("inf"), "level"), (10**400, "mpp"), (1e-300, "mpp"), (1, ["mpp"]), (1, None)],
)
def test_a_resolution_that_can_not_be_meant_is_refused(resolution: Any, units: Any, slide: dfx.Slide) -> None:
    with pytest.raises((CallError, CallTypeError)):
        dfx.PatchGrid.over(slide, resolution=resolution, units=units)


def test_masked_arrays_and_broken_mask_files_are_what_they_say(slide: dfx.Slide, tmp_path: Path) -> None:
    masked = np.ma.MaskedArray(np.ones((4, 4)), mask=np.ones((4, 4), bool))
    assert len(dfx.PatchGrid.over(slide, mask=masked)) == 0
    (tmp_path / "empty.npy").touch()
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((")
    (tmp_path / "empty.png").touch()
    for name in ("empty.npy", "bad.npy", "empty.png"):
        with pytest.raises(CallError, match=name):
            dfx.PatchGrid.over(slide, mask=tmp_path / name)


# Outputs


def test_a_complete_store_that_lost_or_broke_a_chunk_is_mended(
    extractor: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    args = WSI | {"client": client, "save_dir": tmp_path, "block_size": 50}
    extractor.run([made_slide], **args)
    path = tmp_path / "made.zarr"
    whole = dfx.open_features(path).features.compute()
    (path / "features/c/0/0").unlink()
    (path / "features/c/2/0").write_bytes(b"short")
    extractor.run([made_slide], **args)
    found = dfx.open_features(path)
    assert found.attrs["status"] == "complete"
    assert np.array_equal(found.features.compute(), whole)


def test_one_file_given_in_many_ways_is_one_output(
    extractor: dfx.DeepFeatureExtractor,
    made_slide: Path,
    tmp_path: Path,
    client: distributed.Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(made_slide.parent)
    opened = dfx.open_slide(made_slide)
    ways = [made_slide, str(made_slide), "made.svs", opened]
    got = extractor.run(ways, client=client, save_dir=tmp_path, overwrite=True, **WSI)
    assert list(got) == ways
    assert set(got.values()) == {tmp_path / "made.zarr"}  # type: ignore[union-attr]
    with pytest.raises(CallError, match="given twice with different masks"):
        extractor.run([made_slide, opened], masks=[None, np.ones((2, 2))], client=client, save_dir=tmp_path, **WSI)


def test_one_file_at_two_scales_is_two_outputs(
    extractor: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    coarse, fine = dfx.open_slide(made_slide, mpp=1.0), dfx.open_slide(made_slide)
    got = extractor.run([coarse, fine], client=client, save_dir=tmp_path, auto_get_mask=False, **WSI)
    sizes = [len(dfx.open_features(path).coordinates) for path in got.values()]  # type: ignore[union-attr]
    assert sizes == [41 * 50, 21 * 25]
    given = extractor.run([fine], wsireader_kwargs={"mpp": 1.0}, client=client, **WSI | {"output_type": "dict"})
    want = dfx.PatchGrid.over(coarse, shape=64)
    assert np.array_equal(given[fine]["coordinates"], want.coordinates)  # type: ignore[index]


def test_labels_are_checked_before_the_old_output_goes_and_never_stale(
    extractor: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    patches = np.zeros((3, 8, 8, 3), np.uint8)
    loose = {"save_dir": tmp_path, "output_type": "zarr", "overwrite": True}
    extractor.run(patches, labels=[1, 2, 3], **loose)
    with pytest.raises(CallTypeError, match="a label is"):
        extractor.run(patches, labels=[[1], [1, 2], 3], **loose)
    assert zarr.open_array(str(tmp_path / "output.zarr"), path="labels")[...].tolist() == [1, 2, 3]
    for label in ("old", "new"):
        extractor.run([made_slide], labels=np.array([label]), client=client, save_dir=tmp_path, **WSI)
        assert dfx.open_features(tmp_path / "made.zarr").attrs["label"] == label


def test_a_users_file_inside_a_store_survives_overwriting(
    extractor: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    extractor.run([made_slide], client=client, save_dir=tmp_path, **WSI)
    (tmp_path / "made.zarr" / "notes.csv").write_text("mine")
    extractor.run([made_slide], client=client, save_dir=tmp_path, overwrite=True, **WSI | {"patch_input_shape": 100})
    assert (tmp_path / "made.zarr" / "notes.csv").read_text() == "mine"
    assert dfx.open_features(tmp_path / "made.zarr").attrs["patches"]["shape"] == [100, 100]


def test_numpy_numbers_are_numbers(
    extractor: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    changes = {
        "input_resolutions": [{"resolution": np.float32(0.5), "units": "mpp"}],
        "patch_input_shape": np.array([64, 64]),
        "block_size": np.int64(80),
        "labels": np.array([3]),
    }
    extractor.run([made_slide], client=client, save_dir=tmp_path, **WSI | changes)
    extractor.run([made_slide], client=client, save_dir=tmp_path, labels=[3], block_size=80, **WSI)


@pytest.mark.parametrize("save_dir", [7, 5.5, b"out", "~nobody-at-all/x", "a" * 300, "/proc/dfx", "a\0b"])
def test_a_folder_that_can_not_be_is_refused(
    save_dir: Any, extractor: dfx.DeepFeatureExtractor, made_slide: Path
) -> None:
    with pytest.raises(dfx.DfxError):
        extractor.run([made_slide], save_dir=save_dir, **WSI)
    with pytest.raises(dfx.DfxError):
        extractor.run(np.zeros((2, 8, 8, 3), np.uint8), save_dir=save_dir, output_type="zarr")


def test_names_that_file_systems_or_zarr_do_not_take_are_made_to_fit(
    extractor: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    names = [os.fsdecode(b"\xff\xfe.svs"), "x" * 250 + ".svs", "größe" * 30 + ".svs", "a b.c.svs"]
    paths = [tmp_path / name for name in names]
    for path in paths:
        os.link(made_slide, path)
    got = extractor.run([*paths, "y" * 300 + ".svs"], on_error="skip", client=client, save_dir=tmp_path / "out", **WSI)
    assert list(got) == paths
    assert len(set(got.values())) == 4  # type: ignore[union-attr]
    assert got[paths[3]].name == "a b.c.zarr"  # type: ignore[index]


def test_a_foreign_group_with_strange_metadata_is_left_alone(
    extractor: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path
) -> None:
    path = tmp_path / "made.zarr"
    path.mkdir()
    for text in ("null", "{}", "[1]", '{"zarr_format": 3, "node_type": "group", "attributes": {"dfx": {"format": 1}}}'):
        (path / "zarr.json").write_text(text)
        with pytest.raises(StoreError, match="not made by dfx"):
            extractor.run([made_slide], save_dir=tmp_path, overwrite=True, **WSI)
        assert (path / "zarr.json").read_text() == text


# Clusters


def test_a_cluster_without_workers_is_an_error_and_no_hang(
    extractor: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfx.run.health.PATIENCE", 2)
    with (
        distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as cluster,
        distributed.Client(cluster, set_as_default=False) as empty,
        pytest.raises(RunError, match="no worker for 2 seconds"),
    ):
        extractor.run([made_slide], client=empty, save_dir=tmp_path, **WSI)


def test_an_address_of_no_scheduler_ends_the_command(tmp_path: Path) -> None:
    line = "extract x.svs --encoder resnet18 --weights random --resolution 1 --units mpp --patch 64 --out o"
    done = subprocess.run(
        [sys.executable, "-m", "dfx", *line.split(), "--scheduler", "nonsense://x"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "no scheduler's address" in done.stderr
    assert done.stderr.count("\n") == 1
