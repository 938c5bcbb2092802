"""Small NDPI files, written by the format's own rules: 64-bit pointers, and one JPEG per level."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
UNITS = {"444": (8, 8), "422": (8, 16), "420": (16, 16)}


@dataclass
class Jpeg:
    """A JPEG with restart markers, and where each run between them begins."""

    data: bytes
    starts: list[int]
    size_at: int

    def says(self, rows: int, columns: int) -> Jpeg:
        """Give the same JPEG with another size in its header."""
        data = bytearray(self.data)
        struct.pack_into(">HH", data, self.size_at, rows, columns)
        return Jpeg(bytes(data), self.starts, self.size_at)


def jpeg(picture: Picture, run_yx: tuple[int, int] | None, subsampling: str = "444") -> Jpeg:
    """Encode a picture in runs of a size (None: in one, without restart markers), of any width.

    Each run is encoded alone and joined to the others, which restart markers allow.
    """
    rows, columns = picture.shape[:2]
    run = run_yx or (rows, columns)
    unit = UNITS[subsampling]
    padded = np.pad(picture, ((0, -rows % unit[0]), (0, -columns % unit[1]), (0, 0)), mode="edge")
    rows_padded, columns_padded = padded.shape[:2]
    parts, header, size_at = [], b"", 0
    for y in range(0, rows_padded, run[0]):
        for x in range(0, columns_padded, run[1]):
            one = np.ascontiguousarray(padded[y : y + run[0], x : x + run[1]])
            data = imagecodecs.jpeg8_encode(one, level=95, subsampling=subsampling)
            scan = data.index(b"\xff\xda")
            end = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
            if not header:
                units = (one.shape[0] // unit[0]) * (one.shape[1] // unit[1])
                interval = b"\xff\xdd\x00\x04" + struct.pack(">H", units) if run_yx else b""
                size_at = data.index(b"\xff\xc0") + 5
                header = data[:size_at] + struct.pack(">HH", rows % 65536, columns % 65536) + data[size_at + 4 : scan]
                header += interval + data[scan:end]
            parts.append(data[end:-2])
    out, starts = bytearray(header), []
    for n, part in enumerate(parts):
        starts.append(len(out))
        out += part + (b"\xff\xd9" if n == len(parts) - 1 else bytes((0xFF, 0xD0 + n % 8)))
    return Jpeg(bytes(out), starts, size_at)


@dataclass
class Page:
    """An image of an NDPI file."""

    jpeg: Jpeg
    size_yx: tuple[int, int]
    lens: float
    z: int | None = 0
    starts: Sequence[int] | None = None
    high: Sequence[int] | None = None


def page(
    picture: Picture, lens: float, z: int | None = 0, run_yx: tuple[int, int] | None = (8, 64), subsampling: str = "444"
) -> Page:
    """Make an image with the list of its restart markers, where it has any."""
    made = jpeg(picture, run_yx, subsampling)
    rows, columns = picture.shape[:2]
    return Page(made, (rows, columns), lens, z, made.starts if run_yx else None)


def write_ndpi(path: Path, pages: Sequence[Page], *, at: int = 12, loop: bool = False) -> Path:
    """Write a file whose data begin at a byte, and whose pixels at a lens of 20 have 0.5 microns."""
    with path.open("wb") as out:
        out.seek(at)
        links = [4]
        for one in pages:
            strip = out.tell()
            out.write(one.jpeg.data)
            rows, columns = one.size_yx
            per_cm = round(20_000 * abs(one.lens) / 20)
            entries: list[tuple[int, int, int, bytes]] = [
                (256, 4, 1, struct.pack("<Q", columns)),
                (257, 4, 1, struct.pack("<Q", rows)),
                (258, 3, 3, struct.pack("<3H", 8, 8, 8)),
                (259, 3, 1, struct.pack("<H", 7)),
                (262, 3, 1, struct.pack("<H", 6)),
                (271, 2, 10, b"Hamamatsu\0"),
                (273, 4, 1, struct.pack("<Q", strip)),
                (277, 3, 1, struct.pack("<H", 3)),
                (278, 4, 1, struct.pack("<Q", rows)),
                (279, 4, 1, struct.pack("<Q", len(one.jpeg.data))),
                (282, 5, 1, struct.pack("<II", per_cm, 1)),
                (283, 5, 1, struct.pack("<II", per_cm, 1)),
                (296, 3, 1, struct.pack("<H", 3)),
                (65420, 4, 1, struct.pack("<Q", 1)),
                (65421, 11, 1, struct.pack("<f", one.lens)),
            ]
            if one.z is not None:
                entries.append((65424, 9, 1, struct.pack("<i", one.z)))
            for tag, values in ((65426, one.starts), (65432, one.high)):
                if values is not None:
                    entries.append((tag, 4, len(values), struct.pack(f"<{len(values)}I", *values)))
            fields = []
            for tag, kind, count, value in entries:
                long = kind == 4 and count == 1
                if len(value) > 4 and not long:
                    out.seek(out.tell() + out.tell() % 2)
                    where = struct.pack("<Q", out.tell())
                    out.write(value)
                    value = where
                fields.append((struct.pack("<HHI", tag, kind, count), value.ljust(8, b"\0")))
            out.seek(out.tell() + out.tell() % 2)
            directory = out.tell()
            out.write(struct.pack("<H", len(fields)) + b"".join(head + value[:4] for head, value in fields))
            links.append(out.tell())
            out.write(bytes(8) + b"".join(value[4:] for _, value in fields))
            end = out.tell()
            out.seek(links[-2])
            out.write(struct.pack("<Q", directory))
            out.seek(end)
        if loop:
            out.seek(links[-1])
            out.write(struct.pack("<Q", directory))
        out.seek(0)
        out.write(b"II*\0")
    return path
