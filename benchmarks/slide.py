"""A large slide for benchmarks, made in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray

from dfx.slides.synthetic import TILE, paint, tiles

PERIOD = 2048


def write_large_slide(path: Path, size: int, codec: str = "jpeg", seed: int = 0) -> Path:
    """Write a square SVS-like slide of tissue at 0.25 mpp, levels 1, 4 and 16; kept when it is there already.

    One painted texture, mirrored so that it repeats without a seam: every tile costs as much to
    decode as tissue does, but neither caches keyed by content nor features are to be judged by it.
    """
    if path.exists():
        return path
    texture = paint(PERIOD * 3, PERIOD * 3, seed)[PERIOD : 2 * PERIOD, PERIOD : 2 * PERIOD]
    texture = np.concatenate([texture, texture[::-1]])
    texture = np.concatenate([texture, texture[:, ::-1]], axis=1)
    part = path.with_suffix(f".{os.getpid()}.part")  # another benchmark may be making it too
    with tifffile.TiffWriter(part, bigtiff=True) as out:
        for factor in (1, 4, 16):
            shape = texture.shape[1] // factor, texture.shape[0] // factor
            level = np.asarray(cv2.resize(texture, shape, interpolation=cv2.INTER_AREA), np.uint8)
            side = size // factor
            out.write(
                repeated(level, side),
                shape=(side, side, 3),
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="rgb",
                compression=codec,
                compressionargs={"level": 80} if codec == "jpeg" else None,
                description=f"Aperio Image Library (dfx)\r\n{size}x{size} JPEG/RGB Q=80|AppMag = 40|MPP = 0.25",
                metadata=None,
            )
    part.rename(path)
    return path


def repeated(texture: NDArray[np.uint8], side: int) -> Iterator[NDArray[np.uint8]]:
    """Give the tiles of a square level that repeats a texture."""
    for top in range(0, side, TILE):
        rows = np.arange(top, top + TILE) % texture.shape[0]
        for left in range(0, side, TILE):
            columns = np.arange(left, left + TILE) % texture.shape[1]
            yield np.ascontiguousarray(texture[rows[:, None], columns])


CHROMA = {"4:2:0": (2, 2), "4:4:4": (1, 1)}
"""Chroma subsampling of a JPEG slide, by its usual name."""


def write_one_level(path: Path, picture: NDArray[np.uint8], chroma: str, quality: int = 80) -> Path:
    """Write a picture as an SVS-like slide of one level at 0.25 mpp, in YCbCr JPEG tiles."""
    with tifffile.TiffWriter(path) as out:
        out.write(
            tiles(picture),
            shape=picture.shape,
            dtype=np.uint8,
            tile=(TILE, TILE),
            photometric="rgb",  # which is converted; the tag becomes YCbCr
            subsampling=CHROMA[chroma],
            compression="jpeg",
            compressionargs={"level": quality},
            description=f"Aperio Image Library (dfx)\r\nJPEG/YCC Q={quality}|AppMag = 40|MPP = 0.25",
            metadata=None,
        )
    return path
