"""Finding tissue: pen marks, networks and functions, and the mask that goes with the output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import distributed
import numpy as np
import pytest
import torch
import zarr
from conftest import WSI, shared
from nets import Darker, dark
from numpy.typing import NDArray

import dfx
from dfx import cli
from dfx.errors import SlideError
from dfx.masks.tissue import has_dark_background, hsv, ink
from dfx.slides.synthetic import outline, paint, write_picture

INKS = {"blue": (40, 70, 170), "green": (30, 120, 70), "black": (25, 25, 30), "red": (205, 30, 45)}
SIZE = 1536, 1280


def strokes() -> NDArray[np.float32]:
    """Cover, 0 to 1, of a ring around the tissue and a scribble on the glass, with soft rims."""
    width, height = SIZE
    cover = np.zeros((height, width), np.float32)
    cv2.ellipse(cover, (width // 2, height // 2), (width // 2 - 40, height // 2 - 40), 0, 200, 480, 1, 55)
    cv2.polylines(cover, [np.array([[60, 60], [350, 75], [75, 210], [300, 230]])], False, 1, 45)
    return np.asarray(cv2.GaussianBlur(cover, (0, 0), 5), np.float32)


@pytest.fixture(scope="module")
def clean() -> NDArray[np.uint8]:
    return paint(*SIZE, seed=3)


@pytest.fixture(scope="module")
def truth() -> NDArray[np.bool_]:
    return outline(np.random.default_rng(3), *SIZE)


def cells(mask: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """A mask of pixels at the size of a thumbnail's."""
    return np.asarray(cv2.resize(mask.astype(np.float32), shape[::-1], interpolation=cv2.INTER_AREA) > 0.5)


def overlap(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float((one & other).sum() / (one | other).sum())


@pytest.mark.parametrize("colour", INKS)
def test_pen_marks_are_no_tissue_for_hsv_as_they_are_for_otsu(
    colour: str, clean: NDArray[np.uint8], truth: NDArray[np.bool_], tmp_path: Path
) -> None:
    cover = strokes()
    marked = clean * (1 - cover[..., None]) + np.array(INKS[colour], np.float32) * cover[..., None]
    slide = dfx.open_slide(write_picture(tmp_path / "marked.svs", marked.astype(np.uint8), mpp=1))
    masks = {method: slide.tissue_mask(method) for method in ("otsu", "hsv")}
    shape = masks["hsv"].shape
    drawn, tissue = cells(cover, shape), cells(truth & (cover < 0.5), shape)
    on_glass = drawn & ~cells(truth, shape)
    assert on_glass.sum() > 500
    assert masks["otsu"][on_glass].mean() > 0.9
    assert masks["hsv"][on_glass].mean() < 0.01
    assert overlap(masks["hsv"], tissue) > 0.8
    assert overlap(masks["hsv"], tissue) > overlap(masks["otsu"], tissue)


def test_hsv_finds_tissue_without_specks_and_holes(clean: NDArray[np.uint8], truth: NDArray[np.bool_]) -> None:
    thumbnail = np.asarray(cv2.resize(clean, (192, 160), interpolation=cv2.INTER_AREA), np.uint8)
    thumbnail[78:84, 93:99] = 243  # a hole
    thumbnail[5:9, 180:184] = (200, 90, 150)  # a speck
    found = hsv(thumbnail)
    assert found.dtype == np.bool_
    assert overlap(found, cells(truth, found.shape)) > 0.93
    assert found[78:84, 93:99].all()
    assert not found[5:9, 180:184].any()


def nuclei(colour: tuple[float, float, float], background: int, haze: int) -> NDArray[np.uint8]:
    """Fluorescence: bright nuclei of tissue with a haze, on a dark background with noise."""
    rng = np.random.default_rng(1)
    tissue = outline(rng, 400, 320)
    bright = background + haze * tissue + rng.normal(0, 2, tissue.shape)
    ys, xs = np.nonzero(tissue)
    for n in rng.choice(len(ys), len(ys) // 50):
        cv2.circle(bright, (int(xs[n]), int(ys[n])), 1, 220.0, -1)
    return np.clip(bright[..., None] * colour, 0, 255).astype(np.uint8)


FLUORESCENCE = {
    "DAPI": nuclei((0, 0, 1), 4, 20),
    "grey": nuclei((1, 1, 1), 0, 0),
    "green on a haze": nuclei((0.1, 1, 0.2), 20, 40),
    "within what the file lacks": np.asarray(
        cv2.copyMakeBorder(nuclei((0, 0, 1), 4, 20), 0, 300, 90, 0, cv2.BORDER_CONSTANT, value=(255, 255, 255)),
        np.uint8,
    ),
    "too dark": nuclei((0.1, 0.1, 0.2), 10, 10),
}


@pytest.mark.parametrize("kind", FLUORESCENCE)
def test_fluorescence_of_all_colours_and_backgrounds_is_noticed(kind: str) -> None:
    assert has_dark_background(FLUORESCENCE[kind])


def dab(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Strong DAB instead of other stains."""
    return np.where((picture.mean(axis=2) < 215)[..., None], np.array([70, 42, 28], np.uint8), picture)


def frame(picture: NDArray[np.uint8], pixels: int = 150) -> NDArray[np.uint8]:
    black = dict.fromkeys(("top", "bottom", "left", "right"), pixels)
    return np.asarray(cv2.copyMakeBorder(picture, **black, borderType=cv2.BORDER_CONSTANT, value=(0, 0, 0)), np.uint8)


def test_frames_dark_stains_and_little_glass_are_not_taken_for_fluorescence(clean: NDArray[np.uint8]) -> None:
    small = np.asarray(cv2.resize(clean, (360, 300), interpolation=cv2.INTER_AREA), np.uint8)
    stairs = small.copy()
    for n in range(10):  # the scanned area of slides whose tissue's outline is followed tile by tile
        stairs[n * 30 : n * 30 + 30, : 18 * abs(5 - n)] = 0
    kinds = {
        "H&E": small,
        "little glass": small[100:220, 110:260],
        "strong DAB": dab(small),
        "little glass, strong DAB": dab(small[100:220, 110:260]),
        "dim lamp": (small * 0.6).astype(np.uint8),
        "ink": np.where((strokes()[::4, ::4][:300, :360] > 0.5)[..., None], np.uint8(25), small),
        "black frame": frame(small),
        "black frame, dim": frame((small * 0.7).astype(np.uint8)),
        "black frame, strong DAB": frame(dab(small)),
        "black frame, little glass": frame(small[100:220, 110:260]),
        "black frame, stairs": frame(stairs),
        "two areas": np.hstack([frame(small, 120), frame(small[:, ::-1], 120)]),
        "pale": np.maximum(small, 200),
        "white": np.full_like(small, 255),
        "black": np.zeros_like(small),
        "nearly all white": np.where((np.arange(300) == 7)[:, None, None], small, np.uint8(255)),
    }
    assert [kind for kind, picture in kinds.items() if has_dark_background(picture)] == []


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (30, 2)])
def test_no_thumbnail_is_too_small(shape: tuple[int, int]) -> None:
    assert hsv(np.full((*shape, 3), 240, np.uint8)).shape == shape
    assert not hsv(np.full((*shape, 3), 240, np.uint8)).any()


@pytest.mark.parametrize(
    "stain",
    [(214, 140, 180), (120, 80, 150), (90, 60, 130), (200, 90, 112), (150, 100, 60), (100, 60, 40), (150, 165, 200)],
    ids=["eosin", "haematoxylin", "dense nuclei", "blood", "DAB", "strong DAB", "counterstain"],
)
def test_a_stain_is_no_ink(stain: tuple[int, int, int]) -> None:
    picture = np.full((60, 60, 3), 243, np.uint8)
    picture[10:50, 10:50] = stain
    assert not ink(picture).any()
    assert hsv(picture)[12:48, 12:48].all()


@pytest.mark.parametrize(
    ("name", "given"),
    [("CMU-1-Small-Region.svs", {}), ("TCGA-CR-7395-01A-01-TS1.svs", {"mpp": 0.25})],
)
def test_hsv_and_otsu_agree_on_slides_without_marks(name: str, given: dict[str, float]) -> None:
    slide = dfx.open_slide(shared(f"slides/{name}"), **given)
    found, reference = slide.tissue_mask("hsv"), slide.tissue_mask()
    assert reference[~found].sum() < 0.03 * reference.sum()
    assert found.sum() < 1.3 * reference.sum()  # holes are filled


def test_a_function_finds_tissue_given_or_named(slide: dfx.Slide) -> None:
    expected = dark(slide.picture(slide._mask_view()))
    assert 0 < expected.sum() < expected.size
    assert np.array_equal(slide.tissue_mask(dark), expected)
    assert np.array_equal(slide.tissue_mask("nets:dark"), expected)
    grid = dfx.PatchGrid.over(slide, shape=64, mask="nets:dark")
    assert grid.mask is not None
    assert (grid.mask.method, len(grid)) == ("nets:dark", len(dfx.PatchGrid.over(slide, shape=64, mask=expected)))


def test_a_function_gets_a_thumbnail_at_the_resolution_that_it_names(slide: dfx.Slide) -> None:
    class Sized:
        mpp = 4.0

        def __call__(self, thumbnail: NDArray[np.uint8]) -> NDArray[np.bool_]:
            return np.full(thumbnail.shape[:2], True)

    assert slide.tissue_mask(Sized()).shape == (162, 200)


@pytest.mark.parametrize(
    ("method", "kind", "said"),
    [
        ("otsuu", dfx.CallError, "did you mean 'otsu'"),
        ("nowhere.at.all:f", dfx.CallError, "can't be imported"),
        ("nets:nothing", dfx.CallError, "can't be imported"),
        (torch.nn.Identity(), dfx.CallTypeError, "load_segmenter"),
        (3, dfx.CallTypeError, "not int"),
    ],
    ids=str,
)
def test_what_finds_no_tissue_is_refused_before_anything_is_read(
    method: Any, kind: type[Exception], said: str, slide: dfx.Slide, extractor: dfx.DeepFeatureExtractor, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=said):
        slide.tissue_mask(method)
    with pytest.raises(kind, match=said):
        extractor.run([slide], tissue=method, save_dir=tmp_path / "out", **WSI)
    assert not (tmp_path / "out").exists()


def test_a_network_finds_tissue_tile_by_tile(slide: dfx.Slide) -> None:
    segment = dfx.load_segmenter(Darker(), mpp=4, channel=1, tile=64, margin=8)
    thumbnail = slide.picture(slide.view(4, "mpp"))
    found = slide.tissue_mask(segment)
    assert found.shape == thumbnail.shape[:2]
    grey = thumbnail.mean(axis=2) / 255
    even = cv2.blur(grey, (5, 5))
    sure = np.abs(even - 0.8) > 0.03  # maps of half the size are enlarged: near the threshold the rim differs
    assert sure.mean() > 0.7
    assert (found == (even < 0.8))[sure].mean() > 0.98
    whole = dfx.load_segmenter(Darker(), mpp=4, channel=1, tile=512, margin=0)(thumbnail)
    assert (whole == found).mean() > 0.999  # wherever tiles are cut


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mpp": 4}, "say which is tissue"),
        ({"mpp": 4, "channel": 2}, "0 to 1"),
        ({"mpp": 4, "tile": 64, "margin": 32}, "larger tile"),
        ({"mpp": -1}, "mpp"),
        ({"mpp": 4, "threshold": 2}, "threshold"),
        ({"mpp": 4, "output": "classes"}, "output"),
    ],
    ids=lambda v: str(v),
)
def test_a_network_that_can_not_be_understood_is_refused(options: dict[str, Any], said: str, slide: dfx.Slide) -> None:
    with pytest.raises(dfx.DfxError, match=said):
        slide.tissue_mask(dfx.load_segmenter(Darker(), **options))


def test_the_mask_that_was_used_goes_with_the_output(
    made_slide: Path,
    extractor: dfx.DeepFeatureExtractor,
    client: distributed.Client,
    processes: distributed.Client,
    tmp_path: Path,
) -> None:
    segment = dfx.load_segmenter(Darker(), mpp=4, channel=1)
    slide = dfx.open_slide(made_slide)
    methods: dict[str, tuple[Any, Any]] = {"otsu": ("otsu", client), "hsv": ("hsv", client)}
    methods[segment.name] = segment, processes  # which get the network from here
    for name, (method, cluster) in methods.items():
        result = extractor.run([made_slide], tissue=method, save_dir=tmp_path / name, client=cluster, **WSI)
        store = dfx.open_features(result[made_slide])  # type: ignore[index, call-overload]
        assert store.mask is not None
        assert store.mask.method == name
        assert np.array_equal(store.mask.cells, slide.tissue_mask(method))
        scale = zarr.open_group(str(store.path), mode="r")["mask"].attrs["to_baseline"]
        assert np.allclose(np.array(scale) * store.mask.cells.shape[::-1], slide.dimensions)
        grid = dfx.PatchGrid.over(slide, shape=64, mask=method)
        assert np.array_equal(store.coordinates.compute(), grid.coordinates)
        assert not any("mask" in key or "tissue" in key for key in store.attrs["fingerprint"])
    again = extractor.run([made_slide], save_dir=tmp_path / "otsu", client=client, **WSI)
    assert again[made_slide] == tmp_path / "otsu" / "made.zarr"  # type: ignore[index, call-overload]


def test_every_patch_without_a_mask_leaves_none_in_the_store(
    made_slide: Path, extractor: dfx.DeepFeatureExtractor, client: distributed.Client, tmp_path: Path
) -> None:
    result = extractor.run([made_slide], auto_get_mask=False, save_dir=tmp_path, client=client, **WSI)
    assert dfx.open_features(result[made_slide]).mask is None  # type: ignore[index, call-overload]


def test_a_slides_own_mask_goes_before_how_tissue_is_found(
    made_slide: Path, extractor: dfx.DeepFeatureExtractor, client: distributed.Client, tmp_path: Path
) -> None:
    own = np.zeros((13, 16), bool)
    own[3:6, 4:9] = True
    for n, (mask, method) in enumerate([(own, "array"), ("hsv", "hsv")]):
        run = {"masks": [mask], "tissue": dark, "save_dir": tmp_path / str(n), "client": client}
        result = extractor.run([made_slide], **run, **WSI)
        found = dfx.open_features(result[made_slide]).mask  # type: ignore[index, call-overload]
        assert found is not None
        assert found.method == method


def test_the_command_line_names_what_finds_tissue(
    made_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def run(self: object, images: object, *, masks: object, auto_get_mask: bool, tissue: object, **_: object) -> Any:
        asked.append((masks, auto_get_mask, tissue))
        return {}

    monkeypatch.setattr(dfx.DeepFeatureExtractor, "run", run)
    line = ["extract", str(made_slide), "--encoder", "resnet18", "--weights", "random", "--quiet", "--resolution", "4"]
    line += ["--units", "mpp", "--patch", "64", "--out", str(tmp_path)]
    masks: list[list[str]] = [[], ["--mask", "tissue"], ["--mask", "hsv"], ["--mask", "nets:dark"], ["--mask", "none"]]
    for mask in [*masks, ["--mask", "m.png"]]:
        assert cli.main([*line, *mask]) == 0
    assert asked == [
        (None, True, "otsu"),
        (None, True, "otsu"),
        (None, True, "hsv"),
        (None, True, "nets:dark"),
        (None, False, "otsu"),
        (["m.png"], True, "otsu"),
    ]


# A dark background


def fluorescence(tint: tuple[float, float, float], level: int, share: float) -> NDArray[np.uint8]:
    """Blurred spots of tissue in one colour on a dark, noisy background; `share`: of the picture that has spots."""
    rng = np.random.default_rng(4)
    field = cv2.GaussianBlur(rng.normal(size=(500, 640)), (0, 0), 7)
    field = np.clip((field - np.quantile(field, 1 - share)) / (field.max() - field.min()) * 4, 0, 1)
    glow = level + rng.normal(0, 2, (500, 640)) + field * 180
    return np.clip(glow[..., None] * tint, 0, 255).astype(np.uint8)


def bright_field(kind: str, clean: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bright field: as it is; in a frame of black, where the scanner skipped; full of dark tissue; dimly lit."""
    found = cv2.resize(clean, (640, 532), interpolation=cv2.INTER_AREA)
    if kind == "in a black frame":
        return np.pad(found, ((500, 700), (600, 500), (0, 0)))
    if kind == "two areas in a black frame":
        return np.pad(np.pad(found, ((0, 0), (0, 400), (0, 0))), ((300, 300), (400, 500), (0, 0))) | np.pad(
            found[:300, :300], ((600, 232), (1200, 440), (0, 0))
        )
    if kind == "dark tissue":
        return (np.where(found < 225, found * 0.5, found)).astype(np.uint8)
    return (found * 0.6).astype(np.uint8) if kind == "dimly lit" else found


def as_slide(picture: NDArray[np.uint8], path: Path) -> dfx.Slide:
    write_picture(path, picture, mpp=2.0)
    return dfx.open_slide(path)


@pytest.mark.parametrize("method", ["otsu", "hsv"])
@pytest.mark.parametrize("tint", [(0, 0, 1), (0, 1, 0.1), (1, 1, 1)], ids=["blue", "green", "grey"])
def test_a_dark_background_is_not_taken_for_tissue(
    tint: tuple[float, float, float], method: str, tmp_path: Path
) -> None:
    for level, share in ((4, 0.05), (25, 0.3)):
        assert has_dark_background(fluorescence(tint, level, share))
    picture = np.kron(fluorescence(tint, 12, 0.2), np.ones((2, 2, 1), np.uint8))
    slide = as_slide(picture, tmp_path / "slide.tif")
    with pytest.raises(SlideError, match=r"slide\.tif has a dark background.*mask=None for every patch, a mask, or"):
        dfx.PatchGrid.over(slide, shape=64, resolution=1.0, units="baseline", mask=method)
    every = dfx.PatchGrid.over(slide, shape=64, resolution=1.0, units="baseline", mask=None)
    assert len(every) == 20 * 16
    kept = dfx.PatchGrid.over(slide, shape=64, resolution=1.0, units="baseline", mask=lambda t: t.max(axis=2) > 90)
    assert 0 < len(kept) < len(every)


@pytest.mark.parametrize(
    "kind", ["as it is", "in a black frame", "two areas in a black frame", "dark tissue", "dimly lit"]
)
def test_bright_field_is_not_taken_for_fluorescence(kind: str, clean: NDArray[np.uint8]) -> None:
    assert not has_dark_background(bright_field(kind, clean))


def test_a_run_tells_each_slide_with_a_dark_background_once(
    extractor: dfx.DeepFeatureExtractor, clean: NDArray[np.uint8], tmp_path: Path
) -> None:
    good, dark_one = tmp_path / "good.tif", tmp_path / "dark.tif"
    as_slide(clean, good)
    as_slide(np.kron(fluorescence((0, 0, 1), 12, 0.2), np.ones((2, 2, 1), np.uint8)), dark_one)
    options: Any = WSI | {"input_resolutions": [{"resolution": 1.0, "units": "baseline"}], "output_type": "dict"}
    with pytest.raises(dfx.RunError) as caught:
        extractor.run([good, dark_one], **options)
    assert str(caught.value).count("has a dark background") == 1
    assert "good.tif" not in str(caught.value)
