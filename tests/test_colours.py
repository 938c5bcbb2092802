"""Colours of tiles: what the stream, the tag and the vendor say together; contradictions are refused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

import dfx
from dfx.errors import SlideError, TileError
from dfx.slides.codestream import ColourConflict, Jpeg2000Header, jpeg2000_header
from dfx.slides.jpeg2000 import Jpeg2000Tiles
from dfx.slides.layout import Layout
from dfx.slides.synthetic import paint

Picture = NDArray[np.uint8]
SIDE = 64


@pytest.fixture(scope="module")
def picture() -> Picture:
    """Smooth, far from grey, and with red and blue that differ everywhere."""
    y, x = np.mgrid[0 : 2 * SIDE, 0 : 4 * SIDE]
    return np.stack([200 - x // 3, 40 + y // 2, 90 + (x + y) // 5], axis=2).astype(np.uint8)


def cut(picture: Picture) -> list[Picture]:
    rows, columns = picture.shape[0] // SIDE, picture.shape[1] // SIDE
    blocks = [(r, c) for r in range(rows) for c in range(columns)]
    return [np.ascontiguousarray(picture[r * SIDE :, c * SIDE :][:SIDE, :SIDE]) for r, c in blocks]


def write(
    path: Path,
    tiles: Iterable[bytes],
    shape: tuple[int, ...],
    *,
    photometric: int,
    compression: int = 7,
    **options: Any,
) -> Path:
    """A TIFF of encoded tiles; an empty one is not stored. PhotometricInterpretation may be any."""
    planar = options.get("planarconfig") == "separate"
    with tifffile.TiffWriter(path, byteorder=options.pop("byteorder", "<")) as out:
        out.write(
            iter(tiles),
            shape=shape,
            dtype=options.pop("dtype", np.uint8),
            tile=(SIDE, SIDE),
            compression=compression,
            photometric="rgb" if (shape[0] if planar else shape[-1]) == 3 else "minisblack",
            metadata=None,
            **options,
        )
    with tifffile.TiffFile(path, mode="r+") as tif:
        tif.pages[0].tags[262].overwrite(photometric)
    return path


def decoded(slide: dfx.Slide, n: int = 0) -> NDArray[Any]:
    return np.asarray(slide.level(n).compute(scheduler="sync"))


# JPEG


def markers(stream: bytes) -> dict[int, tuple[int, int]]:
    """Where the segments before the scan start (at FF) and stop."""
    found, at = {}, 2
    while at < len(stream) and stream[at + 1] not in found:
        stop = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        found.setdefault(stream[at + 1], (at, stop))
        if stream[at + 1] == 0xDA:
            break
        at = stop
    return found


def without_statements(stream: bytes, ids: bytes) -> bytes:
    """A JPEG stream without APP segments, whose components have other identifiers."""
    out, at = bytearray(stream[:2]), 2
    while True:
        code, stop = stream[at + 1], at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        segment = bytearray(stream[at:stop])
        if code in (0xC0, 0xDA):
            first, step = (10, 3) if code == 0xC0 else (5, 2)
            for n, identifier in enumerate(ids):
                segment[first + step * n] = identifier
        if code not in (0xE0, 0xEE):
            out += segment
        at = stop
        if code == 0xDA:
            return bytes(out) + stream[at:]


def adobe(transform: int) -> bytes:
    return b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform])


def jpeg(tile: Picture, kind: str) -> bytes:
    """A tile as JPEG, by what its stream says of its colours."""
    if kind == "grey":
        return bytes(imagecodecs.jpeg8_encode(tile[..., 0].copy(), level=98))
    ycc = imagecodecs.jpeg8_encode(tile, level=98, outcolorspace="YCBCR", subsampling="444")
    small = imagecodecs.jpeg8_encode(tile, level=98, outcolorspace="YCBCR", subsampling="420")
    rgb = imagecodecs.jpeg8_encode(tile, level=98, outcolorspace="RGB")
    plain = without_statements(ycc, b"\1\2\3")
    return {
        "JFIF": bytes(ycc),
        "JFIF 4:2:0": bytes(small),
        "Adobe YCbCr": plain[:2] + adobe(1) + plain[2:],
        "Adobe RGB": bytes(rgb),
        "Adobe RGB, ids 1 2 3": b"\xff\xd8" + adobe(0) + without_statements(rgb, b"\1\2\3")[2:],
        "ids RGB": without_statements(rgb, b"RGB"),
        "4:2:0": without_statements(small, b"\0\1\2"),
        "bare YCbCr": plain,
        "bare RGB": without_statements(rgb, b"\0\1\2"),
        "JFIF and Adobe RGB": bytes(ycc[:20]) + adobe(0) + bytes(ycc[20:]),
        "Adobe YCCK": plain[:2] + adobe(2) + plain[2:],
    }[kind]


STATED = ["JFIF", "JFIF 4:2:0", "Adobe YCbCr", "Adobe RGB", "Adobe RGB, ids 1 2 3", "ids RGB", "4:2:0"]


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize(("photometric", "bare"), [(2, "bare RGB"), (6, "bare YCbCr")])
def test_every_jpeg_tile_has_the_colours_that_its_own_stream_states(
    photometric: int, bare: str, byteorder: str, picture: Picture, tmp_path: Path
) -> None:
    tiles = [jpeg(tile, kind) for tile, kind in zip(cut(picture), [bare, *STATED], strict=True)]
    for missing in (None, 0):  # with the first tile and without
        stored = [b"" if n == missing else tile for n, tile in enumerate(tiles)]
        path = tmp_path / f"{missing}.tif"
        slide = dfx.open_slide(write(path, stored, picture.shape, photometric=photometric, byteorder=byteorder))
        want = picture.astype(int)
        if missing == 0:
            want[:SIDE, :SIDE] = 255
        whole = decoded(slide)
        assert np.abs(whole - want).max() <= 12
        grid = dfx.PatchGrid.over(slide, shape=SIDE, resolution=1, units="baseline", mask=None)
        patches = dfx.patches(slide, grid).compute(scheduler="sync")
        for patch, (x0, y0, x1, y1) in zip(patches, grid.coordinates.tolist(), strict=True):
            assert np.array_equal(patch, whole[y0:y1, x0:x1])
        grid = dfx.PatchGrid.over(slide, shape=SIDE // 2, resolution=0.5, units="baseline", mask=None)
        exact, fast = (
            dfx.patches(slide, grid, reading=reading).compute(scheduler="sync").astype(int)
            for reading in ("exact", "fast")
        )
        assert np.abs(exact - fast).max() <= 8


def test_a_jpeg_tile_without_colour_is_grey(picture: Picture, tmp_path: Path) -> None:
    tiles = [jpeg(tile, "grey" if n == 3 else "JFIF") for n, tile in enumerate(cut(picture))]
    slide = dfx.open_slide(write(tmp_path / "x.tif", tiles, picture.shape, photometric=6))
    got = decoded(slide)[:SIDE, 3 * SIDE :].astype(int)
    assert np.abs(got - picture[:SIDE, 3 * SIDE :, :1]).max() <= 4


@pytest.mark.parametrize("photometric", [2, 6])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("JFIF and Adobe RGB", "YCbCr by its JFIF segment, and RGB by its Adobe"),
        ("Adobe YCCK", "3 components and Adobe's .* 2"),
    ],
)
@pytest.mark.parametrize("reading", ["exact", "fast"])
def test_jpeg_streams_that_contradict_themselves_are_refused_and_never_filled(
    kind: str, reason: str, photometric: int, reading: Literal["exact", "fast"], picture: Picture, tmp_path: Path
) -> None:
    tiles = [jpeg(tile, kind if n == 5 else "JFIF") for n, tile in enumerate(cut(picture))]
    slide = dfx.open_slide(write(tmp_path / "x.tif", tiles, picture.shape, photometric=photometric))
    grid = dfx.PatchGrid.over(slide, shape=SIDE // 2, resolution=0.5, units="baseline", mask=None)
    with pytest.raises(SlideError, match=f"colours of tile 5 .*{reason}.*Export it again") as caught:
        dfx.patches(slide, grid, reading=reading).compute(scheduler="sync")
    assert not isinstance(caught.value, TileError)  # which `on_bad_tile="fill"` makes white
    assert np.abs(slide.region(0, (0, 0, SIDE, 4 * SIDE), rgb=True).astype(int) - picture[:SIDE]).max() <= 12


def test_a_jpeg_stream_of_four_components_is_no_rgb(picture: Picture, tmp_path: Path) -> None:
    cmyk = imagecodecs.jpeg8_encode(np.dstack([picture[:SIDE, :SIDE]] * 2)[..., :4].copy())
    path = write(tmp_path / "x.tif", [bytes(cmyk)] * 8, picture.shape, photometric=2)
    with pytest.raises(SlideError, match="4 components, its page 3"):
        decoded(dfx.open_slide(path))


@pytest.mark.parametrize("kind", ["bare RGB", "4:2:0"])
def test_shared_tables_are_used_and_state_no_colours(kind: str, picture: Picture, tmp_path: Path) -> None:
    streams = [jpeg(tile, kind) for tile in cut(picture)]
    segments = [tables for code in (0xDB, 0xC4) for tables in _all(streams[0], code)]
    shared = b"\xff\xd8" + adobe(1 if kind == "bare RGB" else 0) + b"".join(segments) + b"\xff\xd9"
    tiles = []
    for stream in streams:
        for segment in segments:
            assert segment in stream
            stream = stream.replace(segment, b"", 1)
        tiles.append(stream)
    extra = [(347, 7, len(shared), shared, True)]
    slide = dfx.open_slide(write(tmp_path / "x.tif", tiles, picture.shape, photometric=2, extratags=extra))
    assert np.abs(decoded(slide).astype(int) - picture).max() <= 12
    grid = dfx.PatchGrid.over(slide, shape=SIDE // 2, resolution=0.5, units="baseline", mask=None)
    half = picture.reshape(SIDE, 2, 2 * SIDE, 2, 3).mean((1, 3))
    for patch, (x0, y0, x1, y1) in zip(
        dfx.patches(slide, grid, reading="fast").compute(scheduler="sync"), grid.coordinates.tolist(), strict=True
    ):
        assert np.abs(patch - half[y0:y1, x0:x1]).max() <= 12


def _all(stream: bytes, wanted: int) -> list[bytes]:
    found, at = [], 2
    while stream[at + 1] != 0xDA:
        stop = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        if stream[at + 1] == wanted:
            found.append(stream[at:stop])
        at = stop
    return found


# YCbCr in planes


def planes(picture: Picture) -> list[Picture]:
    """Y, Cb and Cr."""
    red, green, blue = np.moveaxis(picture.astype(float), 2, 0)
    y = 0.299 * red + 0.587 * green + 0.114 * blue
    return [np.rint(p).astype(np.uint8) for p in (y, (blue - y) / 1.772 + 128, (red - y) / 1.402 + 128)]


def planar(path: Path, picture: Picture, codec: Literal["jpeg", "jpeg2000"] = "jpeg", **options: Any) -> Path:
    def encode(tile: Picture) -> bytes:
        if codec == "jpeg":
            return bytes(imagecodecs.jpeg8_encode(tile, level=98))
        return bytes(imagecodecs.jpeg2k_encode(tile, codecformat="j2k", reversible=True))

    tiles = [encode(tile) for plane in planes(picture) for tile in cut(plane)]
    if options.pop("small", False):
        tiles[8:] = [encode(tile[::2, ::2].copy()) for plane in planes(picture)[1:] for tile in cut(plane)]
    number = 7 if codec == "jpeg" else 34712
    shape = 3, *picture.shape[:2]
    return write(path, tiles, shape, photometric=6, compression=number, planarconfig="separate", **options)


@pytest.mark.parametrize("codec", ["jpeg", "jpeg2000"])
@pytest.mark.parametrize(
    "tags", [[], [(530, 3, 2, (1, 1), True)], [(529, 5, 3, (299, 1000, 587, 1000, 114, 1000), True)]]
)
def test_planes_of_ycbcr_become_rgb(codec: Any, tags: Any, picture: Picture, tmp_path: Path) -> None:
    slide = dfx.open_slide(planar(tmp_path / "x.tif", picture, codec, extratags=tags))
    assert slide.levels[0].colour == "rgb"
    assert np.abs(decoded(slide).astype(int) - picture).max() <= 8


def test_planes_of_ycbcr_that_dfx_can_not_convert_are_refused(picture: Picture, tmp_path: Path) -> None:
    with pytest.raises(SlideError, match=r"planes have 64 x 64, 32 x 32, 32 x 32 pixels.*Export it again"):
        decoded(dfx.open_slide(planar(tmp_path / "small.tif", picture, small=True)))
    narrow = (16, 1, 235, 1, 128, 1, 240, 1, 128, 1, 240, 1)
    for code, values, name in (
        (529, (2126, 10000, 7152, 10000, 722, 10000), "YCbCrCoefficients are 0.2126"),
        (532, narrow, "ReferenceBlackWhite are 16, 235"),
    ):
        with pytest.raises(SlideError, match=f"{name}.* not the usual .*export it as RGB"):
            dfx.open_slide(
                planar(tmp_path / f"{code}.tif", picture, extratags=[(code, 5, len(values) // 2, values, True)])
            )


# JPEG 2000


def jpeg2000(tile: Picture, *, transform: bool, container: int | None = None) -> bytes:
    """A tile as JPEG 2000, in a JP2 container with an enumerated colour space where that is given."""
    stream = bytes(
        imagecodecs.jpeg2k_encode(
            tile, codecformat="j2k" if container is None else "jp2", reversible=True, mct=transform
        )
    )
    at = stream.find(b"colr")
    return stream if container is None else stream[: at + 7] + container.to_bytes(4, "big") + stream[at + 11 :]


APERIO = "Aperio Image Library\r\n256x128 JPEG2000|AppMag = 20|MPP = 0.5"
HURON = [(271, 2, 6, "Huron\0", True)]
JP2_CASES = [  # transform, container, compression, vendor, tag, what the samples are (None: refused)
    (True, None, 33003, "", 2, "rgb"),  # Bio-Formats
    (True, None, 33003, "", 6, "rgb"),
    (True, None, 33005, "aperio", 2, "rgb"),
    (True, None, 34712, "", 6, "rgb"),
    (True, 16, 33004, "", 2, "rgb"),
    (False, None, 33003, "aperio", 2, "ycbcr"),
    (False, None, 33003, "aperio", 6, "ycbcr"),
    (False, None, 33003, "huron", 2, "ycbcr"),
    (False, None, 33003, "", 6, "ycbcr"),
    (False, None, 33005, "aperio", 2, "rgb"),
    (False, None, 33005, "", 6, "ycbcr"),
    (False, None, 34712, "", 2, "rgb"),
    (False, None, 33004, "", 2, "rgb"),
    (False, 18, 34712, "", 2, "ycbcr"),
    (False, 18, 33003, "", 6, "ycbcr"),
    (False, 16, 33003, "", 2, "rgb"),
    (False, 16, 34712, "", 2, "rgb"),
    (False, None, 33003, "", 2, None),
    (True, None, 33003, "aperio", 2, None),
    (False, 16, 33003, "aperio", 2, None),
    (False, 16, 34712, "", 6, None),
    (False, 12, 34712, "", 2, None),
]


@pytest.mark.parametrize(("transform", "container", "compression", "vendor", "photometric", "samples"), JP2_CASES)
def test_jpeg_2000_has_the_colours_that_stream_tag_and_vendor_say_together(
    transform: bool,
    container: int | None,
    compression: int,
    vendor: str,
    photometric: int,
    samples: str | None,
    picture: Picture,
    tmp_path: Path,
) -> None:
    stored = np.stack(planes(picture), axis=2) if samples == "ycbcr" else picture
    tiles = [jpeg2000(tile, transform=transform, container=container) for tile in cut(stored)]
    options: dict[str, Any] = {"description": APERIO} if vendor == "aperio" else {}
    options |= {"extratags": HURON} if vendor == "huron" else {}
    slide = dfx.open_slide(
        write(tmp_path / "x.tif", tiles, picture.shape, photometric=photometric, compression=compression, **options)
    )
    if samples:
        assert np.abs(decoded(slide).astype(int) - picture).max() <= 3
        return
    with pytest.raises(SlideError, match=r"colours of tile 0 .* are not known: .*Export it again") as caught:
        decoded(slide)
    assert not isinstance(caught.value, TileError)


def test_jpeg_2000_tiles_of_one_page_may_differ(picture: Picture, tmp_path: Path) -> None:
    ycbcr = cut(np.stack(planes(picture), axis=2))
    tiles = [
        jpeg2000(rgb, transform=True) if n % 2 else jpeg2000(ycc, transform=False, container=18)
        for n, (rgb, ycc) in enumerate(zip(cut(picture), ycbcr, strict=True))
    ]
    slide = dfx.open_slide(write(tmp_path / "x.tif", tiles, picture.shape, photometric=2, compression=33003))
    assert np.abs(decoded(slide).astype(int) - picture).max() <= 3


@pytest.mark.parametrize(("enumerated", "refused"), [(None, False), (16, True), (18, False)])
def test_subsampled_jpeg_2000_is_left_to_the_decoder_which_converts_it(enumerated: int | None, refused: bool) -> None:
    layout = Layout(SIDE, SIDE, 3, np.dtype(np.uint8), True)
    header = Jpeg2000Header(3, True, False, enumerated)
    for compression, aperio in ((33003, True), (34712, False)):
        tiles = Jpeg2000Tiles(layout, compression, 2, aperio)
        if refused:
            with pytest.raises(ColourConflict, match="sRGB, and its components are subsampled"):
                tiles.is_ycbcr(header)
        else:
            assert not tiles.is_ycbcr(header)


def test_a_jpeg_2000_header_says_what_it_was_written_with(picture: Picture) -> None:
    tile = cut(picture)[0]
    assert jpeg2000_header(jpeg2000(tile, transform=True)) == Jpeg2000Header(3, False, True, None)
    assert jpeg2000_header(jpeg2000(tile, transform=False, container=18)) == Jpeg2000Header(3, False, False, 18)
    stream = bytearray(jpeg2000(tile, transform=False))
    stream[stream.find(b"\xff\x51") + 44] = 2  # XRsiz of the second component
    assert jpeg2000_header(bytes(stream)).subsampled


def test_sixteen_bits_are_never_converted_and_never_cut_to_eight(picture: Picture, tmp_path: Path) -> None:
    deep = picture.astype(np.uint16) * 200
    tiles = [bytes(imagecodecs.jpeg2k_encode(t, codecformat="j2k", reversible=True, mct=False)) for t in cut(deep)]
    options: dict[str, Any] = {"photometric": 2, "compression": 33003, "description": APERIO}
    slide = dfx.open_slide(write(tmp_path / "deep.tif", tiles, picture.shape, dtype=np.uint16, **options))
    assert np.array_equal(decoded(slide), deep)
    with pytest.raises(SlideError, match="not 8-bit grey, RGB or RGBA"):
        slide.thumbnail()
    options |= {"compression": 34712}
    with pytest.raises(TileError, match=r"tile 0 .* samples of uint16, not of uint8"):
        decoded(dfx.open_slide(write(tmp_path / "lie.tif", tiles, picture.shape, **options)))


# Palettes and others


def palette(path: Path, indices: NDArray[Any], table: NDArray[np.uint16], bits: int) -> Path:
    extra = [(320, 3, table.size, tuple(table.ravel().tolist()), True)]
    tifffile.imwrite(
        path, indices, tile=(SIDE, SIDE), photometric="minisblack", bitspersample=bits, metadata=None, extratags=extra
    )
    with tifffile.TiffFile(path, mode="r+") as tif:
        tif.pages[0].tags[262].overwrite(3)
    return path


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes_of_eight_and_of_sixteen_bits_give_the_same_colours(bits: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(bits)
    table = rng.integers(0, 256, (3, 2**bits)).astype(np.uint16)
    table[1, -1] = 255  # largest of 8 bits
    indices = rng.integers(0, 2**bits, (2 * SIDE, SIDE)).astype(np.uint8)
    for name, stored in (("8", table), ("16", table * 257)):
        slide = dfx.open_slide(
            palette(tmp_path / f"{name}.tif", indices.astype(bool) if bits == 1 else indices, stored, bits)
        )
        assert slide.levels[0].colour == "rgb"
        assert np.array_equal(decoded(slide), table.astype(np.uint8).T[indices])


def test_an_index_beyond_the_palette_is_an_error(tmp_path: Path) -> None:
    indices = np.full((SIDE, SIDE), 7, np.uint8)
    with pytest.raises(SlideError, match=r"colour 7, but its palette has 4 colours|colormap|ColorMap"):
        decoded(dfx.open_slide(palette(tmp_path / "x.tif", indices, np.full((3, 4), 9, np.uint16), 8)))


def test_samples_beyond_alpha_are_no_picture(tmp_path: Path) -> None:
    image = np.zeros((SIDE, SIDE, 5), np.uint8)
    tifffile.imwrite(tmp_path / "x.tif", image, tile=(SIDE, SIDE), photometric="rgb", extrasamples=[2, 0])
    slide = dfx.open_slide(tmp_path / "x.tif")
    assert decoded(slide).shape == image.shape
    with pytest.raises(SlideError, match="not 8-bit grey, RGB or RGBA"):
        slide.thumbnail()


# Where a stream ends


CODECS = ["jpeg", "jpeg progressive", "jpeg2000", "jpegxr", "zstd", "zlib", "webp", "jpegxl", "lzw"]


def encoded(tile: Picture, codec: str) -> tuple[int, bytes]:
    """A tile's compression tag and bytes."""
    if codec == "jpeg progressive":
        import io

        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(tile).save(file, "JPEG", quality=95, progressive=True)
        return 7, file.getvalue()
    number, encode = {
        "jpeg": (7, lambda t: imagecodecs.jpeg8_encode(t, level=95)),
        "jpeg2000": (34712, lambda t: imagecodecs.jpeg2k_encode(t, codecformat="j2k", level=0)),
        "jpegxr": (34934, lambda t: imagecodecs.jpegxr_encode(t)),
        "zstd": (50000, lambda t: imagecodecs.zstd_encode(t.tobytes())),
        "zlib": (8, lambda t: imagecodecs.zlib_encode(t.tobytes())),
        "webp": (50001, lambda t: imagecodecs.webp_encode(t, lossless=True)),
        "jpegxl": (50002, lambda t: imagecodecs.jpegxl_encode(t, lossless=True)),
        "lzw": (5, lambda t: imagecodecs.lzw_encode(t.tobytes())),
    }[codec]
    return number, bytes(encode(tile))


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_behind_the_end_of_a_tile_are_no_damage(codec: str, picture: Picture, tmp_path: Path) -> None:
    junk = np.random.default_rng(0).bytes(1000)
    for n, behind in enumerate([b"\xff" * 3, bytes(5), junk, b"\xff\xd8" + junk, b"\xff" + bytes(300) + b"\xff\xd9\0"]):
        number, tiles = 0, []
        for tile in cut(picture):
            number, data = encoded(tile, codec)
            tiles.append(data + behind)
        slide = dfx.open_slide(write(tmp_path / f"{n}.tif", tiles, picture.shape, photometric=2, compression=number))
        assert np.abs(decoded(slide).astype(int) - picture).max() <= 20


@pytest.mark.parametrize("codec", ["jpeg", "jpeg progressive", "jpeg2000", "jpegxr", "zstd"])
@pytest.mark.parametrize(
    "behind", [b"", b"\xff" * 9, bytes(40), b"\x12\x34\xff" * 20], ids=["", "fill", "zeros", "junk"]
)
def test_a_stream_that_was_cut_is_noticed_whatever_is_behind_it(codec: str, behind: bytes, tmp_path: Path) -> None:
    tile = paint(SIDE * 4, SIDE * 4, 3)[SIDE : 2 * SIDE, SIDE : 2 * SIDE].copy()
    number, whole = encoded(tile, codec)
    if codec.startswith("jpeg") and number == 7:  # a thumbnail, with an end mark of its own
        thumbnail = b"Exif\0\0" + bytes(imagecodecs.jpeg8_encode(tile[::8, ::8].copy()))
        whole = whole[:2] + b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail + whole[2:]
    for kept in (len(whole) * 2 // 3, len(whole) * 9 // 10, len(whole) - 2 if number in (7, 34712) else len(whole) - 9):
        data = whole[:kept] + behind
        slide = dfx.open_slide(
            write(tmp_path / f"{kept}.tif", [data], (SIDE, SIDE, 3), photometric=2, compression=number)
        )
        if number == 34934 and len(data) >= len(whole):
            continue  # its length is all that a container says
        with pytest.raises(TileError, match="tile 0"):
            decoded(slide)
        if number == 7:
            grid = dfx.PatchGrid.over(slide, shape=SIDE // 2, resolution=0.5, units="baseline", mask=None)
            with pytest.raises(TileError, match="tile 0"):
                dfx.patches(slide, grid, reading="fast").compute(scheduler="sync")


def test_a_stream_followed_by_another_inside_one_tile_is_cut(tmp_path: Path, picture: Picture) -> None:
    first, second = (jpeg(tile, "JFIF") for tile in cut(picture)[:2])
    data = first[: len(first) // 2] + second + b"\0junk"
    slide = dfx.open_slide(write(tmp_path / "x.tif", [data] * 8, picture.shape, photometric=6))
    with pytest.raises(TileError, match="cut short"):
        decoded(slide)
