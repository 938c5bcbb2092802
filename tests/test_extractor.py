"""`DeepFeatureExtractor` and the store: what a run leaves, what it refuses, what it never touches."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import cv2
import dask
import distributed
import numpy as np
import pytest
import tifffile
import torch
import zarr
from conftest import WSI
from nets import Means, means
from numpy.typing import NDArray
from PIL import Image
from torch import nn

import dfx
from dfx.errors import CallError, CallTypeError, RunError, SlideError, StoreError
from dfx.loose import read_image
from dfx.slides.synthetic import write_slide
from dfx.store import layout, writing


def expected(path: Path, mask: Any = "tissue") -> tuple[NDArray[Any], NDArray[np.int64]]:
    slide = dfx.open_slide(path)
    grid = dfx.PatchGrid.over(slide, shape=64, resolution=0.5, units="mpp", mask=mask)
    return means(dfx.patches(slide, grid).compute(scheduler="sync")), grid.coordinates


# What comes out


def test_a_slide_becomes_a_complete_store(
    extractor: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    result = extractor.run([made_slide], save_dir=tmp_path, client=client, block_size=50, labels=["tumour"], **WSI)
    assert result == {made_slide: tmp_path / "made.zarr"}
    features, coordinates = expected(made_slide)
    group = zarr.open_group(str(tmp_path / "made.zarr"), mode="r", zarr_format=3)
    assert np.allclose(group["features"][...], features, atol=1e-5)
    assert np.array_equal(group["coordinates"][...], coordinates)
    assert group["features"].chunks == (50, 6)
    assert np.isnan(group["features"].fill_value)
    assert dict(group["coordinates"].attrs) == {"resolution": 0.5, "units": "mpp", "to_baseline": [1.0, 1.0]}
    said = group.attrs["dfx"]
    assert said["status"] == "complete"
    assert said["label"] == "tumour"
    assert said["slide"]["url"] == str(made_slide)
    assert said["slide"]["dimensions"] == [1600, 1300]
    assert said["encoder"]["weights"] == "given"
    assert json.loads(json.dumps(said)) == said
    assert group.metadata.consolidated_metadata is not None
    found = dfx.open_features(tmp_path / "made.zarr")
    assert np.array_equal(found.coordinates.compute(), coordinates)
    assert np.array_equal(found.to_baseline(), coordinates)
    assert found.features.chunks[0][0] == 50
    assert not list(tmp_path.rglob("*.partial"))


def test_dict_results_are_arrays_and_leave_nothing(
    extractor: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    result = extractor.run([str(made_slide)], client=client, **WSI | {"output_type": "dict"})
    assert isinstance(result, dict)
    got = result[str(made_slide)]
    features, coordinates = expected(made_slide)
    assert type(got["features"]) is np.ndarray
    assert np.allclose(got["features"], features, atol=1e-5)
    assert np.array_equal(got["coordinates"], coordinates)
    extractor.run([made_slide], client=client, save_dir=tmp_path / "out", **WSI | {"output_type": "dict"})
    assert not (tmp_path / "out").exists()


def test_dict_results_beyond_the_threshold_are_lazy_over_a_cache_that_goes_with_them(
    extractor: dfx.DeepFeatureExtractor, made_slide: Path, client: distributed.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfx.memory.fits", lambda nbytes, threshold: False)
    result = extractor.run([made_slide], client=client, labels=[3], **WSI | {"output_type": "dict"})
    got = result[made_slide]  # type: ignore[index]
    assert got["labels"] == 3
    assert np.allclose(got["features"].compute(), expected(made_slide)[0], atol=1e-5)
    folder = result.cache  # type: ignore[union-attr]
    assert folder.exists()
    del result
    assert not folder.exists()


def test_the_embedded_cluster_ends_with_the_run_and_listens_on_loopback_only(
    extractor: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path
) -> None:
    import psutil

    from dfx import cluster

    def listening() -> set[Any]:
        return {c.laddr for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN}

    already = listening()
    with cluster.embedded() as embedded:
        assert embedded.scheduler_info()["workers"]
        assert {address.ip for address in listening() - already} <= {"127.0.0.1", "::1"}
    extractor.run([made_slide], save_dir=tmp_path, **WSI)
    assert distributed.client._get_global_client() is None
    assert listening() == already
    assert dask.config.get("scheduler", None) is None


def test_the_current_client_is_used_and_kept(
    extractor: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfx.cluster.embedded", lambda threads: pytest.fail("an embedded cluster was started"))
    with distributed.Client(processes=False, n_workers=1, dashboard_address=":0") as current:
        extractor.run([made_slide], save_dir=tmp_path, **WSI)
        assert current.status == "running"


def test_a_module_reaches_the_workers_of_the_client_that_was_given(
    made_slide: Path, tmp_path: Path, processes: distributed.Client
) -> None:
    class Local(Means):
        pass

    extractor = dfx.DeepFeatureExtractor(Local(), verbose=False)
    extractor.run([made_slide], save_dir=tmp_path, client=processes, block_size=20, **WSI)
    assert np.allclose(dfx.open_features(tmp_path / "made.zarr").features.compute(), expected(made_slide)[0], atol=1e-5)


def test_many_slides_come_back_under_what_they_were_given_as(
    extractor: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    other = write_slide(tmp_path / "other.svs", 900, 700, seed=1)
    opened = dfx.open_slide(made_slide)
    copy = shutil.copy(made_slide, tmp_path / "third slide é.svs")
    result = extractor.run(
        [opened, str(other), Path(copy), str(other)], save_dir=tmp_path / "out", client=client, **WSI
    )
    assert list(result) == [opened, str(other), Path(copy)]
    for given, path in zip(result, (made_slide, other, copy), strict=True):
        got = dfx.open_features(result[given])  # type: ignore[index]
        assert np.allclose(got.features.compute(), expected(Path(path))[0], atol=1e-5)


def test_slides_with_equal_stems_keep_separate_outputs_whatever_their_order(
    extractor: dfx.DeepFeatureExtractor, tmp_path: Path, client: distributed.Client
) -> None:
    paths = []
    for n, name in enumerate(("a/s.svs", "b/s.svs", "b/s.tif", "b/t.svs", "c/S.SVS")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        paths.append(write_slide(path, 600, 500, seed=n))
    first = extractor.run(paths, save_dir=tmp_path / "out", client=client, **WSI)
    assert len({p.name for p in first.values()}) == 5  # type: ignore[union-attr]
    assert first[paths[3]].name == "t.zarr"  # type: ignore[index]
    again = extractor.run(paths[::-1], save_dir=tmp_path / "out", client=client, **WSI)
    assert again == first
    for path in paths:
        assert dfx.open_features(first[path]).attrs["slide"]["url"] == str(path)  # type: ignore[index]


# Resuming and overwriting


def chunks(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.joinpath("0").read_bytes(), p.joinpath("0").stat().st_mtime_ns) for p in folder.glob("*")}


def test_what_is_written_is_not_computed_again(
    extractor: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    args = WSI | {"save_dir": tmp_path, "client": client, "block_size": 20}
    extractor.run([made_slide], **args)
    features = tmp_path / "made.zarr" / "features" / "c"
    whole = chunks(features)
    extractor.run([made_slide], **args)
    assert chunks(features) == whole
    shutil.rmtree(features / "3")
    shutil.rmtree(features / "0")
    layout.update(tmp_path / "made.zarr", status="running")
    extractor.run([made_slide], **args)
    resumed = chunks(features)
    assert {k: v[0] for k, v in resumed.items()} == {k: v[0] for k, v in whole.items()}
    assert {k for k in whole if resumed[k] != whole[k]} == {"0", "3"}
    assert dfx.open_features(tmp_path / "made.zarr").attrs["status"] == "complete"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"patch_input_shape": (65, 64)}, "patch_shape: stored [64, 64], asked [65, 64]"),
        ({"input_resolutions": [{"resolution": 0.6, "units": "mpp"}]}, "resolution: stored 0.5, asked 0.6"),
        ({"auto_get_mask": False}, "coordinates"),
        ({"block_size": 99}, "block_size: stored 256, asked 99"),
    ],
)
def test_another_plan_is_an_error_that_says_what_differs(
    change: dict[str, Any],
    named: str,
    extractor: dfx.DeepFeatureExtractor,
    made_slide: Path,
    tmp_path: Path,
    client: distributed.Client,
) -> None:
    extractor.run([made_slide], save_dir=tmp_path, client=client, **WSI)
    before = chunks(tmp_path / "made.zarr" / "features" / "c")
    with pytest.raises(RunError) as caught:
        extractor.run([made_slide], save_dir=tmp_path, client=client, **WSI | change)
    assert named in str(caught.value)
    assert "overwrite=True" in str(caught.value)
    assert chunks(tmp_path / "made.zarr" / "features" / "c") == before
    extractor.run([made_slide], save_dir=tmp_path, client=client, overwrite=True, **WSI | change)


def test_another_encoder_is_noticed_by_its_weights(
    made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(Means(), nn.Linear(6, 3)) for _ in range(2)]
    dfx.DeepFeatureExtractor(nets[0], verbose=False).run([made_slide], save_dir=tmp_path, client=client, **WSI)
    with pytest.raises(RunError, match="encoder weights_digest"):
        dfx.DeepFeatureExtractor(nets[1], verbose=False).run([made_slide], save_dir=tmp_path, client=client, **WSI)


def foreign(folder: Path) -> Path:
    """Something of the user's where a store would go."""
    path = folder / "made.zarr"
    path.mkdir(parents=True)
    (path / "thesis.txt").write_text("years of work")
    return path


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_dfx_did_not_make_is_never_removed(
    overwrite: bool, extractor: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path
) -> None:
    path = foreign(tmp_path / "out")
    (tmp_path / "out" / "notes.md").write_text("mine")
    with pytest.raises(StoreError, match=r"made\.zarr exists and was not made by dfx"):
        extractor.run([made_slide], save_dir=tmp_path / "out", overwrite=overwrite, **WSI)
    assert (path / "thesis.txt").read_text() == "years of work"
    shutil.rmtree(path)
    zarr.create_group(str(path), attributes={"mine": 1})
    with pytest.raises(StoreError, match="not made by dfx"):
        extractor.run([made_slide], save_dir=tmp_path / "out", overwrite=overwrite, **WSI)
    shutil.rmtree(path)
    path.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(StoreError, match="not made by dfx"):
        extractor.run([made_slide], save_dir=tmp_path / "out", overwrite=overwrite, **WSI)
    path.unlink()
    extractor.run([made_slide], save_dir=tmp_path / "out", overwrite=overwrite, **WSI)
    assert (tmp_path / "out" / "notes.md").read_text() == "mine"


def test_overwrite_removes_nothing_before_the_slide_is_known_to_be_good(
    extractor: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    copy = Path(shutil.copy(made_slide, tmp_path / "made.svs"))
    extractor.run([copy], save_dir=tmp_path / "out", client=client, **WSI)
    before = chunks(tmp_path / "out" / "made.zarr" / "features" / "c")
    copy.write_text("no slide any more")
    with pytest.raises(RunError, match=r"made\.svs"):
        extractor.run([copy], save_dir=tmp_path / "out", client=client, overwrite=True, **WSI)
    assert chunks(tmp_path / "out" / "made.zarr" / "features" / "c") == before
    assert dfx.open_features(tmp_path / "out" / "made.zarr").attrs["status"] == "complete"


def test_a_run_that_was_killed_while_it_made_a_store_leaves_nothing_that_lasts(
    extractor: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    killed, others, other = (
        tmp_path / f".{name}.zarr.{digit * 32}.partial" for name, digit in (("made", "1"), ("else", "2"), ("made", "3"))
    )
    foreign = tmp_path / ".theirs.partial"
    for part in (killed, others, other, foreign):
        (part / "features").mkdir(parents=True)
    for part in (killed, others, foreign):
        os.utime(part, (0, 0))
    extractor.run([made_slide], save_dir=tmp_path, client=client, **WSI)
    assert np.allclose(dfx.open_features(tmp_path / "made.zarr").features.compute(), expected(made_slide)[0], atol=1e-5)
    # Another run may be making the other.
    assert sorted(p.name for p in tmp_path.iterdir()) == [other.name, foreign.name, "made.zarr"]


def test_a_store_of_which_only_blocks_are_left_is_made_again(
    extractor: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    extractor.run([made_slide], save_dir=tmp_path, client=client, **WSI)
    for path in (tmp_path / "made.zarr").rglob("*"):
        if path.is_file() and path.parts[-4:-2] != ("features", "c"):
            path.unlink()
    extractor.run([made_slide], save_dir=tmp_path, client=client, **WSI)
    assert np.allclose(dfx.open_features(tmp_path / "made.zarr").features.compute(), expected(made_slide)[0], atol=1e-5)


# Failures


def test_a_bad_slide_ends_only_itself(
    extractor: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    text = tmp_path / "text.svs"
    text.write_text("no slide")
    broken = tmp_path / "broken.svs"
    data = bytearray(made_slide.read_bytes())
    part = dfx.open_slide(made_slide).levels[0].parts[0]
    offset = int(part.offsets[0, 2, 3])
    data[offset : offset + 300] = bytes(300)
    broken.write_bytes(data)
    given = [tmp_path / "missing.svs", text, broken, made_slide]
    args = WSI | {"save_dir": tmp_path / "out", "client": client, "block_size": 20}
    with pytest.raises(RunError) as caught:
        extractor.run(given, **args)
    for name in ("missing.svs", "text.svs", "broken.svs", "tile 17", "3 of 4 slides failed"):
        assert name in str(caught.value)
    assert set(caught.value.failures) == set(given[:3])
    assert set(caught.value.result) == {made_slide}
    assert all(isinstance(e, SlideError) for e in caught.value.failures.values())
    result = extractor.run(given, on_error="skip", **args)
    assert set(result) == {made_slide}
    assert set(result.failures) == set(given[:3])  # type: ignore[union-attr]
    attributes = layout.dfx_attributes(tmp_path / "out" / "broken.zarr")
    assert attributes is not None
    assert attributes["status"] == "failed"
    assert "tile 17" in attributes["failure"]
    with pytest.raises(StoreError, match="failed, not complete: tile 17"):
        dfx.open_features(tmp_path / "out" / "broken.zarr")
    broken.write_bytes(made_slide.read_bytes())  # mended, so another file
    extractor.run([broken], overwrite=True, **args)


def test_an_output_that_can_not_be_closed_ends_only_its_slide(
    extractor: dfx.DeepFeatureExtractor,
    made_slide: Path,
    tmp_path: Path,
    client: distributed.Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = write_slide(tmp_path / "other.svs", 900, 700, seed=1)
    finish = writing.finish

    def full(path: Path) -> None:
        if path.name == "made.zarr":
            raise OSError(28, "No space left on device")
        finish(path)

    monkeypatch.setattr("dfx.store.finish", full)
    with pytest.raises(RunError, match=r"made\.zarr can't be closed .* No space left"):
        extractor.run([made_slide, other], save_dir=tmp_path / "out", client=client, **WSI)
    monkeypatch.undo()
    got = extractor.run([made_slide, other], save_dir=tmp_path / "out", client=client, **WSI)
    assert len(got) == 2


def test_a_slide_without_tissue_gives_an_empty_complete_store_and_a_warning(
    extractor: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    with pytest.warns(UserWarning, match="no patch under its mask"):
        extractor.run([made_slide], masks=[np.zeros((4, 4))], save_dir=tmp_path, client=client, **WSI)
    found = dfx.open_features(tmp_path / "made.zarr")
    assert found.features.shape == (0, 6)
    assert found.coordinates.compute().shape == (0, 4)
    with pytest.warns(UserWarning, match="no patch"):
        got = extractor.run([made_slide], masks=[np.zeros((4, 4))], client=client, **WSI | {"output_type": "dict"})
    assert got[made_slide]["features"].shape == (0, 6)  # type: ignore[index]


def test_an_encoder_that_fails_on_a_block_fails_that_slide(
    made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    class Picky(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.max() > 0:  # not the black patches of the probe
                raise RuntimeError("I do not like it")
            return x.mean((2, 3))

    extractor = dfx.DeepFeatureExtractor(Picky(), verbose=False)
    with pytest.raises(RunError, match=r"Picky failed on .* I do not like it"):
        extractor.run([made_slide], save_dir=tmp_path, client=client, **WSI)


# Masks


def test_masks_are_one_a_slide_and_none_means_tissue_unless_told(
    extractor: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    other = write_slide(tmp_path / "other.svs", 900, 700, seed=1)
    mask = np.zeros((13, 16), np.uint8)
    mask[4:7, 3:9] = 1
    cv2.imwrite(str(tmp_path / "mask.png"), mask * 255)
    run = WSI | {"client": client, "output_type": "dict"}
    got = extractor.run([made_slide, other], masks=[tmp_path / "mask.png", None], **run)
    assert np.array_equal(got[made_slide]["coordinates"], expected(made_slide, mask)[1])  # type: ignore[index]
    assert np.array_equal(got[other]["coordinates"], expected(other)[1])  # type: ignore[index]
    got = extractor.run([made_slide, other], masks=[mask, None], auto_get_mask=False, **run)
    assert np.array_equal(got[other]["coordinates"], expected(other, None)[1])  # type: ignore[index]
    again = extractor.run([other], **run)  # knows nothing of the masks before
    assert np.array_equal(again[other]["coordinates"], expected(other)[1])  # type: ignore[index]


def test_metadata_can_be_given_for_slides_that_lack_it(
    extractor: dfx.DeepFeatureExtractor, made_slide: Path, client: distributed.Client
) -> None:
    got = extractor.run([made_slide], wsireader_kwargs={"mpp": 0.25}, client=client, **WSI | {"output_type": "dict"})
    grid = dfx.PatchGrid.over(dfx.open_slide(made_slide, mpp=0.25), shape=64, resolution=0.5)
    assert np.array_equal(got[made_slide]["coordinates"], grid.coordinates)  # type: ignore[index]


# Loose patches


@pytest.fixture
def loose() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (10, 40, 30, 3)).astype(np.uint8)


@pytest.mark.parametrize("form", ["array", "list", "png files", "npy files", "str files"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_loose_patches_of_any_form_have_one_row_each(
    form: str, batch_size: int, extractor: dfx.DeepFeatureExtractor, loose: NDArray[np.uint8], tmp_path: Path
) -> None:
    given: Any = loose if form == "array" else list(loose)
    if "files" in form:
        given = []
        for i, patch in enumerate(loose):
            path = tmp_path / (f"{i}.npy" if form == "npy files" else f"{i}.PNG")
            if form == "npy files":
                np.save(path, patch)
            else:
                path.write_bytes(cv2.imencode(".png", patch[..., ::-1])[1].tobytes())
            given.append(str(path) if form == "str files" else path)
    out = extractor.run(given, labels=list(range(10)), batch_size=batch_size, block_size=4)
    assert isinstance(out, dict)
    assert np.allclose(out["features"], means(loose), atol=1e-5)
    assert out["labels"] == list(range(10))
    assert "labels" not in extractor.run(given)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("ending", "kind"), [(".png", "rgb16"), (".png", "grey16"), (".tif", "rgb16"), (".tif", "float"), (".npy", "rgb16")]
)
def test_loose_patches_of_other_dtypes_are_refused(
    ending: str, kind: str, extractor: dfx.DeepFeatureExtractor, loose: NDArray[np.uint8], tmp_path: Path
) -> None:
    deep: Any = loose[0].astype(np.uint16) * 16
    deep = deep[..., 0] if kind == "grey16" else deep.astype(np.float32) if kind == "float" else deep
    good, path = tmp_path / "good.png", tmp_path / f"deep{ending}"
    good.write_bytes(cv2.imencode(".png", loose[0])[1].tobytes())
    if ending == ".npy":
        np.save(path, deep)
    else:
        path.write_bytes(cv2.imencode(ending, deep)[1].tobytes())
    for given in ([path], [good, path]):
        with pytest.raises(SlideError, match=rf"deep\{ending} is no 8-bit RGB image: convert it"):
            extractor.run(given)


@pytest.mark.parametrize("ending", [".png", ".tif", ".webp"])
def test_transparent_loose_patches_lie_over_white(
    ending: str, extractor: dfx.DeepFeatureExtractor, loose: NDArray[np.uint8], tmp_path: Path
) -> None:
    alpha = np.random.default_rng(1).integers(0, 256, (40, 30)).astype(np.uint8)
    alpha[:20], alpha[20:25] = 255, 0
    path = tmp_path / f"patch{ending}"
    Image.fromarray(np.dstack([loose[0], alpha])).save(path, **({"lossless": True} if ending == ".webp" else {}))
    white = Image.new("RGBA", (30, 40), "white")
    expected = np.asarray(Image.alpha_composite(white, Image.open(path).convert("RGBA")).convert("RGB"))
    found: Any = extractor.run([path])
    assert np.allclose(found["features"], means(expected[None]), atol=2 / 255)
    Image.fromarray(np.dstack([loose[0], alpha * 0])).save(path, **({"lossless": True} if ending == ".webp" else {}))
    with pytest.raises(SlideError, match="transparent in all pixels: save it without alpha"):
        extractor.run([path])


@pytest.mark.parametrize("kind", ["grey PNG", "palette", "JPEG", "tiled TIFF", "planes", "turned by a tag"])
def test_loose_patches_have_the_colours_of_their_files_and_rows_as_stored(
    kind: str, loose: NDArray[np.uint8], tmp_path: Path
) -> None:
    patch, path = loose[0], tmp_path / "patch.tif"
    if kind == "grey PNG":
        patch = np.repeat(patch[..., :1], 3, axis=2)
        Image.fromarray(patch[..., 0]).save(path := tmp_path / "patch.png")
    elif kind == "palette":
        image = Image.fromarray(patch).quantize(64)
        image.save(path := tmp_path / "patch.png")
        patch = np.asarray(image.convert("RGB"))
    elif kind == "JPEG":
        path = tmp_path / "patch.jpg"
        path.write_bytes(cv2.imencode(".jpg", patch)[1].tobytes())
        patch = cv2.imread(str(path))[..., ::-1]
    elif kind == "planes":
        tifffile.imwrite(path, np.moveaxis(patch, -1, 0), photometric="rgb", planarconfig="separate")
    else:
        turned = [(274, "H", 1, 6, True)] if kind == "turned by a tag" else None
        tifffile.imwrite(path, patch, photometric="rgb", tile=(16, 16), extratags=turned)
    assert np.array_equal(read_image(str(path)), patch)


def test_loose_patches_can_go_to_a_store(
    extractor: dfx.DeepFeatureExtractor, loose: NDArray[np.uint8], tmp_path: Path, client: distributed.Client
) -> None:
    path = extractor.run(
        loose, labels=[0, 1] * 5, save_dir=tmp_path, output_type="zarr", output_file="mine.db", client=client
    )
    assert path == tmp_path / "mine.zarr"
    found = dfx.open_features(tmp_path / "mine.zarr")
    assert np.allclose(found.features.compute(), means(loose), atol=1e-5)
    assert zarr.open_array(str(path), path="labels")[...].tolist() == [0, 1] * 5
    with pytest.raises(CallError, match="overwrite=True"):
        extractor.run(loose, save_dir=tmp_path, output_type="zarr", output_file="mine")
    again = extractor.run(
        loose[:3], labels=list("abc"), save_dir=tmp_path, output_type="zarr", output_file="mine", overwrite=True
    )
    assert dfx.open_features(again).attrs["labels"] == list("abc")  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="loose patches"):
        dfx.open_features(again).coordinates  # type: ignore[arg-type]  # noqa: B018


# Calls that can't be


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"images": "slide.svs"}, CallTypeError),
        ({"images": Path("slide.svs")}, CallTypeError),
        ({"images": [7]}, CallTypeError),
        ({"images": [np.zeros((5, 5, 3), np.uint8)]}, CallTypeError),
        ({"output_type": "ZARR"}, CallError),
        ({"output_type": "h5"}, CallError),
        ({"save_dir": None}, CallError),
        ({"save_dir": "memory://out"}, StoreError),
        ({"save_dir": "https://example.org/out"}, StoreError),
        ({"on_error": "ignore"}, CallError),
        ({"masks": [None, None]}, CallError),
        ({"masks": "tissue"}, CallTypeError),
        ({"masks": [7]}, CallTypeError),
        ({"masks": [Path("nowhere.png")]}, CallError),
        ({"labels": [1, 2]}, CallError),
        ({"patch_input_shape": None}, CallError),
        ({"patch_input_shape": 0}, CallError),
        ({"patch_input_shape": 12.5}, CallTypeError),
        ({"stride_shape": (0, 1)}, CallError),
        ({"input_resolutions": None}, CallError),
        ({"input_resolutions": []}, CallTypeError),
        ({"input_resolutions": "0.5 mpp"}, CallTypeError),
        ({"input_resolutions": [{"resolution": 0.5}]}, CallTypeError),
        ({"input_resolutions": [{"resolution": 0.5, "units": "µm"}]}, CallError),
        ({"input_resolutions": [{"resolution": -1, "units": "mpp"}]}, CallError),
        ({"min_mask_ratio": 2}, CallError),
        ({"memory_threshold": 0}, CallError),
        ({"memory_threshold": "80%"}, CallTypeError),
        ({"batch_size": 0}, CallError),
        ({"block_size": 0}, CallError),
        ({"num_workers": -1}, CallError),
        ({"client": "tcp://localhost:8786"}, CallTypeError),
        ({"storage_options": "key"}, CallTypeError),
        ({"wsireader_kwargs": {"mppp": 1}}, CallTypeError),
        ({"wsireader_kwargs": {"mpp": -1}}, CallError),
        ({"ioconfig": 7}, CallTypeError),
        ({"ioconfig": {"patch_input_shape": 64}}, CallTypeError),
        ({"min_mask_ration": 0.5}, TypeError),
    ],
    ids=lambda v: str(v)[:50],
)
def test_a_bad_call_is_refused_before_anything_is_read_or_removed(
    change: dict[str, Any],
    error: type[Exception],
    extractor: dfx.DeepFeatureExtractor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dfx.run.item.open_slide", lambda *a, **k: pytest.fail("a slide was opened"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "slide.zarr").mkdir()
    args = {"images": [tmp_path / "slide.svs"], "save_dir": out, "overwrite": True, **WSI} | change
    with pytest.raises(error):
        extractor.run(args.pop("images"), **args)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["out", "slide.zarr"]


@pytest.mark.parametrize(
    "images",
    [
        [],
        np.zeros((3, 3), np.uint8),
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((2, 8, 8, 4), np.uint8),
        [np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)],
        [np.zeros((8, 8, 3), np.uint8), "file.png"],
        ["file.txt"],
        ["missing.png"],
        "file.png",
        None,
    ],
    ids=str,
)
def test_what_can_not_be_patches_is_refused(images: Any, extractor: dfx.DeepFeatureExtractor) -> None:
    with pytest.raises(dfx.DfxError):
        extractor.run(images)
    with pytest.raises(dfx.CallError, match="8 x 8 pixels, but patch_input_shape is"):
        extractor.run(np.zeros((2, 8, 8, 3), np.uint8), patch_input_shape=(8, 9))


@pytest.mark.parametrize("args", [{"batch_size": 0}, {"batch_size": "8"}, {"num_workers": 1.5}, {"device": 7}])
def test_a_bad_constructor_is_refused(args: dict[str, Any]) -> None:
    with pytest.raises(dfx.DfxError):
        dfx.DeepFeatureExtractor(Means(), **args)
    with pytest.raises(TypeError):
        dfx.DeepFeatureExtractor(Means(), batchsize=8)  # type: ignore[call-arg]


def test_an_output_folder_that_is_a_file_is_refused(
    extractor: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for save_dir in (file, file / "below"):
        with pytest.raises(StoreError, match="is a file"):
            extractor.run([made_slide], save_dir=save_dir, **WSI)
    assert file.read_text() == "mine"


# The process is left as it was


def test_a_run_leaves_the_process_as_it_was(
    extractor: dfx.DeepFeatureExtractor, made_slide: Path, tmp_path: Path
) -> None:
    import copy
    import logging

    def state() -> Any:
        return (
            copy.deepcopy(dask.config.config),
            dict(os.environ),
            torch.get_num_threads(),
            torch.get_rng_state().tolist(),
            [logging.getLogger(name).level for name in (None, "distributed", "dask")],
            len(logging.getLogger().handlers),
            Path.cwd(),
        )

    before = state()
    extractor.run([made_slide], save_dir=tmp_path, **WSI)
    assert state() == before
