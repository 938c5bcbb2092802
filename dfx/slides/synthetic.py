"""A realistic slide made from nothing: for `dfx demo`, tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray

TILE = 256


def write_slide(path: str | Path, width: int = 3072, height: int = 2560, *, mpp: float = 0.5, seed: int = 0) -> Path:
    """Write a pyramidal SVS-like TIFF: JPEG tiles, levels at 1, 4 and 16, H&E-like tissue on glass.

    The same arguments give the same pixels. Levels are made by area averaging, so they agree.
    """
    return write_picture(path, paint(width, height, seed), mpp=mpp, seed=seed)


def write_picture(path: str | Path, baseline: NDArray[np.uint8], *, mpp: float, seed: int = 0) -> Path:
    """Write a picture, uint8 RGB, as such a slide."""
    path = Path(path)
    height, width = baseline.shape[:2]
    power = 10 / mpp
    described = (
        f"Aperio Image Library (dfx synthetic)\r\n{width}x{height} [0,0 {width}x{height}] ({TILE}x{TILE}) JPEG/RGB Q=85"
        f"|AppMag = {power:g}|MPP = {mpp:g}|Seed = {seed}"
    )
    with tifffile.TiffWriter(path, bigtiff=width * height > 2**29) as out:
        for n, factor in enumerate((1, 4, 16)):
            size = max(1, width // factor), max(1, height // factor)
            level = np.asarray(cv2.resize(baseline, size, interpolation=cv2.INTER_AREA), np.uint8)
            out.write(
                tiles(level),
                shape=level.shape,
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 85},
                description=described if n == 0 else f"Aperio Image Library (dfx synthetic)\r\n{size[0]}x{size[1]}",
                metadata=None,
            )
    return path


def tiles(level: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Cut a level into tiles, the last ones padded with white."""
    for top in range(0, level.shape[0], TILE):
        for left in range(0, level.shape[1], TILE):
            tile = np.full((TILE, TILE, 3), 255, np.uint8)
            piece = level[top : top + TILE, left : left + TILE]
            tile[: piece.shape[0], : piece.shape[1]] = piece
            yield tile


def paint(width: int, height: int, seed: int) -> NDArray[np.uint8]:
    """Paint H&E-like tissue: pink stroma, paler lumina, purple nuclei whose density varies, on glass."""
    rng = np.random.default_rng(seed)
    tissue = outline(rng, width, height)
    gland = _noise(rng, width, height, 14)
    dense = _noise(rng, width, height, 8)
    fibre = _noise(rng, width, height, 160)
    grain = rng.normal(0, 4, (height, width)).astype(np.float32)
    glass = np.array([243, 242, 245], np.float32)
    stroma, lumen, nucleus = (np.array(c, np.float32) for c in ([222, 158, 190], [238, 220, 232], [96, 62, 138]))
    picture = stroma + fibre[..., None] * np.array([10, 22, 16], np.float32)
    hollow = np.clip((gland - 0.55) * 4, 0, 1)[..., None]
    picture = picture * (1 - hollow) + lumen * hollow
    cover = _nuclei(rng, dense, gland)[..., None]
    picture = picture * (1 - cover) + nucleus * cover
    picture = np.where(tissue[..., None], picture, glass) + grain[..., None]
    return np.asarray(np.clip(picture, 0, 255), np.uint8)


def outline(rng: np.random.Generator, width: int, height: int) -> NDArray[np.bool_]:
    """Where `paint` puts tissue, by the first numbers of its generator."""
    shape = _noise(rng, width, height, 5)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    away = np.hypot(x / width - 0.5, (y / height - 0.5) * 1.1)
    return np.asarray(0.5 * shape + 1 - 2.3 * away > 0)


def _noise(rng: np.random.Generator, width: int, height: int, cells: int) -> NDArray[np.float32]:
    """Smooth noise, about -1 to 1, with `cells` bumps along the longer side."""
    scale = cells / max(width, height)
    coarse = rng.normal(0, 0.6, (max(3, round(height * scale)), max(3, round(width * scale)))).astype(np.float32)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))


def _nuclei(rng: np.random.Generator, dense: NDArray[np.float32], gland: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cover of nuclei, 0 to 0.9: crowded where `dense` is high and along the rims of glands."""
    height, width = dense.shape
    cover = np.zeros((height, width), np.float32)
    for _ in range(width * height // 450):
        cx, cy = int(rng.integers(width)), int(rng.integers(height))
        rim = 1.0 if 0.25 < gland[cy, cx] < 0.55 else 0.0
        axes = int(rng.integers(4, 8)), int(rng.integers(3, 6))
        angle, chance = float(rng.uniform(0, 180)), rng.uniform()
        if chance < 0.25 + 0.4 * max(0.0, float(dense[cy, cx])) + 0.5 * rim:
            cv2.ellipse(cover, (cx, cy), axes, angle, 0, 360, 0.9, -1)
    return np.asarray(cv2.GaussianBlur(cover, (0, 0), 1.0))
