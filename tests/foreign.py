"""Small slides in formats that are no TIFF, written by their own rules: MIRAX, DICOM, Hamamatsu VMS and CZI."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Collection
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

Picture = NDArray[np.uint8]
TILE = 128


def halved(picture: Picture) -> Picture:
    rows, columns, _ = picture.shape
    return np.rint(picture.reshape(rows // 2, 2, columns // 2, 2, 3).mean((1, 3))).astype(np.uint8)


def tiles(picture: Picture) -> list[tuple[int, int, Picture]]:
    """Of TILE x TILE, padded, with their row and column."""
    rows, columns = (-(-size // TILE) for size in picture.shape[:2])
    padded = np.full((rows * TILE, columns * TILE, 3), 255, np.uint8)
    padded[: picture.shape[0], : picture.shape[1]] = picture
    return [
        (r, c, padded[r * TILE : (r + 1) * TILE, c * TILE : (c + 1) * TILE])
        for r in range(rows)
        for c in range(columns)
    ]


def write_mirax(path: Path, picture: Picture, *, missing: Collection[tuple[int, int]] = ()) -> Path:
    """Two levels of PNG tiles, a file each, 0.25 mpp, 40x; level 0 lacks those at `missing` (row, column)."""
    folder = path.with_suffix("")
    folder.mkdir()
    levels = [picture, halved(picture)]
    rows, columns = (size // TILE for size in picture.shape[:2])
    slide_id = "0123456789ABCDEF"
    pages = []
    for n, level in enumerate(levels):
        data, page, count = b"", b"", 0
        for r, c, tile in tiles(level):
            if n == 0 and (r, c) in missing:
                continue
            png = cv2.imencode(".png", tile[..., ::-1])[1].tobytes()
            page += struct.pack("<4i", (r * columns + c) * 2**n, len(data), len(png), n)
            data += png
            count += 1
        pages.append(struct.pack("<2i", count, 0) + page)
        (folder / f"Data{n:04}.dat").write_bytes(data)
    start = len(b"01.02" + slide_id.encode()) + 8
    lists = start + 4 * len(levels)
    index = b"01.02" + slide_id.encode() + struct.pack("<2i", start, start)
    at = [lists + 8 * len(levels) + sum(map(len, pages[:n])) for n in range(len(levels))]
    index += b"".join(struct.pack("<i", lists + 8 * n) for n in range(len(levels)))
    index += b"".join(struct.pack("<2i", 0, page) for page in at) + b"".join(pages)
    (folder / "Index.dat").write_bytes(index)
    sections = "".join(
        f"[LEVEL_{n}]\nOVERLAP_X = 0\nOVERLAP_Y = 0\nMICROMETER_PER_PIXEL_X = {0.25 * 2**n}\n"
        f"MICROMETER_PER_PIXEL_Y = {0.25 * 2**n}\nIMAGE_FORMAT = PNG\nIMAGE_FILL_COLOR_BGR = 16777215\n"
        f"DIGITIZER_WIDTH = {TILE}\nDIGITIZER_HEIGHT = {TILE}\nIMAGE_CONCAT_FACTOR = {min(n, 1)}\n"
        for n in range(len(levels))
    )
    names = "".join(f"HIER_0_VAL_{n}_SECTION = LEVEL_{n}\n" for n in range(len(levels)))
    (folder / "Slidedat.ini").write_text(
        f"[GENERAL]\nSLIDE_VERSION = 01.02\nSLIDE_ID = {slide_id}\nIMAGENUMBER_X = {columns}\nIMAGENUMBER_Y = {rows}\n"
        "OBJECTIVE_MAGNIFICATION = 40\n"
        f"[HIERARCHICAL]\nHIER_COUNT = 1\nNONHIER_COUNT = 0\nINDEXFILE = Index.dat\nHIER_0_NAME = Slide zoom level\n"
        f"HIER_0_COUNT = 2\n{names}"
        f"[DATAFILE]\nFILE_COUNT = 2\nFILE_0 = Data0000.dat\nFILE_1 = Data0001.dat\n{sections}",
        encoding="utf-8-sig",
    )
    path.write_bytes(cv2.imencode(".jpg", levels[-1])[1].tobytes())  # what viewers show
    return path


def write_dicom(folder: Path, picture: Picture) -> Path:
    """Two levels of raw tiles, a file each, 0.25 mpp, 40x; gives the first."""
    folder.mkdir(exist_ok=True)
    series, study, frame = (generate_uid(entropy_srcs=[str(n), str(picture.shape)]) for n in range(3))
    for n, level in enumerate([picture, halved(picture)]):
        stored = tiles(level)
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.6"  # VL Whole Slide Microscopy Image
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[series, str(n)])
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        d = Dataset()
        d.file_meta = meta
        d.ImageType = ["ORIGINAL" if n == 0 else "DERIVED", "PRIMARY", "VOLUME", "NONE" if n == 0 else "RESAMPLED"]
        d.SOPClassUID, d.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        d.SeriesInstanceUID, d.StudyInstanceUID, d.FrameOfReferenceUID = series, study, frame
        d.Modality, d.InstanceNumber = "SM", n + 1
        d.DimensionOrganizationType = "TILED_FULL"
        d.SamplesPerPixel, d.PhotometricInterpretation, d.PlanarConfiguration = 3, "RGB", 0
        d.NumberOfFrames, d.Rows, d.Columns = len(stored), TILE, TILE
        d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 8, 8, 7, 0
        d.TotalPixelMatrixRows, d.TotalPixelMatrixColumns = level.shape[:2]
        measures, shared, path = Dataset(), Dataset(), Dataset()
        measures.PixelSpacing = [0.00025 * 2**n] * 2
        shared.PixelMeasuresSequence = [measures]
        d.SharedFunctionalGroupsSequence = [shared]
        path.OpticalPathIdentifier, path.ObjectiveLensPower = "1", 40
        d.OpticalPathSequence = [path]
        d.PixelData = b"".join(tile.tobytes() for _, _, tile in stored)
        d["PixelData"].VR = "OB"
        d.save_as(folder / f"level{n}.dcm", enforce_file_format=True)
    return folder / "level0.dcm"


def write_vms(path: Path, picture: Picture) -> Path:
    """One JPEG with restart markers and a map, 0.25 mpp, 40x."""
    for name, image in (("image", picture), ("map", halved(picture))):
        Image.fromarray(image).save(
            path.parent / f"{path.stem}-{name}.jpg", quality=95, subsampling=0, restart_marker_blocks=TILE // 8
        )
    path.write_text(
        "[Virtual Microscope Specimen]\nNoLayers=1\nNoJpegColumns=1\nNoJpegRows=1\nSourceLens=40\n"
        f"ImageFile={path.stem}-image.jpg\nMapFile={path.stem}-map.jpg\n"
        f"PhysicalWidth={250 * picture.shape[1]}\nPhysicalHeight={250 * picture.shape[0]}\n"
    )
    return path


def write_czi(path: Path, picture: Picture, compression: str = "none") -> Path:
    """Two levels of subblocks in one file, 0.25 mpp, 40x; compressed by "none", "zstd0" or "zstd1"."""

    def segment(name: str, content: bytes) -> bytes:
        size = -(-len(content) // 32) * 32
        return struct.pack("<16sqq", name.encode(), size, len(content)) + content.ljust(size, b"\0")

    def encode(tile: Picture) -> bytes:
        raw = tile[..., ::-1].tobytes()
        if compression == "none":
            return raw
        return (b"\3\1\0" if compression == "zstd1" else b"") + bytes(imagecodecs.zstd_encode(raw))

    number = {"none": 0, "zstd0": 5, "zstd1": 6}[compression]
    height, width = picture.shape[:2]
    file, entries = bytearray(32 + 512), []
    for n, level in enumerate([picture, halved(picture)]):
        for r, c, tile in tiles(level):
            places = {"X": (c * TILE, width), "Y": (r * TILE, height), "C": (0, 1), "M": (len(entries), 1)}
            entry = struct.pack("<2siqiib5xi", b"DV", 3, len(file), 0, number, min(n, 1) * 2, len(places))  # BGR24
            for axis, (start, _) in places.items():
                size = TILE if axis in "XY" else 1
                scale = 2**n if axis in "XY" else 1
                entry += struct.pack("<4siifi", axis.encode(), start * scale, size * scale, 0, size)
            data = encode(tile)
            content = struct.pack("<iiq", 0, 0, len(data)) + entry
            file += segment("ZISRAWSUBBLOCK", content.ljust(256, b"\0") + data)
            entries.append(entry)
    places_in_file = []
    objective = "<Objective Id='Objective:1'><NominalMagnification>40</NominalMagnification></Objective>"
    distances = "".join(f"<Distance Id='{axis}'><Value>2.5e-07</Value></Distance>" for axis in "XY")
    xml = (
        f"<ImageDocument><Metadata><Information><Image><SizeX>{width}</SizeX><SizeY>{height}</SizeY>"
        "<ObjectiveSettings><ObjectiveRef Id='Objective:1'/></ObjectiveSettings></Image>"
        f"<Instrument><Objectives>{objective}</Objectives></Instrument></Information>"
        f"<Scaling><Items>{distances}</Items></Scaling></Metadata></ImageDocument>"
    ).encode()
    for name, content in (
        ("ZISRAWDIRECTORY", struct.pack("<i124x", len(entries)) + b"".join(entries)),
        ("ZISRAWMETADATA", struct.pack("<ii248x", len(xml), 0) + xml),
        ("ZISRAWATTDIR", struct.pack("<i252x", 0)),
    ):
        places_in_file.append(len(file))
        file += segment(name, content)
    directory, metadata, attachments = places_in_file
    name = uuid.uuid5(uuid.NAMESPACE_OID, f"{picture.shape}").bytes
    header = struct.pack("<iiii16s16siqqiq", 1, 0, 0, 0, name, name, 0, directory, metadata, 0, attachments)
    file[: 32 + 512] = segment("ZISRAWFILE", header.ljust(512, b"\0"))
    path.write_bytes(file)
    return path
