"""TIAToolbox's extractor: what it has right comes out the same here, and what it has wrong is right here.

The numbers are those of its list of defects (28), so that each has a test or a reason.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import dask
import distributed
import numpy as np
import pytest
import tifffile
import torch
from conftest import DATA, shared
from nets import Means, means
from numpy.typing import NDArray
from torch import nn

import dfx
from dfx.errors import CallError, CallTypeError, RunError
from dfx.slides.synthetic import write_slide

BASELINE = [{"resolution": 1.0, "units": "baseline"}]


@pytest.fixture
def run(client: distributed.Client) -> Any:
    """A dict run over slides with `Means`, at the baseline unless told otherwise."""

    def call(images: list[Any], model: nn.Module | None = None, **args: Any) -> Any:
        extractor = dfx.DeepFeatureExtractor(model or Means(), batch_size=8, verbose=False)
        given = {
            "patch_mode": False,
            "patch_input_shape": (100, 100),
            "input_resolutions": BASELINE,
            "client": client,
        }
        return extractor.run(images, **given | args)

    return call


@pytest.mark.skipif(not (DATA / "conformance").exists(), reason="no shared test data")
def test_every_recorded_case_of_the_reference_holds() -> None:
    check = DATA / "conformance"
    done = subprocess.run(
        [sys.executable, check / "check.py", "--cases", check, "--slides", DATA / "slides"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "conformance: 7/7 cases hold" in done.stdout


def test_the_tissue_mask_is_the_references() -> None:
    recorded = np.load(shared("conformance/cases/cmu_mpp0.499_p256_auto.npz"))["mask_used_0"] > 0
    assert np.array_equal(dfx.open_slide(shared("slides/CMU-1-Small-Region.svs")).tissue_mask(), recorded)


def otsu_by_skimage(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    from skimage.filters import threshold_otsu

    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    return np.asarray(grey < threshold_otsu(grey))


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({}, (222, 279)),  # neither: a sixteenth
        ({"mpp": 0.25}, (149, 185)),  # mpp alone: 6 mpp
        ({"power": 40.0}, (111, 139)),  # power: 1.25x
        ({"mpp": 0.25, "power": 20.0}, (223, 278)),
    ],
)
def test_the_mask_is_made_at_the_references_resolution(given: dict[str, float], size: tuple[int, int]) -> None:
    slide = dfx.open_slide(shared("slides/TCGA-CR-7395-01A-01-TS1.svs"), **given)  # type: ignore[arg-type]
    mask = slide.tissue_mask()
    if given:
        assert mask.shape == size
    level = slide.level(1).compute(scheduler="threads")
    picture = np.asarray(cv2.resize(level, mask.shape[::-1], interpolation=cv2.INTER_AREA), np.uint8)
    assert np.array_equal(mask, otsu_by_skimage(picture))


# 1, 2: a row for every patch


class ArrayModel(nn.Module):
    """A model of the reference's kind whose infer_batch returns an array, not a list with one."""

    @staticmethod
    def infer_batch(model: nn.Module, batch: torch.Tensor, *, device: str) -> Any:
        x = batch.float() / 255
        return torch.cat([x.mean((1, 2)), (x * x).mean((1, 2))], dim=1).numpy()


class ListModel(nn.Module):
    @staticmethod
    def infer_batch(model: nn.Module, batch: torch.Tensor, *, device: str) -> Any:
        return [ArrayModel.infer_batch(model, batch, device=device)]


@pytest.mark.parametrize("model", [ArrayModel(), ListModel()], ids=["array", "list"])
def test_features_of_every_patch_whatever_infer_batch_returns(model: nn.Module, made_slide: Path, run: Any) -> None:
    got = run([made_slide], model, auto_get_mask=False)[made_slide]
    assert got["features"].shape == (13 * 16, 6)
    slide = dfx.open_slide(made_slide)
    grid = dfx.PatchGrid.over(slide, shape=100, resolution=1.0, units="baseline", mask=None)
    assert np.allclose(got["features"], means(dfx.patches(slide, grid).compute(scheduler="sync")), atol=1e-5)


@pytest.mark.parametrize("model", [ArrayModel(), ListModel(), Means()], ids=["array", "list", "module"])
@pytest.mark.parametrize("n", [1, 4, 7, 8, 9])
def test_a_short_last_batch_of_loose_patches_is_no_problem(model: nn.Module, n: int) -> None:
    patches = np.random.default_rng(0).integers(0, 256, (n, 20, 30, 3)).astype(np.uint8)
    got = dfx.DeepFeatureExtractor(model, batch_size=4, verbose=False).run(patches)
    assert np.allclose(got["features"], means(patches), atol=1e-5)  # type: ignore[index]


def test_a_models_own_preparation_sees_any_channels_and_dtype() -> None:
    class Prepared(ArrayModel):
        preproc_func = staticmethod(lambda patch: patch * 2.0)

    patches = np.random.default_rng(0).random((5, 8, 8, 4)).astype(np.float32) * 100
    got = dfx.DeepFeatureExtractor(Prepared(), batch_size=2, verbose=False).run(patches)
    assert np.allclose(got["features"], means(patches * 2), atol=1e-3)  # type: ignore[index]


# 3, 4, 5: networks


def test_a_named_network_has_published_weights_or_says_that_it_has_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(dfx.EncoderError, match="weights='random'"):
        dfx.DeepFeatureExtractor("resnet18")
    with pytest.raises(dfx.EncoderError, match=r"nowhere\.pth are not a file"):
        dfx.DeepFeatureExtractor("resnet18", weights="nowhere.pth")


def test_a_named_network_gets_normalised_pixels(resnet18: dfx.EncoderSpec) -> None:
    from dfx.encoders.network import network

    seen: list[torch.Tensor] = []
    net = network(resnet18, "cpu")
    hook = net.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    white, black = np.full((1, 224, 224, 3), 255, np.uint8), np.zeros((1, 224, 224, 3), np.uint8)
    net(np.concatenate([white, black]), batch_size=2)
    hook.remove()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(seen[0][0, :, 0, 0], (1 - mean) / std, atol=1e-5)
    assert torch.allclose(seen[0][1, :, 5, 5], -mean / std, atol=1e-5)


def test_vit_names_give_pooled_features_of_the_right_width(made_slide: Path, run: Any) -> None:
    extractor = dfx.DeepFeatureExtractor("vit_tiny_patch16_224", weights="random", verbose=False)
    got = extractor.run(
        [made_slide],
        patch_mode=False,
        patch_input_shape=(224, 224),
        input_resolutions=[{"resolution": 4.0, "units": "mpp"}],
    )
    assert got[made_slide]["features"].shape[1] == 192  # type: ignore[index]


# 6: interpolation


def test_shrinking_averages_areas_and_enlarging_is_cubic(tmp_path: Path) -> None:
    pixels = np.zeros((128, 128, 3), np.uint8)
    pixels[::2, ::2] = 255  # a quarter of the pixels: cubic shrinking would alias
    tifffile.imwrite(tmp_path / "dots.tif", pixels, tile=(64, 64), photometric="rgb", metadata=None)
    slide = dfx.open_slide(tmp_path / "dots.tif")
    half = dfx.PatchGrid.over(slide, shape=64, resolution=0.5, units="baseline", mask=None)
    assert np.abs(dfx.patches(slide, half).compute(scheduler="sync")[0] - 63.75).max() < 0.5
    twice = dfx.PatchGrid.over(slide, shape=256, resolution=2.0, units="baseline", mask=None)
    want = cv2.resize(pixels, (256, 256), interpolation=cv2.INTER_CUBIC)
    assert np.array_equal(dfx.patches(slide, twice).compute(scheduler="sync")[0], want)


# 7, 21: masks


def test_fine_patches_in_one_coarse_mask_cell_are_kept(made_slide: Path, run: Any) -> None:
    got = run([made_slide], patch_input_shape=(16, 16), masks=[np.ones((10, 10))])
    assert len(got[made_slide]["coordinates"]) == 100 * 82


def as_slide(path: Path, mask: NDArray[np.uint8]) -> dfx.Slide:
    tifffile.imwrite(path, np.repeat(mask[..., None] * 255, 3, axis=2), tile=(64, 64), photometric="rgb", metadata=None)
    return dfx.open_slide(path)


@pytest.mark.parametrize("kind", ["array", "png", "slide", "virtual reader"])
def test_a_mask_of_every_kind_is_honoured(kind: str, made_slide: Path, tmp_path: Path, run: Any) -> None:
    mask = np.zeros((13, 16), np.uint8)
    mask[3:6, 2:9] = 1
    given: Any = mask
    if kind == "png":
        given = str(tmp_path / "mask.png")
        cv2.imwrite(given, mask * 255)
    elif kind == "slide":
        given = as_slide(tmp_path / "mask.tif", mask)
    elif kind == "virtual reader":
        given = SimpleNamespace(img=mask, info=None, mode="bool")
    got = run([made_slide], masks=[given])[made_slide]["coordinates"]
    assert sorted(map(tuple, got[:, :2].tolist())) == [
        (x, y) for x in range(200, 900, 100) for y in range(300, 600, 100)
    ]


@pytest.mark.parametrize("mask", [7, {"a": 1}, [[1, 0]], object(), np.zeros(4), np.array([["x"]])], ids=str)
def test_a_mask_of_a_kind_that_can_not_be_used_is_an_error(mask: Any, made_slide: Path, run: Any) -> None:
    with pytest.raises((CallError, CallTypeError), match="mask"):
        run([made_slide], masks=[mask])


def test_one_slide_may_have_a_mask_and_the_next_the_automatic_one(made_slide: Path, tmp_path: Path, run: Any) -> None:
    other = write_slide(tmp_path / "other.svs", 900, 700, seed=3)
    mask = np.zeros((10, 10))
    mask[0, 0] = 1
    got = run([made_slide, other], masks=[mask, None])
    assert len(got[made_slide]["coordinates"]) == 4
    grid = dfx.PatchGrid.over(dfx.open_slide(other), shape=100, resolution=1.0, units="baseline")
    assert np.array_equal(got[other]["coordinates"], grid.coordinates)


# 10, 9, 16: memory, leftovers, Dask


def test_a_low_memory_threshold_leaves_nothing_but_the_output(made_slide: Path, tmp_path: Path, run: Any) -> None:
    run([made_slide], memory_threshold=1, save_dir=tmp_path / "out", output_type="zarr")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["made.zarr"]
    assert sorted(p.name for p in (tmp_path / "out" / "made.zarr").iterdir()) == [
        "coordinates",
        "features",
        "mask",
        "zarr.json",
    ]


def test_the_callers_dask_configuration_is_untouched_and_its_client_used(made_slide: Path, run: Any) -> None:
    before = repr(dask.config.config)
    with dask.config.set(scheduler="sync"):
        run([made_slide])
        assert dask.config.get("scheduler") == "sync"
    assert repr(dask.config.config) == before


# 11: state


def test_a_second_run_knows_nothing_of_the_first(made_slide: Path, tmp_path: Path, client: distributed.Client) -> None:
    other = write_slide(tmp_path / "other.svs", 900, 700, seed=3)
    extractor = dfx.DeepFeatureExtractor(Means(), batch_size=8, verbose=False)
    before = dict(vars(extractor))
    common = {"patch_mode": False, "patch_input_shape": (100, 100), "input_resolutions": BASELINE, "client": client}
    fresh = extractor.run([made_slide, other], **common)  # type: ignore[arg-type]
    extractor.run(
        [made_slide],
        masks=[np.ones((2, 2))],
        labels=["x"],
        min_mask_ratio=0.5,
        stride_shape=(50, 50),
        batch_size=3,
        num_workers=1,
        device="cpu",
        verbose=False,
        wsireader_kwargs={"mpp": 9},
        **common,  # type: ignore[arg-type]
    )
    assert vars(extractor) == before
    again = extractor.run([made_slide, other], **common)  # type: ignore[arg-type]
    for slide in (made_slide, other):
        assert np.array_equal(again[slide]["coordinates"], fresh[slide]["coordinates"])  # type: ignore[index]
        assert "labels" not in again[slide]  # type: ignore[index]


# 20, 22, 23: resolution and metadata


def test_level_units_work(made_slide: Path, run: Any) -> None:
    got = run([made_slide], input_resolutions=[{"resolution": 1, "units": "level"}], auto_get_mask=False)
    assert got[made_slide]["features"].shape == (4 * 4, 6)
    slide = dfx.open_slide(made_slide)
    first = slide.region(1, (0, 0, 100, 100), rgb=True)[None]
    assert np.allclose(got[made_slide]["features"][0], means(first)[0], atol=1e-5)


def test_baseline_needs_no_metadata_not_even_for_the_automatic_mask(tmp_path: Path, run: Any) -> None:
    path = write_slide(tmp_path / "plain.tif", 700, 600)
    with tifffile.TiffFile(path) as tif:
        pixels = tif.pages[0].asarray()
    tifffile.imwrite(path, pixels, tile=(128, 128), photometric="rgb", metadata=None)
    slide = dfx.open_slide(path)
    assert (slide.mpp, slide.power) == (None, None)
    got = run([path])[path]
    assert 0 < len(got["features"]) < 42
    with pytest.raises(RunError, match=r"mpp="):
        run([path], input_resolutions=[{"resolution": 0.5, "units": "mpp"}])


def test_an_ordinary_pyramidal_tiff_keeps_its_levels_and_its_case_does_not_matter(tmp_path: Path) -> None:
    slide = dfx.open_slide(write_slide(tmp_path / "UPPER.TIF", 700, 600))
    assert len(slide.levels) == 3
    assert slide.mpp == (0.5, 0.5)


# 24: calls


def test_an_unknown_keyword_is_refused(made_slide: Path, run: Any) -> None:
    with pytest.raises(TypeError, match="min_mask_ration"):
        run([made_slide], min_mask_ration=0.5)


def test_every_keyword_of_the_reference_is_taken(made_slide: Path, tmp_path: Path, run: Any) -> None:
    constructor = {"model", "batch_size", "num_workers", "weights", "device", "verbose"}
    assert constructor <= set(inspect.signature(dfx.DeepFeatureExtractor).parameters)
    got = run(
        [str(made_slide)],
        masks=None,
        ioconfig=None,
        save_dir=tmp_path / "out",
        overwrite=True,
        output_type="zarr",
        auto_get_mask=True,
        batch_size=16,
        num_workers=0,
        device="cpu",
        verbose=False,
        labels=None,
        return_labels=False,
        stride_shape=(100, 100),
        memory_threshold=80,
        wsireader_kwargs=None,
        output_file=None,
        class_dict={0: "a"},
        scale_factor=(1.0, 1.0),
        return_probabilities=True,
    )
    assert list(got) == [str(made_slide)]


@dataclass
class Config:
    """The fields of TIAToolbox's `ModelIOConfigABC`."""

    input_resolutions: list[dict[str, Any]]
    patch_input_shape: Any
    stride_shape: Any = None
    output_resolutions: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.stride_shape is None:
            self.stride_shape = self.patch_input_shape


@pytest.mark.parametrize("kind", ["object", "array fields", "mapping"])
def test_ioconfig_goes_before_the_other_arguments(kind: str, made_slide: Path, run: Any) -> None:
    config: Any = Config([{"resolution": 0.5, "units": "baseline"}], (80, 120), (60, 90))
    if kind == "array fields":
        config = Config(config.input_resolutions, np.array([80, 120]), np.array([60, 90]))
    elif kind == "mapping":
        config = {
            "patch_input_shape": [80, 120],
            "input_resolutions": config.input_resolutions,
            "stride_shape": (60, 90),
        }
    got = run([made_slide], ioconfig=config, stride_shape=(7, 7), auto_get_mask=False)[made_slide]["coordinates"]
    assert (got[0, 2:] - got[0, :2]).tolist() == [120, 80]
    assert len(got) == 9 * 11


def test_slides_are_given_as_str_path_slide_and_wsireader_mixed(made_slide: Path, tmp_path: Path, run: Any) -> None:
    class Reader:
        """What `WSIReader` shows of itself."""

        input_path = made_slide
        info = SimpleNamespace(mpp=np.array([0.25, 0.25]), objective_power=40.0)

    copies = [write_slide(tmp_path / f"{n}.svs", 600, 500, seed=n) for n in range(2)]
    reader, opened = Reader(), dfx.open_slide(copies[1])
    at = [{"resolution": 0.5, "units": "mpp"}]
    got = run([str(copies[0]), opened, reader], input_resolutions=at, auto_get_mask=False)
    assert list(got) == [str(copies[0]), opened, reader]
    assert len(got[reader]["coordinates"]) == 8 * 7  # at its 0.25 mpp, not the file's 0.5
    assert len(got[opened]["coordinates"]) == 6 * 5
    Reader.input_path = None  # type: ignore[assignment]
    with pytest.raises(CallTypeError, match="without a file"):
        run([Reader()])


def test_a_resolution_may_be_a_pair(made_slide: Path, run: Any) -> None:
    got = run([made_slide], input_resolutions=[{"resolution": (1.0, 0.5), "units": "mpp"}], auto_get_mask=False)
    assert len(got[made_slide]["coordinates"]) == 8 * 13


# 25: importing


def test_importing_changes_no_logging_and_no_warnings() -> None:
    code = (
        "import logging, warnings; before = (list(logging.getLogger().handlers), warnings.showwarning);"
        "import dfx, dfx.cli, dfx.encoders.network;"
        "assert (list(logging.getLogger().handlers), warnings.showwarning) == before;"
        "assert logging.getLogger('dfx').level == logging.NOTSET"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
