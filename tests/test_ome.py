"""OME-TIFF: the resolution of the image that is read, and only planes that lie in the opened file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

import dfx
from dfx.errors import SlideError

HEAD = '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"'
COLOURS = np.array([[220, 20, 20], [20, 220, 20], [20, 20, 220], [220, 220, 20], [20, 220, 220]], np.uint8)
Size = tuple[int, int]
LARGE, SMALL = (512, 384), (256, 192)


def flat(n: int, size: Size = LARGE) -> NDArray[np.uint8]:
    return np.broadcast_to(COLOURS[n], (size[1], size[0], 3)).copy()


def image(
    size: Size = LARGE,
    mpp: float | None = 0.25,
    data: str = '<TiffData IFD="0" PlaneCount="1"/>',
    *,
    c: int = 3,
    z: int = 1,
    t: int = 1,
    unit: str | None = "µm",
    refs: str = "",
    order: str = "XYCZT",
) -> str:
    """One `Image` of OME-XML."""
    physical = "" if mpp is None else "".join(f' PhysicalSize{axis}="{mpp}"' for axis in "XY")
    physical += "" if unit is None else "".join(f' PhysicalSize{axis}Unit="{unit}"' for axis in "XY")
    return (
        f'<Image ID="Image:0">{refs}<Pixels ID="Pixels:0" DimensionOrder="{order}" Type="uint8" SizeX="{size[0]}" '
        f'SizeY="{size[1]}" SizeC="{c}" SizeZ="{z}" SizeT="{t}"{physical}>{data}</Pixels></Image>'
    )


def write(path: Path, pages: list[NDArray[Any]], *images: str, uuid: str | None = None, levels: int = 0) -> Path:
    """Write pages with an XML; each has `levels` smaller versions in sub-IFDs."""
    own = f' UUID="{uuid}"' if uuid else ""
    xml = f"{HEAD}{own}>{''.join(images)}</OME>"
    with tifffile.TiffWriter(path) as out:
        for n, page in enumerate(pages):
            options: Any = {
                "tile": (64, 64),
                "metadata": None,
                "photometric": "rgb" if page.ndim == 3 else "minisblack",
            }
            out.write(page, description=xml.encode() if n == 0 else None, subifds=levels or None, **options)
            for level in range(levels):
                out.write(page[:: 2 << level, :: 2 << level], subfiletype=1, **options)
    return path


def colour(slide: dfx.Slide, n: int = 0) -> int:
    mean = np.asarray(slide.level(n).compute(scheduler="sync")).reshape(-1, 3).mean(axis=0)
    return int(np.abs(COLOURS - mean).sum(axis=1).argmin())


# Metadata

ONE, NO_DATA = '<TiffData IFD="{}" PlaneCount="1"/>', "<MetadataOnly/>"
LENSES = (
    '<Instrument ID="Instrument:0"><Objective ID="Objective:0" NominalMagnification="5.0"/></Instrument>'
    '<Instrument ID="Instrument:1"><Objective ID="Objective:0" NominalMagnification="40.0"/></Instrument>'
)
SETTINGS = '<ObjectiveSettings ID="Objective:0"/>'
LINKS: dict[str, tuple[list[Size], list[str], int, float | None, float | None]] = {
    # pages; XML; the page that is read; its microns per pixel and power
    "an image without data": ([LARGE], [image(SMALL, 8, NO_DATA), image()], 0, 0.25, None),
    "a larger image without data": ([SMALL], [image(LARGE, 8, NO_DATA), image(SMALL)], 0, 0.25, None),
    "an image without data of the same size": ([LARGE], [image(LARGE, 8, NO_DATA), image()], 0, 0.25, None),
    "an image whose data are in the XML": ([LARGE], [image(LARGE, 8, "<BinData>aa</BinData>"), image()], 0, 0.25, None),
    "images in another order": (
        [SMALL, LARGE],
        [image(LARGE, 0.25, ONE.format(1)), image(SMALL, 8, ONE.format(0))],
        1,
        0.25,
        None,
    ),
    "images that skip a page": (
        [SMALL, SMALL, LARGE],
        [image(SMALL, 8), image(LARGE, 0.25, ONE.format(2))],
        2,
        0.25,
        None,
    ),
    "no IFD, the sizes tell": (
        [LARGE],
        [image(SMALL, 8, "<TiffData/>"), image(LARGE, 0.25, "<TiffData/>")],
        0,
        0.25,
        None,
    ),
    "no IFD in one of two": (
        [SMALL, LARGE],
        [image(SMALL, 8, "<TiffData/>"), image(LARGE, 0.25, ONE.format(1))],
        1,
        0.25,
        None,
    ),
    "one page for two images that differ": ([LARGE], [image(LARGE, 8), image()], 0, None, None),
    "one page for two images that agree": ([LARGE], [image(), image()], 0, 0.25, None),
    "no TiffData at all": ([LARGE], [image(SMALL, 8, ""), image(LARGE, 0.25, "")], 0, 0.25, None),
    "no TiffData at all, and equal sizes": ([LARGE], [image(LARGE, 8, ""), image(LARGE, 0.25, "")], 0, None, None),
    "a size that is not the page's": ([LARGE], [image((500, 384))], 0, None, None),
    "an image in an annotation": (
        [LARGE],
        [f"<StructuredAnnotations><XMLAnnotation>{image(LARGE, 8)}</XMLAnnotation></StructuredAnnotations>", image()],
        0,
        0.25,
        None,
    ),
    "NumPlanes of old files": ([LARGE], [image(data='<TiffData IFD="0" NumPlanes="1"/>')], 0, 0.25, None),
    "nanometres": ([LARGE], [image(mpp=250, unit="nm")], 0, 0.25, None),
    "ångström": ([LARGE], [image(mpp=2500, unit="Å")], 0, 0.25, None),
    "no unit": ([LARGE], [image(unit=None)], 0, 0.25, None),
    "a unit that is no length": ([LARGE], [image(unit="pixel")], 0, None, None),
    "no size": ([LARGE], [image(mpp=None)], 0, None, None),
    "an objective's ID in two instruments": (
        [LARGE],
        [LENSES, image(refs=f'<InstrumentRef ID="Instrument:1"/>{SETTINGS}')],
        0,
        0.25,
        40,
    ),
    "an objective's ID in two instruments, and no reference": ([LARGE], [LENSES, image(refs=SETTINGS)], 0, 0.25, None),
    "no objective": ([LARGE], [LENSES, image(refs='<InstrumentRef ID="Instrument:1"/>')], 0, 0.25, None),
}


@pytest.mark.parametrize("case", LINKS)
def test_resolution_and_power_are_those_of_the_image_that_is_read(case: str, tmp_path: Path) -> None:
    pages, xml, read, mpp, power = LINKS[case]
    slide = dfx.open_slide(
        write(tmp_path / "s.ome.tif", [flat(n, size) for n, size in enumerate(pages)], *xml, levels=1)
    )
    assert (slide.vendor, colour(slide), slide.dimensions) == ("ome", read, pages[read])
    assert [colour(slide, n) for n in range(len(slide.levels))] == [read, read]
    assert slide.mpp == (None if mpp is None else pytest.approx((mpp, mpp)))
    assert slide.power == power
    contradictory = case.startswith(("one page for two images that d", "no TiffData at all, ", "a size that is not"))
    assert contradictory == any("no resolution is known" in n or "several resolutions" in n for n in slide.notes)
    assert ("power is unknown" in str(slide.notes)) == case.endswith("and no reference")


@pytest.mark.parametrize(
    ("pages", "xml", "message"),
    [
        ([LARGE, LARGE], [image(), image(LARGE, 8, ONE.format(1))], "several images of 512 x 384 pixels"),
        ([SMALL, LARGE], [image(SMALL), image(LARGE, 8, "<TiffData/>")], "describes an image of 512 x 384"),
        (
            [LARGE],
            [image(z=2, data=f"{ONE.format(0)}<TiffData FirstZ='1' IFD='0'/>")],
            "several planes .* into one IFD",
        ),
        ([LARGE] * 2, [image(t=2, data="<TiffData/>")], "2 images along axis T"),
        ([LARGE], [image(order="XYAZT")], "DimensionOrder"),
        ([LARGE], [image(data='<TiffData IFD="x"/>')], "TiffData with IFD='x'"),
        ([LARGE], [image(z=0)], "no valid SizeZ"),
    ],
)
def test_what_the_xml_leaves_open_is_refused(pages: list[Size], xml: list[str], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "s.ome.tif", [flat(n, size) for n, size in enumerate(pages)], *xml)
    with pytest.raises(SlideError, match=message):
        dfx.open_slide(path)


# Planes


@pytest.mark.parametrize(
    ("data", "order", "read"),
    [
        ("<TiffData/>", "XYCZT", 1),
        ('<TiffData IFD="0" PlaneCount="3"/>', "XYZTC", 1),
        ("".join(f'<TiffData FirstZ="{2 - n}" IFD="{n}"/>' for n in range(3)), "XYCZT", 1),
        ('<TiffData FirstZ="1" IFD="2"/><TiffData FirstZ="0" IFD="0"/><TiffData FirstZ="2" IFD="1"/>', "XYTZC", 2),
        ('<TiffData FirstZ="1" IFD="0" PlaneCount="2"/><TiffData FirstZ="0" IFD="2" PlaneCount="1"/>', "XYCZT", 0),
    ],
)
def test_the_middle_focal_plane_is_the_one_that_the_xml_names(data: str, order: str, read: int, tmp_path: Path) -> None:
    path = write(tmp_path / "s.ome.tif", [flat(n) for n in range(3)], image(z=3, data=data, order=order), levels=1)
    slide = dfx.open_slide(path)
    assert [colour(slide, n) for n in range(len(slide.levels))] == [read, read]
    assert slide.notes == ("3 focal planes; the middle one is read",)


@pytest.mark.parametrize("order", ["XYCZT", "XYZCT"])
def test_channels_are_in_the_order_that_the_xml_names(order: str, tmp_path: Path) -> None:
    pages = [np.full((128, 192), 10 * n, np.uint8) for n in range(6)]  # 2 channels, 3 focal planes
    path = write(tmp_path / "s.ome.tif", pages, image((192, 128), c=2, z=3, data="<TiffData/>", order=order), levels=1)
    slide = dfx.open_slide(path)
    want = [20, 30] if order == "XYCZT" else [10, 40]
    for n in range(2):
        assert np.asarray(slide.level(n).compute(scheduler="sync")).mean(axis=(0, 1)).tolist() == want


def files(tmp_path: Path, *, axis: str = "Z", uuids: str = "own") -> list[Path]:
    """Three files of one image, each of which names all."""
    data = "".join(
        f'<TiffData First{axis}="{n}" IFD="0" PlaneCount="1"><UUID FileName="p{n}.ome.tif">'
        f"{'u' if uuids == 'one for all' else f'u{n}'}</UUID></TiffData>"
        for n in range(3)
    )
    paths = []
    for n in range(3):
        sizes = {"z": 1, "c": 3, "t": 1, axis.lower(): 3 if axis != "C" else 9}
        xml = image(data=data, **sizes)  # type: ignore[arg-type]
        uuid = {"own": f"u{n}", "one for all": "u"}.get(uuids)
        # of different length, so that one file's tiles lie elsewhere in another
        paths.append(write(tmp_path / f"p{n}.ome.tif", [flat(n)], xml, uuid=uuid, levels=n))
    return paths


@pytest.mark.parametrize("axis", ["Z", "T"])
@pytest.mark.parametrize("uuids", ["own", "none", "one for all"])
@pytest.mark.parametrize("where", ["its folder", "elsewhere", "a URL"])
def test_planes_of_other_files_are_not_read(
    axis: str, uuids: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n, path in enumerate(files(tmp_path, axis=axis, uuids=uuids)):
        monkeypatch.chdir(tmp_path if where == "its folder" else "/")
        url = path.name if where == "its folder" else str(path)
        if where == "a URL":
            url = f"memory://{tmp_path.name}/{path.name}"
            fsspec.filesystem("memory").pipe_file(url.removeprefix("memory://"), path.read_bytes())
        slide = dfx.open_slide(url)
        assert [colour(slide, level) for level in range(len(slide.levels))] == [n] * (n + 1)
        assert slide.mpp == (0.25, 0.25)
        assert f"{'focal plane' if axis == 'Z' else 'time'} {n + 1} of 3 is read" in slide.notes[0]
        assert "lie in other files (p" in slide.notes[1]
        assert "middle" not in str(slide.notes)


def test_the_plane_nearest_to_the_middle_is_read_where_a_file_has_several(tmp_path: Path) -> None:
    data = '<TiffData FirstZ="0" IFD="0" PlaneCount="2"/><TiffData FirstZ="2"><UUID FileName="b">u</UUID></TiffData>'
    slide = dfx.open_slide(write(tmp_path / "a.ome.tif", [flat(0), flat(1)], image(z=5, data=data), uuid="v"))
    assert colour(slide) == 1
    assert slide.notes[0] == "focal plane 2 of 5 is read; this file has 2 of them"


def test_channels_in_other_files_are_an_error_that_says_so(tmp_path: Path) -> None:
    for path in files(tmp_path, axis="C"):
        with pytest.raises(
            SlideError, match=r"channels.* lie in other files \(p.*save the wanted planes as one OME-TIFF"
        ):
            dfx.open_slide(path)


def test_a_renamed_file_is_known_by_its_uuid_and_a_stranger_is_refused(tmp_path: Path) -> None:
    path = files(tmp_path)[1].rename(tmp_path / "p0.ome.tif")  # under the name of another
    assert colour(dfx.open_slide(path)) == 1
    one = '<TiffData IFD="0"><UUID FileName="before.ome.tif">u</UUID></TiffData>'
    assert dfx.open_slide(write(tmp_path / "after.ome.tif", [flat(0)], image(data=one))).mpp == (0.25, 0.25)
    for uuids in ("none", "one for all"):
        path = files(tmp_path, uuids=uuids)[0].rename(tmp_path / "q.ome.tif")
        with pytest.raises(
            SlideError, match=r"all its planes lie in other files \(p0.ome.tif, p1.ome.tif, p2.ome.tif\)"
        ):
            dfx.open_slide(path)


def test_metadata_in_a_companion_file_are_not_guessed(tmp_path: Path) -> None:
    other = '<BinaryOnly MetadataFile="x.companion.ome" UUID="u"/>'
    slide = dfx.open_slide(write(tmp_path / "a.ome.tif", [flat(2)], other, levels=2))
    assert (colour(slide), slide.mpp, len(slide.levels)) == (2, None, 3)
    assert "x.companion.ome" in slide.notes[-1]
    with pytest.raises(SlideError, match="2 images of 512 x 384"):
        dfx.open_slide(write(tmp_path / "b.ome.tif", [flat(0), flat(1)], other))
    (tmp_path / "x.companion.ome").write_text(f"{HEAD}>{image()}</OME>")
    with pytest.raises(SlideError, match=r"OME-XML .*: give the OME-TIFF"):
        dfx.open_slide(tmp_path / "x.companion.ome")
