"""A slide that was replaced is another slide; a copy of it is the same, wherever it lies."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import pytest
import tifffile
from conftest import WSI
from numpy.typing import NDArray

import dfx
from benchmarks.server import Server
from dfx.errors import CallError, RunError, SlideError
from dfx.run import BlockDone
from dfx.slides.identity import older
from dfx.slides.synthetic import paint, write_slide

SIDE = 2048
END = 384
"""Rows at the top and at the bottom that are left as they are: more than the 64 KiB that both ends have."""


def write(path: Path, picture: NDArray[np.uint8], *, levels: int = 1, byteorder: str = "<", **how: Any) -> Path:
    with tifffile.TiffWriter(path, byteorder=byteorder) as out:  # type: ignore[arg-type]
        for n in range(levels):
            level = picture[:: 2**n, :: 2**n]
            level = np.moveaxis(level, 2, 0) if how.get("planarconfig") == "separate" else level
            named = {"photometric": "rgb", "metadata": None, "subfiletype": int(n > 0)} | how
            out.write(level, resolution=(2e4 / 2**n,) * 2, resolutionunit="CENTIMETER", **named)
    return path


LAYOUTS = {
    "tiles": {"tile": (256, 256)},
    "big-endian": {"tile": (128, 64), "byteorder": ">"},
    "planes": {"tile": (256, 256), "planarconfig": "separate"},
    "strips": {"rowsperstrip": 16},
    "one strip": {"rowsperstrip": SIDE},
    "pyramid": {"tile": (256, 256), "levels": 3},
}


@pytest.fixture(scope="module")
def picture() -> NDArray[np.uint8]:
    return paint(SIDE, SIDE, 5)


@pytest.mark.parametrize("how", LAYOUTS.values(), ids=LAYOUTS)
def test_a_slide_of_the_same_size_and_ends_is_another_slide(
    how: dict[str, Any], picture: NDArray[np.uint8], tmp_path: Path
) -> None:
    path = write(tmp_path / "a.tif", picture, **how)
    before = dfx.open_slide(path).identity
    size = path.stat().st_size
    changed = picture.copy()
    changed[END:-END] = changed[END:-END, :, ::-1]  # as other stains
    masked = picture.copy()
    masked[768:1280, 768:1280] = 255  # a region that was blacked out is a sixteenth of the slide
    for other in (changed, masked):
        write(path, other, **how)
        after = dfx.open_slide(path).identity
        assert path.stat().st_size == size
        assert older(after) == older(before)  # size and ends do not tell them apart
        assert after != before


def test_every_tile_of_a_small_slide_without_compression_counts(picture: NDArray[np.uint8], tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", picture, tile=(256, 256))
    slide, data = dfx.open_slide(path), path.read_bytes()
    part = slide.levels[0].parts[0]
    seen = {slide.identity}
    for row, column in np.ndindex(8, 8):
        ((offset, count),) = part.pieces(row, column)
        path.write_bytes(data[:offset] + bytes(count) + data[offset + count :])
        seen.add(dfx.open_slide(path).identity)
    assert len(seen) == 65


def test_a_compressed_slide_whose_tiles_changed_size_or_whose_overview_changed_is_another_slide(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "a.svs", 1600, 1300)
    slide, data = dfx.open_slide(path), path.read_bytes()
    coarse = slide.levels[-1].parts[0].pieces(0, 0)[0]
    with tifffile.TiffFile(path) as tif:
        counts = tif.pages[0].tags[325]
        at = counts.valueoffset + 4 * 20
    swapped = data[:at] + data[at + 4 : at + 8] + data[at : at + 4] + data[at + 8 :]  # the counts of tiles 20 and 21
    found = {slide.identity}
    for changed in (swapped, data[: coarse[0] + 40] + bytes(8) + data[coarse[0] + 48 :]):
        assert len(changed) == len(data)
        assert changed != data
        path.write_bytes(changed)
        found.add(dfx.open_slide(path).identity)
    assert len(found) == 3


def test_a_copy_is_the_same_slide_wherever_it_lies_and_whenever_it_was_written(
    picture: NDArray[np.uint8], tmp_path: Path
) -> None:
    (tmp_path / "web").mkdir()
    near = dfx.open_slide(write(tmp_path / "a.tif", picture, tile=(256, 256), levels=2))
    copy = shutil.copy(tmp_path / "a.tif", tmp_path / "web" / "b.tif")
    os.utime(copy, (1, 1))
    assert dfx.open_slide(copy).identity == near.identity
    with Server(tmp_path / "web").running() as web:
        far = dfx.open_slide(f"{web.url}/b.tif")
        header = 4 * 256 * 1024 + 64 * 1024  # where directories, tables and ends lie, in blocks
        assert far.identity == near.identity
        assert web.sent < header + 2**20


ALL = WSI | {"auto_get_mask": False, "block_size": 16}


def test_features_of_a_slide_that_was_replaced_are_not_kept(
    picture: NDArray[np.uint8], tmp_path: Path, extractor: dfx.DeepFeatureExtractor, client: distributed.Client
) -> None:
    path = write(tmp_path / "a.tif", picture, tile=(256, 256))
    run: dict[str, Any] = {"save_dir": tmp_path / "out", "client": client, **ALL}
    store = extractor.run([path], **run)[path]  # type: ignore[index, call-overload]
    changed = picture.copy()
    changed[END:-END] = changed[END:-END, :, ::-1]
    write(path, changed, tile=(256, 256))
    with pytest.raises(RunError, match=r"holds the output of another run \(slide: stored .* overwrite"):
        extractor.run([path], **run)
    with pytest.raises(CallError, match="was not made from"):
        dfx.open_features(store).plot()
    extractor.run([path], overwrite=True, **run)
    slide = dfx.open_slide(path)
    grid = dfx.PatchGrid.over(slide, shape=64, resolution=0.5, mask=None)
    wanted = dfx.patches(slide, grid).mean(axis=(1, 2)).compute(scheduler="sync")
    assert np.allclose(dfx.open_features(store).features[:, :3].compute() * 255, wanted, atol=0.1)


def test_a_slide_that_is_overwritten_while_it_is_read_gives_no_patch_of_the_new_file(
    picture: NDArray[np.uint8], tmp_path: Path, extractor: dfx.DeepFeatureExtractor, client: distributed.Client
) -> None:
    path = write(tmp_path / "a.tif", picture, tile=(256, 256))
    slide = dfx.open_slide(path)
    other = write(tmp_path / "b.tif", 255 - picture, tile=(256, 256)).read_bytes()

    def overwrite(event: Any) -> None:
        if isinstance(event, BlockDone):
            with path.open("r+b") as file:
                file.write(other)

    run: dict[str, Any] = {"save_dir": tmp_path / "out", "client": client, **ALL}
    with pytest.raises(RunError, match=r"a\.tif changed since it was opened"):
        extractor.run([path], notify=overwrite, **run)
    with pytest.raises(SlideError, match="open it again"):
        dfx.patches(slide, dfx.PatchGrid.over(slide, shape=64, resolution=0.5, mask=None)).compute(scheduler="sync")
    with pytest.raises(RunError, match="another run"):  # nor is the rest made of the new file
        extractor.run([path], **run)


def test_a_file_that_was_written_anew_is_told_of_where_nothing_else_shows_it(
    picture: NDArray[np.uint8],
    tmp_path: Path,
    extractor: dfx.DeepFeatureExtractor,
    client: distributed.Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write(tmp_path / "a.tif", picture, tile=(256, 256))
    run: dict[str, Any] = {"save_dir": tmp_path / "out", "client": client, **ALL}
    small: dict[str, Any] = run | {"save_dir": tmp_path / "small"}
    extractor.run([path], **small)
    os.utime(path, (2, 2))
    extractor.run([path], **small)  # silent: all of its bytes are the same
    monkeypatch.setattr("dfx.slides.identity.WHOLE", 10**6)
    in_memory = ALL | {"output_type": "dict"}
    extractor.run([path], client=client, **in_memory)  # its tiles are kept by the worker
    extractor.run([path], **run)
    before = dfx.open_slide(path)
    assert extractor.run([path], **run)  # silent: it is the same file
    ((offset, _),) = before.levels[0].parts[0].pieces(4, 4)
    with path.open("r+b") as file:  # pixels that no sample shows
        file.seek(offset)
        file.write(bytes(30))
    os.utime(path, (1, 1))
    assert dfx.open_slide(path).identity == before.identity
    with pytest.warns(UserWarning, match=r"a\.tif was written again after .*features are kept.*overwrite"):
        extractor.run([path], **run)
    monkeypatch.undo()
    with pytest.raises(RunError, match=r"another run .*checksum of the slide"):
        extractor.run([path], **small)
    copy = shutil.copy(path, tmp_path / "b.tif")
    assert extractor.run([copy], **run)  # a copy has a time of its own
    as_array = extractor.run([path], client=client, **in_memory)[path]  # type: ignore[index, call-overload]
    grid = dfx.PatchGrid.over(dfx.open_slide(path), shape=64, resolution=0.5, mask=None)
    fresh = dfx.patches(dfx.open_slide(path), grid).mean(axis=(1, 2)).compute(scheduler="sync")
    assert np.allclose(np.asarray(as_array["features"])[:, :3] * 255, fresh, atol=0.1)


def test_a_store_of_dfx_0_1_is_that_of_its_slide(
    made_slide: Path, tmp_path: Path, extractor: dfx.DeepFeatureExtractor, client: distributed.Client
) -> None:
    run: dict[str, Any] = {"save_dir": tmp_path, "client": client, **ALL}
    store = extractor.run([made_slide], **run)[made_slide]  # type: ignore[index, call-overload]
    file = store / "zarr.json"
    said = json.loads(file.read_text())
    about = said["attributes"]["dfx"]
    about["fingerprint"]["slide"] = older(about["fingerprint"]["slide"])
    assert about["fingerprint"]["slide"].count("-") == 1  # size and ends
    del about["slide"]["file_version"]
    (store / "features" / "c" / "1" / "0").unlink()
    about["status"] = "running"
    file.write_text(json.dumps(said))
    assert extractor.run([made_slide], **run)[made_slide] == store  # type: ignore[index, call-overload]
    assert dfx.open_features(store).plot().size[0] > 100
    about["fingerprint"]["slide"] = about["fingerprint"]["slide"].replace("-", "-0", 1)
    file.write_text(json.dumps(said))
    with pytest.raises(RunError, match="holds the output of another run"):
        extractor.run([made_slide], **run)
