"""What dfx does not read itself: through OpenSlide, with its pixels, and said wherever it matters."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import openslide
import pytest
import tifffile
from conftest import DATA, WSI, shared
from foreign import TILE, halved, write_czi, write_dicom, write_mirax, write_vms
from numpy.typing import NDArray

import dfx
from dfx.cli import main
from dfx.errors import SlideError, TileError
from dfx.slides.cache import OPENED
from dfx.slides.openslide import Regions, region_side
from dfx.store import stored_slide

Picture = NDArray[np.uint8]
BACKEND = f"openslide {openslide.__library_version__}"
LOSSY = {"vms": 24}
"""By how much pixels may differ from what was written."""
STITCHED = ["syn_ventana_overlap.bif", "syn_trestle_overlap.tif"]


@pytest.fixture(scope="module")
def picture() -> Picture:
    """White around something dark, every pixel of which is told from its neighbours."""
    y, x = np.mgrid[0:768, 0:1024]
    inside = (((x - 500) / 400) ** 2 + ((y - 380) / 300) ** 2 < 1)[..., None]
    drawn = np.stack([x // 8 + 20, y // 6 + 20, (x + y) // 12], axis=2) + (x * 7 + y * 13)[..., None] % 9
    return np.where(inside, drawn, 245).astype(np.uint8)


@pytest.fixture(scope="module", params=["mirax", "dicom", "vms", "none", "zstd0", "zstd1"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, picture: Picture) -> Path:
    """A slide of 1024 x 768 pixels, 0.25 mpp, 40x."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "mirax":
        return write_mirax(folder / "slide.mrxs", picture)
    if request.param in ("none", "zstd0", "zstd1"):
        return write_czi(folder / "slide.czi", picture, request.param)
    return write_dicom(folder, picture) if request.param == "dicom" else write_vms(folder / "slide.vms", picture)


@pytest.fixture
def mirax(tmp_path: Path, picture: Picture) -> Path:
    return write_mirax(tmp_path / "slide.mrxs", picture)


def oracle(path: Path, n: int) -> NDArray[Any]:
    """A level, whole, as OpenSlide gives it, over white."""
    other = openslide.OpenSlide(path)
    rgba = np.asarray(other.read_region((0, 0), n, other.level_dimensions[n])).astype(int)
    return (rgba[..., :3] * rgba[..., 3:] + (255 - rgba[..., 3:]) * 255 + 127) // 255


def whole(slide: dfx.Slide, n: int = 0) -> Picture:
    return slide.region(n, (0, 0, *slide.levels[n].shape_yx), rgb=True)


def allowed(path: Path) -> int:
    return LOSSY.get(path.suffix[1:], 0)


# Facts and pixels


def test_facts_of_a_slide_that_is_no_tiff(made: Path) -> None:
    slide = dfx.open_slide(made)
    assert slide.vendor == {".mrxs": "mirax", ".dcm": "dicom", ".vms": "hamamatsu", ".czi": "zeiss"}[made.suffix]
    assert slide.backend == BACKEND
    assert slide.dimensions == (1024, 768)
    assert [level.downsample for level in slide.levels][:2] == [1, 2]
    assert slide.mpp == pytest.approx((0.25, 0.25))
    assert slide.power == 40
    assert dfx.open_slide(made, mpp=0.5, power=20).mpp == (0.5, 0.5)


def test_pixels_of_every_level_are_those_that_were_scanned(made: Path, picture: Picture) -> None:
    slide = dfx.open_slide(made)
    for n in range(len(slide.levels)):
        assert np.array_equal(whole(slide, n), oracle(made, n))
    for n, want in enumerate([picture, halved(picture)]):
        assert np.abs(whole(slide, n).astype(int) - want).max() <= allowed(made)
    lazy = slide.level(0)
    assert lazy.dtype == np.uint8
    assert np.array_equal(lazy[100:700, 33:900].compute(scheduler="sync"), oracle(made, 0)[100:700, 33:900])


def test_patches_and_thumbnails_are_cut_as_from_any_other_slide(made: Path, picture: Picture) -> None:
    slide = dfx.open_slide(made)
    grid = dfx.PatchGrid.over(slide, shape=(100, 100), resolution=0.25, units="mpp", mask=None)
    patches = dfx.patches(slide, grid).compute(scheduler="sync")
    beyond = np.full((800, 1100, 3), 255, int)
    beyond[:768, :1024] = picture
    for patch, (x0, y0, x1, y1) in zip(patches, grid.coordinates.tolist(), strict=True):
        assert np.abs(patch.astype(int) - beyond[y0:y1, x0:x1]).max() <= allowed(made)
    mean = picture.reshape(192, 4, 256, 4, 3).mean((1, 3))
    assert np.abs(slide.thumbnail(256) - mean).max() <= max(1, allowed(made))
    mask = slide.tissue_mask()
    assert 0.2 < mask.mean() < 0.8


def test_a_real_dicom_slide_of_jpeg_tiles() -> None:
    path = shared("slides/real/boxes_0.dcm")
    slide = dfx.open_slide(path)
    assert (slide.vendor, slide.dimensions, slide.mpp, slide.power) == ("dicom", (16, 16), (0.499, 0.499), 20)
    assert np.array_equal(whole(slide), oracle(path, 0))


@pytest.mark.parametrize("name", STITCHED)
def test_overlapping_tiles_are_stitched(name: str) -> None:
    path = shared(f"slides/synthetic/{name}")
    want = next(e for e in json.loads((DATA / "slides/synthetic/expect.json").read_text()) if e["name"] == name)
    slide = dfx.open_slide(path)
    assert slide.backend == BACKEND
    assert (slide.mpp, slide.power) == (pytest.approx((want["expect"]["mpp"],) * 2), want["expect"]["power"])
    for n, level in enumerate(slide.levels):
        regions = level.parts[0]
        assert isinstance(regions, Regions)
        exact = regions.misplaced == 0
        off = np.abs(whole(slide, n).astype(int) - oracle(path, n))
        assert off.max() == 0 if exact else off.mean() < 3
        assert exact or any(f"level {n} begin at whole pixels" in note for note in slide.notes)


def test_what_was_not_scanned_is_white(tmp_path: Path, picture: Picture) -> None:
    slide = dfx.open_slide(write_mirax(tmp_path / "gap.mrxs", picture, missing={(2, 3), (5, 7)}))
    want = picture.copy()
    for row, column in ((2, 3), (5, 7)):
        want[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE] = 255
    assert np.array_equal(whole(slide), want)


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "synthetic/syn_aperio_jpeg.svs"])
def test_a_tiff_that_openslide_is_asked_for_has_the_same_pixels_and_another_identity(name: str) -> None:
    ours = dfx.open_slide(shared(f"slides/{name}"))
    theirs = dfx.open_slide(shared(f"slides/{name}"), backend="openslide")
    assert (ours.backend, theirs.backend) == ("tiff", BACKEND)
    assert np.array_equal(whole(ours), whole(theirs))
    assert (ours.mpp, ours.power, ours.vendor) == (theirs.mpp, theirs.power, theirs.vendor)
    assert ours.identity != theirs.identity
    with pytest.raises(dfx.CallError, match="another slide"):
        dfx.patches(theirs, dfx.PatchGrid.over(ours, resolution=1, units="baseline", mask=None))


def test_regions_are_whole_tiles_of_the_file() -> None:
    assert [region_side(side) for side in (1, 8, 128, 240, 256, 512, 1000, 1024, 3968)] == [
        *(512, 512, 512, 480, 512, 512, 1000, 1024),
        512,
    ]


# Refusals


def test_without_openslide_the_error_says_how_to_get_it(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfx.slides.installed", lambda: False)
    with pytest.raises(SlideError, match=r"is an? .*: pip install dfx\[openslide\], here and on the workers"):
        dfx.open_slide(made)
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(SlideError, match=r"can't be loaded .*: pip install dfx\[openslide\]"):
        dfx.open_slide(made, backend="openslide")


def test_what_openslide_does_not_read_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "other.svslide").write_bytes(b"SQLite format 3\0" + bytes(4096))
    with pytest.raises(SlideError, match=r"other.svslide .*is no slide that OpenSlide"):
        dfx.open_slide(tmp_path / "other.svslide")
    with pytest.raises(dfx.CallError, match="backend must be"):
        dfx.open_slide(tmp_path / "other.svslide", backend="bioformats")  # type: ignore[arg-type]
    for name in ("missing.mrxs", "."):
        with pytest.raises(SlideError):
            dfx.open_slide(tmp_path / name, backend="openslide")


def test_a_tiff_of_no_known_vendor_is_not_given_to_openslide() -> None:
    """Of several channels it would show the first, in grey."""
    with pytest.raises(SlideError, match=r"whose vendor OpenSlide .*backend='tiff'"):
        dfx.open_slide(shared("slides/synthetic/syn_ome_fluo16.ome.tif"), backend="openslide")


def test_a_mirax_slide_needs_nothing_of_the_file_that_names_it(mirax: Path, picture: Picture) -> None:
    mirax.write_bytes(b"")
    assert np.array_equal(whole(dfx.open_slide(mirax)), picture)


def test_a_compression_that_openslide_does_not_read_is_told_from_damage(tmp_path: Path, picture: Picture) -> None:
    path = write_czi(tmp_path / "slide.czi", picture)
    data = bytearray(path.read_bytes())
    at = -1
    while (at := data.find(b"DV\3\0\0\0", at + 1)) >= 0:
        data[at + 18] = 1  # JPEG
    path.write_bytes(data)
    with pytest.raises(SlideError, match=r"JPEG compression is not supported.*Convert it to OME-TIFF"):
        dfx.open_slide(path)


def write_argos(path: Path, planes: list[Picture]) -> Path:
    """An Argos AVS: focal planes, a pyramid each, in one TIFF."""
    levels = f"<MinZ>0</MinZ><MaxZ>{len(planes) - 1}</MaxZ>"
    xml = f"<Argos.Scan.Metadata>{levels}<ObjectiveMagnification>20</ObjectiveMagnification></Argos.Scan.Metadata>"
    with tifffile.TiffWriter(path) as out:
        for plane in planes:
            for level in (plane, halved(plane)):
                out.write(
                    level,
                    tile=(TILE, TILE),
                    photometric="rgb",
                    metadata=None,
                    extratags=[(65000, 2, len(xml) + 1, xml, True)],
                )
    return path


def test_openslide_is_asked_about_files_that_dfx_can_not_place(
    tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    planes = [255 - picture, picture, 255 - picture]
    argos = write_argos(tmp_path / "slide.avs", planes)
    slide = dfx.open_slide(argos)
    assert (slide.vendor, slide.power, slide.backend) == ("argos", 20, BACKEND)
    assert np.array_equal(whole(slide), picture)
    monkeypatch.setattr("dfx.slides.installed", lambda: False)
    with pytest.raises(SlideError, match="3 images of 1024 x 768"):
        dfx.open_slide(argos)


def test_openslide_decides_by_itself_what_it_recognises(
    tmp_path: Path, mirax: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file whose kind dfx has never heard of."""
    path = tmp_path / "slide.new"
    path.write_bytes(b"a format of the future" * 100)
    with pytest.raises(SlideError, match=r"no TIFF file: .*dfx\[openslide\] is installed; convert"):
        dfx.open_slide(path)
    real, asked = openslide.OpenSlide, []

    class Stand(real):  # type: ignore[misc, valid-type]
        def __init__(self, file: Any) -> None:
            super().__init__(mirax if Path(file) == path else file)

        @classmethod
        def detect_format(cls, file: Any) -> str | None:
            asked.append(Path(file))
            return "future" if Path(file) == path else real.detect_format(file)

    monkeypatch.setattr(openslide, "OpenSlide", Stand)
    slide = dfx.open_slide(path)
    assert (slide.vendor, slide.backend) == ("future", BACKEND)
    assert np.array_equal(whole(slide), picture)
    asked.clear()
    dfx.open_slide(tifffile_slide(tmp_path / "plain.tif", picture))
    cut = tmp_path / "cut.tif"
    cut.write_bytes((tmp_path / "plain.tif").read_bytes()[:5000])
    with pytest.raises(SlideError):
        dfx.open_slide(cut)
    assert not asked  # a TIFF is dfx's own, whole or damaged
    with pytest.raises(SlideError, match="no TIFF file"):
        dfx.open_slide(path, backend="tiff")


def tifffile_slide(path: Path, picture: Picture) -> Path:
    tifffile.imwrite(path, picture, tile=(TILE, TILE), photometric="rgb", metadata=None)
    return path


@pytest.mark.parametrize("gone", ["Data0000.dat", "Data0001.dat", "Index.dat", "Slidedat.ini", "."])
def test_a_slide_of_which_a_file_is_missing_is_refused(gone: str, mirax: Path) -> None:
    path = mirax.with_suffix("") / gone
    shutil.rmtree(path) if gone == "." else path.unlink()
    with pytest.raises(
        SlideError, match=r"slide.mrxs .*OpenSlide.* missing[:;] copy all of it|Data0000.dat does not exist"
    ):
        dfx.open_slide(mirax)


def damage(mirax: Path, picture: Picture, row: int, column: int) -> None:
    data = mirax.with_suffix("") / "Data0000.dat"
    content = bytearray(data.read_bytes())
    starts = [i for i in range(len(content)) if content[i : i + 4] == b"\x89PNG"]
    at = starts[row * (picture.shape[1] // TILE) + column]
    content[at + 60 : at + 400] = bytes(340)
    data.write_bytes(content)


def test_a_damaged_tile_is_named_and_spoils_no_other_thread(mirax: Path, picture: Picture) -> None:
    damage(mirax, picture, 1, 1)
    slide = dfx.open_slide(mirax)

    def look(n: int) -> bool:
        if n % 3 == 0:  # an error is what OpenSlide's handle says from then on
            with pytest.raises(
                TileError, match=r"tile 0 \(row 0, column 0\) of level 0 of .*slide.mrxs can't be decoded"
            ):
                slide.region(0, (130, 130, 140, 140), rgb=True)
            return True
        return np.array_equal(slide.region(0, (520, 520, 768, 1024), rgb=True), picture[520:, 520:])

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(look, range(60)))


# Runs


def test_a_slide_pickles_to_its_address_and_what_read_it(made: Path) -> None:
    slide = dfx.open_slide(made)
    data = pickle.dumps(slide)
    assert len(data) < 600
    OPENED.clear()
    again = pickle.loads(data)
    assert (again.backend, again.identity) == (BACKEND, slide.identity)
    assert np.array_equal(whole(again, 1), whole(slide, 1))
    OPENED.clear()
    with pytest.raises(SlideError, match=r"opened by openslide 3\.4\.1 and is read by openslide .* here: install"):
        pickle.loads(data.replace(openslide.__library_version__.encode(), b"3.4.1"))


def test_identity_names_the_content_of_all_files(made: Path, tmp_path: Path) -> None:
    copy = tmp_path / "moved"
    shutil.copytree(made.parent, copy)
    if made.suffix == ".dcm":
        (copy / made.name).rename(copy / "renamed.dcm")
        (copy / "level1.dcm").rename(copy / "first.dcm")
        write_dicom(copy / "more", np.zeros((256, 256, 3), np.uint8))
        shutil.move(copy / "more/level0.dcm", copy / "other series.dcm")
    path = copy / ("renamed.dcm" if made.suffix == ".dcm" else made.name)
    first = dfx.open_slide(path)
    assert first.identity == dfx.open_slide(made).identity
    part = {".mrxs": "slide/Data0000.dat", ".dcm": "first.dcm", ".vms": "slide-image.jpg", ".czi": "slide.czi"}[
        made.suffix
    ]
    with (copy / part).open("r+b") as file:
        file.seek(-40, 2)
        byte = file.read(1)
        file.seek(-40, 2)
        file.write(bytes([byte[0] ^ 1]))
    assert dfx.open_slide(path).identity != first.identity


@pytest.mark.parametrize("made", ["mirax", "dicom"], indirect=True)
def test_a_run_over_worker_processes_says_what_read_the_slide_and_resumes(
    made: Path, tmp_path: Path, picture: Picture, extractor: dfx.DeepFeatureExtractor, processes: distributed.Client
) -> None:
    call: dict[str, Any] = {**WSI, "save_dir": tmp_path / "out", "client": processes, "block_size": 8}
    call["input_resolutions"] = [{"resolution": 0.25, "units": "mpp"}]
    path = extractor.run([made], **call)[made]
    found = dfx.open_features(path)
    assert found.attrs["slide"]["backend"] == found.attrs["fingerprint"]["backend"] == BACKEND
    features, coordinates = found.features.compute(), found.coordinates.compute()
    assert len(features) > 24
    means = np.array([picture[y0:y1, x0:x1].mean((0, 1)) / 255 for x0, y0, x1, y1 in coordinates.tolist()])
    assert np.abs(features[:, :3] - means).max() < 1e-4 + allowed(made) / 255
    block = path / "features/c/1/0"
    whole_block, time = block.read_bytes(), (path / "features/c/0/0").stat().st_mtime_ns
    block.unlink()
    extractor.run([made], **call)
    assert block.read_bytes() == whole_block
    assert (path / "features/c/0/0").stat().st_mtime_ns == time
    assert stored_slide(path, found.attrs).backend == BACKEND


def test_a_store_is_never_resumed_through_another_reader(
    made_slide: Path, tmp_path: Path, extractor: dfx.DeepFeatureExtractor, client: distributed.Client
) -> None:
    call: dict[str, Any] = {**WSI, "save_dir": tmp_path, "client": client}
    theirs = dfx.open_slide(made_slide, backend="openslide")
    path = extractor.run([made_slide], **call)[made_slide]
    assert dfx.open_features(path).attrs["slide"]["backend"] == "tiff"
    assert "backend" not in dfx.open_features(path).attrs["fingerprint"]  # so that older stores go on
    with pytest.raises(dfx.RunError, match=rf"backend: stored None, asked {BACKEND}"):
        extractor.run([theirs], **call)
    path = next(iter(extractor.run([theirs], **call, overwrite=True, wsireader_kwargs={"power": 20}).values()))
    assert dfx.open_features(path).attrs["slide"]["backend"] == BACKEND  # also when opened again for other metadata


def test_a_damaged_region_can_be_filled(
    mirax: Path, picture: Picture, tmp_path: Path, extractor: dfx.DeepFeatureExtractor, client: distributed.Client
) -> None:
    damage(mirax, picture, 0, 0)
    call: dict[str, Any] = {**WSI, "save_dir": tmp_path / "out", "client": client, "auto_get_mask": False}
    call["input_resolutions"] = [{"resolution": 0.25, "units": "mpp"}]
    found = dfx.open_features(extractor.run([mirax], **call, on_bad_tile="fill")[mirax])
    assert [name.split(" of ")[0] for name in found.attrs["damaged_tiles"]] == ["tile 0 (row 0, column 0)"]
    features, coordinates = found.features.compute(), found.coordinates.compute()
    filled = (coordinates[:, :2] < 512).all(axis=1)
    assert (features[filled, :3] == 1).all()
    assert (features[~filled, :3] < 1).any()


def test_info_says_what_reads_the_slide(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(made)]) == 0
    assert f"backend      {BACKEND}" in capsys.readouterr().out


def test_a_level_that_is_larger_than_the_slide_is_damage(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.svs") as out:
        for shape in ((256, 256, 3), (1280, 64, 3)):
            described = "Aperio Image Library v1\r\n256x256 (64x64)|AppMag = 20|MPP = 0.5"
            options = {"tile": (64, 64), "photometric": "rgb", "metadata": None, "description": described}
            out.write(np.zeros(shape, np.uint8), **options)  # type: ignore[arg-type]
    assert openslide.OpenSlide(tmp_path / "a.svs").level_count == 2
    with pytest.raises(SlideError, match=r"a\.svs is damaged: level 1 has 64 x 1280 pixels, more than the 256 x 256"):
        dfx.open_slide(tmp_path / "a.svs", backend="openslide")
