"""The identity of a slide's content as a short text: copies have the same, whatever their paths and time stamps."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfx.slides.level import Level, StoredTiles
from dfx.slides.source import PROBE, ByteSource, LocalFile

SAMPLE = 4096
"""Bytes of a sample."""
OF_LEVEL = 1
"""Samples of a level whose tiles are compressed: another picture has tiles of other sizes, which the tables show."""
OF_PIXELS = 128
"""Samples of all levels that are not compressed: their tables do not depend on the picture."""
OF_FILE = 16
"""Samples of a file whose tiles dfx does not know."""
OVERVIEW = 256 * 1024
"""The coarsest level is taken whole if it has at most this number of bytes: it shows every part of the slide."""
WHOLE = 64 * 2**20
"""A file is read whole for a checksum if it has at most this number of bytes."""


def identity(source: ByteSource, levels: Sequence[Level] = ()) -> str:
    """Name a file's content: "size-ends-inside", where `ends` and `inside` are digests (SHA-256, 128 bits).

    `ends` is the digest of the first and last 64 KiB. `inside` is the digest of the positions and sizes of all tiles,
    and of samples: one sample of each level whose tiles are compressed, 128 samples over the levels that are not
    compressed, and the whole coarsest level if it has at most 256 KiB. Without `levels` it is the digest of 16 samples.
    The samples of a remote file are fetched together, less than 1 MiB in all.

    A change that affects none of these bytes is not detected: other pixels in a few tiles, of the same number of bytes,
    that neither a sample nor the coarsest level shows. Therefore a store also keeps the time at which the file was
    written (for an object: its ETag) and its `checksum`. If the file was written again before a run resumes the store,
    the run compares the checksums, and warns if the store has no checksum.
    """
    ends = [(0, min(PROBE, source.size)), (max(0, source.size - PROBE), min(PROBE, source.size))]
    inside = hashlib.sha256()
    ranges: list[tuple[int, int]] = []
    parts = [[part for part in level.parts if isinstance(part, StoredTiles)] for level in levels]
    pixels = sum(int(part.counts.sum()) for n, found in enumerate(parts) for part in found if is_raw(levels[n]))
    for level, found in zip(levels, parts, strict=True):
        for part in found:
            for table in (part.offsets, part.counts):
                inside.update(table.astype("<i8").tobytes())
            share = max(OF_LEVEL, round(OF_PIXELS * part.counts.sum() / pixels)) if is_raw(level) else OF_LEVEL
            ranges += spread(part.offsets, part.counts, share, source.size)
    if not ranges:
        ranges = spread(np.zeros(1, np.int64), np.array([source.size]), OF_FILE, source.size)
    elif parts[-1]:
        start = min(int(part.offsets[part.counts > 0].min(initial=source.size)) for part in parts[-1])
        stop = max(int((part.offsets + part.counts)[part.counts > 0].max(initial=0)) for part in parts[-1])
        if 0 <= start < stop <= min(source.size, start + OVERVIEW):
            ranges.append((start, stop - start))
    digest = hashlib.sha256(b"".join(source.read(ends))).hexdigest()
    for data in source.sample(ranges):
        inside.update(data)
    return f"{source.size}-{digest[:32]}-{inside.hexdigest()[:32]}"


def checksum(source: ByteSource) -> str:
    """Give the SHA-256 of a whole local file of at most 64 MiB; "" for other files, which take too long to read."""
    if not isinstance(source, LocalFile) or source.size > WHOLE:
        return ""
    return hashlib.sha256(source.read([(0, source.size)])[0]).hexdigest()


def is_raw(level: Level) -> bool:
    """Whether a level's tiles are not compressed, so that all have the same size, whatever they show."""
    return level.codec == "none"


def spread(offsets: NDArray[Any], counts: NDArray[Any], n: int, size: int) -> list[tuple[int, int]]:
    """Give `n` (offset, count) of at most `SAMPLE` bytes, evenly spaced over the bytes of tiles inside the file."""
    there = (counts > 0) & (offsets >= 0) & (offsets + counts <= size)
    offsets, counts = offsets[there], counts[there]
    if not counts.size:
        return []
    stops = np.cumsum(counts)
    at = stops[-1] * (2 * np.arange(n) + 1) // (2 * n)
    tile = np.searchsorted(stops, at, side="right")
    length = np.minimum(SAMPLE, counts[tile])
    start = offsets[tile] + np.minimum(at - (stops - counts)[tile], counts[tile] - length)
    return list(zip(start.tolist(), length.tolist(), strict=True))


def older(identity: str) -> str:
    """Give the identity that dfx 0.1 gave to the same file: all but the last part."""
    return identity.rpartition("-")[0]


def is_same(stored: object, identity: str) -> bool:
    """Whether the identity in a store, written by this or an older version of dfx, is a slide's identity."""
    return stored in (identity, older(identity))
