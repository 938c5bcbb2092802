"""Which images of a file are the slide and its levels, and what vendors say of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pyramids import LINE, lined, lines, mosaic, per_cm, philips_xml, smaller, write

import dfx
from dfx.errors import SlideError

# Which images are the slide's levels

RNG = np.random.default_rng(0)
BASE = RNG.integers(0, 200, (384, 512, 3)).astype(np.uint8)
HALF, QUARTER = BASE[::2, ::2], BASE[::4, ::4]
SCENE = RNG.integers(200, 256, (288, 384, 3)).astype(np.uint8)
OTHER = np.zeros_like(HALF) + np.uint8([20, 230, 20])
MARK: dict[str, Any] = {"subfiletype": 1}
STRIPS: dict[str, Any] = {"tile": None, "rowsperstrip": 16}
UM, LESS, UM2, UM4 = per_cm(0.5), per_cm(1.3), per_cm(1.0), per_cm(2.0)
DPI = {"resolution": (72, 72), "resolutionunit": 2}
SVS = {"description": "Aperio Image Library v11\\r\\n512x384 (64x64) RAW|AppMag = 20|MPP = 0.5"}
APERIO = {"description": "Aperio Image Library v11\\r\\n512x384 -> less"}

LEFT_OUT = {"another scene", "another scene, then a level", "another scene of other shape"}
LEFT_OUT |= {"marked, but of another scene", "marked, and its resolution contradicts", "others are marked"}
LEFT_OUT |= {"marked, but of which of two"}
LEFT_OUT |= {"a part of another resolution", "two levels of one size", "marked, of another shape"}
FILES: dict[str, tuple[list[tuple[NDArray[Any], dict[str, Any]]], list[NDArray[Any]]]] = {
    "marked": ([(BASE, UM), (HALF, MARK), (QUARTER, MARK)], [BASE, HALF, QUARTER]),
    "marked, all of one resolution": ([(BASE, UM), (HALF, MARK | UM), (QUARTER, MARK | UM)], [BASE, HALF, QUARTER]),
    "mark forgotten, resolution said": ([(BASE, UM), (HALF, UM2), (QUARTER, UM4)], [BASE, HALF, QUARTER]),
    "nothing said": ([(BASE, {}), (HALF, {}), (QUARTER, {})], [BASE, HALF, QUARTER]),
    "a default resolution": ([(BASE, DPI), (HALF, DPI)], [BASE, HALF]),
    "resolution of the baseline alone": ([(BASE, UM), (HALF, {})], [BASE, HALF]),
    "another scene": ([(BASE, UM), (OTHER, UM)], [BASE]),
    "another scene, then a level": ([(BASE, UM), (OTHER, UM), (HALF, MARK | UM)], [BASE, HALF]),
    "another scene of other shape": ([(BASE, UM), (OTHER[:150], UM)], [BASE]),
    "a part of another resolution": ([(BASE, UM), (OTHER, per_cm(0.25))], [BASE]),
    "two levels of one size": ([(BASE, UM), (HALF, MARK), (OTHER, MARK), (QUARTER, MARK)], [BASE, QUARTER]),
    "marked, but of another scene": (
        [(BASE, {}), (SCENE, {}), (HALF, MARK), (SCENE[::2, ::2], MARK), (SCENE[::4, ::4], MARK)],
        [BASE, HALF],
    ),
    "marked, and its resolution contradicts": (
        [(BASE, UM), (HALF, MARK | per_cm(1.3)), (QUARTER, MARK)],
        [BASE, QUARTER],
    ),
    "marked, a default resolution": ([(BASE, UM), (HALF, MARK | DPI)], [BASE, HALF]),
    "others are marked": ([(BASE, {}), (OTHER[:150], {}), (QUARTER, MARK)], [BASE, QUARTER]),
    "marked, but of which of two": ([(BASE, {}), (OTHER, {}), (QUARTER, MARK)], [BASE]),
    "smallest first": ([(QUARTER, MARK), (HALF, MARK), (BASE, UM)], [BASE, HALF, QUARTER]),
    "smallest first, unmarked": ([(QUARTER, UM4), (HALF, UM2), (BASE, UM)], [BASE, HALF, QUARTER]),
    "smallest first, nothing said": ([(QUARTER, {}), (HALF, {}), (BASE, {})], [BASE, HALF, QUARTER]),
    "thumbnail first": ([(QUARTER, MARK | STRIPS), (BASE, UM), (HALF, MARK)], [BASE, HALF]),
    "thumbnail first, unmarked": ([(QUARTER, STRIPS), (BASE, UM), (HALF, MARK)], [BASE, HALF]),
    "label first": ([(OTHER[:60, :90], MARK | STRIPS), (BASE, UM), (HALF, MARK)], [BASE, HALF]),
    "macro image first": ([(OTHER, {"subfiletype": 9}), (BASE, UM), (HALF, MARK)], [BASE, HALF]),
    "mask first": ([(OTHER[..., 0] > 0, {"subfiletype": 4, "photometric": "minisblack"}), (BASE, UM)], [BASE]),
    "thumbnail first, SVS": ([(QUARTER, MARK | STRIPS), (BASE, SVS), (HALF, APERIO)], [BASE, HALF]),
    "SVS": (
        [
            (BASE, SVS),
            (QUARTER, APERIO | STRIPS),
            (HALF, APERIO),
            (OTHER[:60, :90], APERIO | STRIPS | MARK),
            (OTHER[:60], APERIO | {"subfiletype": 9}),
        ],
        [BASE, HALF],
    ),
    "marked, 16 bits": ([(BASE, UM), (HALF.astype(np.uint16), MARK)], [BASE]),
    "marked, of another shape": ([(BASE, UM), (OTHER[:150], MARK)], [BASE]),
    "all marked": ([(BASE, UM | MARK), (HALF, UM2 | MARK)], [BASE, HALF]),
}


@pytest.mark.parametrize("kind", FILES)
def test_the_slide_is_the_image_that_is_no_smaller_version_and_its_levels_are_no_other_scene(
    kind: str, tmp_path: Path
) -> None:
    images, wanted = FILES[kind]
    slide = dfx.open_slide(write(tmp_path / "a.tif", images))
    assert [level.shape_yx for level in slide.levels] == [image.shape[:2] for image in wanted]
    for n, image in enumerate(wanted):
        assert np.array_equal(slide.level(n).compute(scheduler="sync"), image), n
    unknown = all("resolution" not in own and "SVS" not in kind for image, own in images if image is BASE)
    unknown = unknown or kind == "a default resolution"
    assert slide.mpp == (None if unknown else (0.5, 0.5))
    assert slide.vendor == ("aperio" if "SVS" in kind else "generic-tiff")
    assert any("left out" in note for note in slide.notes) == (kind in LEFT_OUT)


@pytest.mark.parametrize("own", [MARK, {}, MARK | UM2, UM2], ids=["marked", "unmarked", "both", "resolution"])
def test_levels_are_found_in_sub_ifds(own: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", [(BASE, UM | {"subifds": 2}), (HALF, own), (QUARTER, MARK)], bigtiff=True)
    slide = dfx.open_slide(path)
    assert [level.shape_yx for level in slide.levels] == [(384, 512), (192, 256), (96, 128)]
    assert np.array_equal(slide.level(1).compute(scheduler="sync"), HALF)


@pytest.mark.parametrize(
    "images",
    [[(BASE, UM), (BASE, UM)], [(OTHER, UM), (BASE, UM)], [(OTHER[:60, :90], {}), (BASE, UM)]],
    ids=["same size", "smaller scene first", "label first that nothing marks"],
)
def test_of_two_images_that_are_no_pyramid_the_slide_is_not_guessed(images: Any, tmp_path: Path) -> None:
    with pytest.raises(SlideError, match=r"nothing says which is the slide: save the wanted \w+ as a file of its own"):
        dfx.open_slide(write(tmp_path / "a.tif", images))


# What vendors say


@pytest.mark.parametrize("said", [True, False], ids=["each level said", "a level not said"])
def test_levels_of_philips_slides_lie_where_their_xml_says(said: bool, tmp_path: Path) -> None:
    """All but the first are padded to whole tiles, so that the last three have one size."""
    factors, size, at = (1, 2, 4, 8, 16), (900, 700), (800, 600)
    image = lined(size, at)
    own = philips_xml([0.00025 * f for f in factors[: None if said else -1]])
    levels = [(image, own | {"software": "Philips DP v1.0"})]
    levels += [(smaller(image, (f, f), "down", 256), MARK) for f in factors[1:]]
    path = write(tmp_path / "a.tiff", [(level, own | {"tile": (256, 256)}) for level, own in levels])
    slide = dfx.open_slide(path, backend="tiff")
    assert (slide.vendor, slide.mpp) == ("philips", (0.25, 0.25))
    wanted = [(size[0] // f, size[1] // f) for f in factors]
    assert [level.dimensions for level in slide.levels] == (wanted if said else wanted[:1])
    assert said or any("left out" in note for note in slide.notes)
    for mpp in (0.25, 0.5, 1, 2, 4):
        picture, view = mosaic(slide, mpp, "mpp")
        for found, start in zip(lines(picture), at, strict=True):
            assert abs(found * view.to_baseline[0] - start - LINE / 2) <= mpp / 0.25


OME = (
    '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
    '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="512" SizeY="384" SizeC="3" SizeZ="1" SizeT="1" '
    'PhysicalSizeX="0.5" PhysicalSizeY="0.5"><Channel ID="Channel:0:0" SamplesPerPixel="3"/>'
    '<TiffData IFD="0" PlaneCount="1"/></Pixels></Image></OME>'
)


def test_ome_levels_that_may_be_padded_are_left_out_unless_their_resolution_says_so(tmp_path: Path) -> None:
    odd = np.ascontiguousarray(BASE[:, :450])
    half = np.pad(odd[::2, ::2], ((0, 0), (0, 31), (0, 0)))  # 225 -> 256 columns: 4 tiles
    xml = {"description": OME.replace('"512"', '"450"'), "subifds": 2}
    for own, wanted in (({}, [(384, 450), (96, 112)]), (UM2, [(384, 450), (192, 225), (96, 112)])):
        path = tmp_path / f"{len(wanted)}.ome.tif"
        slide = dfx.open_slide(
            write(path, [(odd, xml | UM), (half, MARK | own), (odd[::4, :448:4], MARK)], bigtiff=True)
        )
        assert slide.vendor == "ome"
        assert [level.shape_yx for level in slide.levels] == wanted
        assert any("256 x 192 pixels is left out" in note for note in slide.notes) == (not own)
        assert np.array_equal(slide.level(len(wanted) - 1).compute(scheduler="sync"), odd[::4, :448:4])


def scn(path: Path, glass: tuple[int, int], areas: Sequence[dict[str, Any]]) -> Path:
    """Write a Leica slide: areas with images, place and size in nm, and objective; first one of the whole glass."""
    told = [{"images": [np.full((96, 128, 3), 250, np.uint8)], "at": (0, 0), "size": glass, "objective": 1.25}, *areas]
    xml, ifd, images = "", 0, []
    for area in told:
        pixels = ""
        for r, image in enumerate(area["images"]):
            pixels += f'<dimension sizeX="{image.shape[1]}" sizeY="{image.shape[0]}" r="{r}" ifd="{ifd}"/>'
            images.append((image, {}))
            ifd += 1
        (x, y), (width, height) = area["at"], area["size"]
        objective = "" if area.get("objective") is None else f"<objective>{area['objective']}</objective>"
        xml += (
            f"<image><scanSettings><objectiveSettings>{objective}</objectiveSettings></scanSettings>"
            f"<pixels>{pixels}</pixels>"
            f'<view sizeX="{width}" sizeY="{height}" offsetX="{x}" offsetY="{y}"/></image>'
        )
    space = 'xmlns="http://www.leica-microsystems.com/scn/2010/10/01"'
    xml = f'<scn {space}><collection sizeX="{glass[0]}" sizeY="{glass[1]}">{xml}</collection></scn>'
    return write(path, [(images[0][0], {"description": xml}), *images[1:]], bigtiff=True)


def area(
    at: tuple[int, int], colour: tuple[int, int, int], pixel_nm: tuple[int, int] = (500, 500), **other: Any
) -> dict[str, Any]:
    """An area of 301 x 205 pixels, with levels of a half and a quarter."""
    image = np.full((205, 301, 3), colour, np.uint8)
    size = 301 * pixel_nm[0], 205 * pixel_nm[1]
    return {"images": [image, image[:102, :150], image[:51, :75]], "at": at, "size": size, "objective": 20} | other


RED, BLUE, GREEN = (200, 20, 20), (20, 20, 200), (20, 200, 20)
GLASS = 600_000, 400_000


def extent(pixels: NDArray[Any], colour: tuple[int, int, int]) -> list[int]:
    ys, xs = np.nonzero((pixels == colour).all(axis=2))
    return [int(v) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)]


@pytest.mark.parametrize("pixel", [(500, 500), (500, 250), (250, 500)], ids=["square", "lower", "narrower"])
def test_leica_areas_lie_where_their_xml_says_at_every_level(pixel: tuple[int, int], tmp_path: Path) -> None:
    areas = [area((50_000, 30_000), RED, pixel), area((300_500, 250_000), BLUE, pixel)]
    slide = dfx.open_slide(scn(tmp_path / "a.scn", GLASS, areas))
    assert slide.mpp == (pixel[0] / 1000, pixel[1] / 1000)
    assert [level.downsample_xy for level in slide.levels] == [(1, 1), (2, 2), (4, 4)]
    for n, factor in enumerate((1, 2, 4)):
        pixels = np.asarray(slide.level(n).compute(scheduler="sync"))
        for told, colour in zip(areas, (RED, BLUE), strict=True):
            (x, y), (width, height) = told["at"], told["size"]
            wanted = np.array([x, y, x + width, y + height]) / np.tile(pixel, 2) / factor
            assert np.abs(np.array(extent(pixels, colour)) - wanted).max() <= 1, n


@pytest.mark.parametrize("pixel", [(250, 250), (505, 505), (500, 510), (1000, 1000)])
def test_leica_areas_of_different_resolution_are_refused(pixel: tuple[int, int], tmp_path: Path) -> None:
    path = scn(tmp_path / "a.scn", GLASS, [area((50_000, 30_000), RED), area((300_000, 250_000), BLUE, pixel)])
    with pytest.raises(SlideError, match=r"areas of different resolution.*export each area as a slide of its own"):
        dfx.open_slide(path)


def test_leica_levels_that_not_all_areas_have_are_left_out(tmp_path: Path) -> None:
    other = area((300_000, 250_000), BLUE)
    other["images"].pop(1)  # its second level is a quarter, that of the other a half
    slide = dfx.open_slide(scn(tmp_path / "a.scn", GLASS, [area((50_000, 30_000), RED), other]))
    assert [level.downsample_xy for level in slide.levels] == [(1, 1), (4, 4)]
    assert any("1 levels that not all areas have are left out" in note for note in slide.notes)
    pixels = np.asarray(slide.level(1).compute(scheduler="sync"))
    assert extent(pixels, BLUE) == [150, 125, 225, 176]


def test_leica_areas_that_overlap_or_reach_beyond_the_glass_are_said_and_outside_refused(tmp_path: Path) -> None:
    over = [area((-10_000, 30_000), RED), area((100_000, 60_000), BLUE), area((500_000, 350_000), GREEN)]
    slide = dfx.open_slide(scn(tmp_path / "a.scn", GLASS, over))
    assert slide.dimensions == (1200, 800)
    assert any("overlap" in note for note in slide.notes)
    assert any("beyond the glass" in note for note in slide.notes)
    for n in range(3):
        pixels = np.asarray(slide.level(n).compute(scheduler="sync"))
        assert extent(pixels, BLUE)[:2] == [200 >> n, 120 >> n]  # the later one is on top
        assert extent(pixels, RED)[0] == 0
        assert extent(pixels, GREEN)[2:] == list(slide.levels[n].dimensions)
    with pytest.raises(SlideError, match="outside of the glass"):
        dfx.open_slide(scn(tmp_path / "b.scn", GLASS, [area((700_000, 30_000), RED)]))


def test_the_macro_image_of_a_leica_slide_is_no_area_and_weaker_areas_are_said(tmp_path: Path) -> None:
    areas = [area((50_000, 30_000), RED), area((300_000, 250_000), BLUE, objective=10)]
    slide = dfx.open_slide(scn(tmp_path / "a.scn", GLASS, areas))
    assert slide.dimensions == (1200, 800)
    assert any("1 areas of weaker objectives are left out" in note for note in slide.notes)
    path = scn(tmp_path / "b.scn", GLASS, [area((50_000, 30_000), RED, objective=None)])
    path.write_bytes(path.read_bytes().replace(b"<objective>1.25</objective>", b" " * 27))
    slide = dfx.open_slide(path)  # no objective is said, so the macro image is known by its place alone
    assert slide.mpp == (0.5, 0.5)


POWERS = [
    (400, 0.5, None),
    (0.1, 0.5, None),
    (4, 0.25, None),
    (100, 0.5, None),
    (400, None, None),
    (20, 0.5, 20),
    (40, 0.5, 40),
    (20, 0.25, 20),
    (63, 0.1, 63),
    (20, None, 20),
    (1.25, 8.0, 1.25),
]


@pytest.mark.parametrize(("said", "mpp", "wanted"), POWERS)
def test_an_objective_power_that_can_not_be_is_not_used(
    said: float, mpp: float | None, wanted: float | None, tmp_path: Path
) -> None:
    own = f"|AppMag = {said}" + ("" if mpp is None else f"|MPP = {mpp}")
    image = np.full((512, 768, 3), 240, np.uint8)
    image[100:300, 200:600] = (150, 60, 140)
    path = write(tmp_path / "a.svs", [(image, {"description": f"Aperio Image Library v11\r\n768x512 {own}"})])
    slide = dfx.open_slide(path)
    assert slide.power == wanted
    assert any("objective power" in note for note in slide.notes) == (wanted is None)
    if mpp == 0.5:
        mask = slide.tissue_mask()
        assert mask.shape == ((32, 48) if said != 40 else (16, 24))
        assert mask.mean() == pytest.approx(200 * 400 / (512 * 768), abs=0.05)
    assert dfx.open_slide(path, power=said).power == said  # the user's own word is believed
    believed = dfx.open_slide(path, mpp=10 / said / 2 if said > 1 else 8.0)
    assert believed.power == (said if 0.5 <= said <= 200 else None)
