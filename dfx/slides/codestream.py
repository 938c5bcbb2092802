"""JPEG and JPEG 2000 codestreams: their headers, and whether they are whole. Pure functions of bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

Statement: TypeAlias = Literal["rgb", "ycbcr"]

END = b"\xff\xd9"
"""The end mark of both: JPEG's EOI, JPEG 2000's EOC."""
_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
"""A JPEG marker other than restart marks; FF 00 is a stuffed byte of the picture, and FF may be repeated before a
marker."""
_SOI, _EOI, _SOS, _APP0, _APP14, _TEM = 0xD8, 0xD9, 0xDA, 0xE0, 0xEE, 0x01
FRAMES = {code for code in range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""The JPEG markers of a frame's header."""
_TABLES = {0xC4, 0xCC, 0xDB, 0xDD}
_SOD, _SOT, _SIZ, _COD = 0x93, 0x90, 0x51, 0x52


class ColourConflict(Exception):
    """Statements about a tile's colours that contradict each other, or that dfx can't follow."""


def ends_with_mark(data: bytes) -> bool:
    """Whether data ends with an end mark, or with zeros and fill bytes FF after it. True for nearly all tiles."""
    return data.endswith(END) or data.rstrip(b"\0\xff").endswith(END)


# JPEG (ITU-T T.81, T.871)


@dataclass(frozen=True)
class JpegHeader:
    """The header of a JPEG stream, from its first byte to its first scan."""

    shape_yx: tuple[int, int]
    """Rows and columns of pixels."""
    bits: int
    """Bits per sample."""
    ids: bytes
    """The identifiers of the components."""
    subsampled: bool
    """Whether some components have fewer samples than others."""
    jfif: bool
    """Whether a JFIF segment (APP0) is there: three components are YCbCr."""
    adobe: int | None
    """The colour transform of Adobe's segment (APP14): 0 none, 1 YCbCr, 2 YCCK."""
    raw: bytes
    """The header's bytes."""

    @property
    def stated(self) -> Statement | None:
        """Colours of three components as the stream itself states them; None if it states nothing.

        Markers decide, as in libjpeg, Java's Image I/O and Pillow. Without markers, the identifiers "RGB" decide, then
        subsampling: only the colour differences of YCbCr are subsampled.
        """
        if self.jfif and self.adobe == 0:
            raise ColourConflict("its JPEG stream is YCbCr by its JFIF segment, and RGB by its Adobe segment")
        if self.adobe not in (None, 0, 1):
            raise ColourConflict(f"its JPEG stream has 3 components and Adobe's colour transform {self.adobe}")
        if self.jfif or self.adobe == 1:
            return "ycbcr"
        if self.adobe == 0 or self.ids == b"RGB":
            return "rgb"
        return "ycbcr" if self.subsampled else None


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield each segment before the first scan: its marker, and where its content starts and stops."""
    at = 2
    while match := _MARKER.search(data, at):
        code, start = match[1][0], match.end()
        if code in (_SOI, _EOI):
            return
        stop = start if code == _TEM else start + int.from_bytes(data[start : start + 2], "big")
        yield code, start + 2, stop
        if code == _SOS:
            return
        at = stop


def jpeg_header(data: bytes) -> JpegHeader:
    """Parse the header of a JPEG stream. Raises `ValueError` where it has no frame."""
    jfif, adobe, frame, end = False, None, b"", 0
    for code, start, stop in jpeg_segments(data):
        content = data[start:stop]
        if code == _APP0 and content.startswith(b"JFIF\0"):
            jfif = True
        elif code == _APP14 and content.startswith(b"Adobe") and len(content) >= 12:
            adobe = content[11]
        elif code in FRAMES:
            frame = content
        elif code == _SOS:
            end = stop
    if data[:2] != b"\xff\xd8" or len(frame) < 6 or len(frame) < 6 + 3 * frame[5] or not end:
        raise ValueError("it has no JPEG header")
    shape = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    ids, sampling = frame[6 : 6 + 3 * frame[5] : 3], frame[7 : 6 + 3 * frame[5] : 3]
    return JpegHeader(shape, frame[0], ids, len(set(sampling)) > 1, jfif, adobe, data[:end])


def jpeg_tables(data: bytes) -> bytes:
    """Return the quantisation, Huffman and restart tables of an abbreviated stream, without the other segments."""
    return b"".join(data[start - 4 : stop] for code, start, stop in jpeg_segments(data) if code in _TABLES)


def is_whole_jpeg(data: bytes) -> bool:
    """Whether a JPEG stream reaches its end mark; bytes after the mark are not part of the stream.

    If the data does not end with an end mark, the markers are followed. Segments are skipped by their length, so that
    marks inside a thumbnail don't count; the picture's own data has only stuffed bytes and restart marks.
    """
    if ends_with_mark(data):
        return True
    at = 2
    while match := _MARKER.search(data, at):
        code, at = match[1][0], match.end()
        if code in (_SOI, _EOI):
            return code == _EOI  # another stream begins inside this one: it was cut
        if code != _TEM:
            at += int.from_bytes(data[at : at + 2], "big")
    return False


# JPEG 2000 (ITU-T T.800)


@dataclass(frozen=True)
class Jpeg2000Header:
    """The main header of a JPEG 2000 codestream, and the colours that a JP2 container around it states."""

    components: int
    """How many components there are."""
    subsampled: bool
    """Whether some components have fewer samples than others."""
    transformed: bool
    """Whether a multiple component transform was applied: decoding reverses it, which gives RGB."""
    enumerated: int | None
    """The container's enumerated colour space: 16 sRGB, 17 grey, 18 sYCC; None if it states no number."""


def _boxes(data: bytes, at: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the boxes of a JP2 file: type, and where the content starts and stops."""
    while at + 8 <= stop:
        size, kind, start = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], at + 8
        if size == 1:
            size, start = int.from_bytes(data[at + 8 : at + 16], "big"), at + 16
        end = stop if size == 0 else min(at + size, stop)
        yield kind, start, end
        if end < start:
            return
        at = end


def _codestream(data: bytes) -> tuple[int, int | None]:
    """Return where the codestream starts, and the container's enumerated colour space."""
    if data.startswith(b"\xff\x4f"):
        return 0, None
    enumerated = None
    for kind, start, stop in _boxes(data, 0, len(data)):
        if kind == b"jp2h":
            for inner, begin, _ in _boxes(data, start, stop):
                if inner == b"colr" and data[begin : begin + 1] == b"\1" and enumerated is None:
                    enumerated = int.from_bytes(data[begin + 3 : begin + 7], "big")
        elif kind == b"jp2c":
            return start, enumerated
    raise ValueError("it has no JPEG 2000 codestream")


def _header_segments(data: bytes, at: int) -> Iterator[tuple[int, int, int]]:
    """Yield the segments of a main or tile-part header: marker, and where the content starts and stops."""
    while at + 4 <= len(data) and data[at] == 0xFF:
        code, stop = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield code, at + 4, stop
        if code == _SOD:
            return
        at = stop


def jpeg2000_header(data: bytes) -> Jpeg2000Header:
    """Parse the main header of a codestream or a JP2 file; raises `ValueError` for other data."""
    at, enumerated = _codestream(data)
    segments: dict[int, bytes] = {}
    for code, start, stop in _header_segments(data, at + 2):
        if code in (_SOT, _SOD):
            break
        segments.setdefault(code, data[start:stop])
    siz, cod = segments.get(_SIZ, b""), segments.get(_COD, b"")
    components = int.from_bytes(siz[34:36], "big")
    if len(siz) < 36 + 3 * components or len(cod) < 5 or not components:
        raise ValueError("it has no JPEG 2000 header")
    steps = {siz[37 + 3 * n : 39 + 3 * n] for n in range(components)}
    return Jpeg2000Header(components, len(steps) > 1, cod[4] == 1, enumerated)


def is_whole_jpeg2000(data: bytes) -> bool:
    """Whether a JPEG 2000 codestream reaches its end mark; bytes after the mark are not part of the codestream.

    If the data does not end with an end mark, tile-parts are followed by their length. The last tile-part may leave its
    length open; its packets contain no end mark.
    """
    if ends_with_mark(data):
        return True
    try:
        at = _codestream(data)[0] + 2
    except ValueError:
        return False
    for code, start, _ in _header_segments(data, at):
        if code == _SOT:
            at = start - 4
            break
    while data[at : at + 2] == b"\xff\x90":
        length = int.from_bytes(data[at + 6 : at + 10], "big")
        if length == 0:
            body = next((start for code, start, _ in _header_segments(data, at) if code == _SOD), len(data))
            return data.find(END, body - 2) >= 0
        at += length
    return data[at : at + 2] == END


# JPEG XR (ITU-T T.832, annex A)


def is_whole_jpegxr(data: bytes) -> bool:
    """Whether a JPEG XR container is as long as its ImageOffset and ImageByteCount say."""
    start = int.from_bytes(data[4:8], "little")
    entries = (data[at : at + 12] for at in range(start + 2, start + 2 + 12 * data[start], 12))
    tags = {int.from_bytes(e[:2], "little"): int.from_bytes(e[8:12], "little") for e in entries}
    return 0xBCC0 in tags and 0xBCC1 in tags and tags[0xBCC0] + tags[0xBCC1] <= len(data)


# Zstandard (RFC 8878)


def zstd_frames(data: bytes) -> bytes:
    """Return the frames at the start of data, without the bytes after them, which the decoder would refuse."""
    end = at = 0
    while data[at : at + 4] == b"\x28\xb5\x2f\xfd" and at + 4 < len(data):
        descriptor = data[at + 4]
        single = descriptor >> 5 & 1
        content_size = (single, 2, 4, 8)[descriptor >> 6]
        at += 5 + (not single) + (0, 1, 2, 4)[descriptor & 3] + content_size
        last = False
        while not last and at + 3 <= len(data):
            block = int.from_bytes(data[at : at + 3], "little")
            last, kind, size = bool(block & 1), block >> 1 & 3, block >> 3
            at += 3 + (1 if kind == 1 else size)  # a run-length block has one byte
        at += 4 * (descriptor >> 2 & 1)
        if not last or at > len(data):
            break
        end = at
    return data[:end] if end else data
