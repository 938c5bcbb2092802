"""Reading against decoding alone, and against OpenSlide's read a patch."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import dfx
from dfx.slides.cache import TILES
from dfx.slides.slide import Slide

VIEWS = {  # name: patch, mpp, stride
    "native": (224, 0.25, None),
    "shrink 2x": (224, 0.5, None),
    "native, half stride": (224, 0.25, 112),
}


def decode_alone(slide: Slide, level: int, threads: int) -> float:
    """Seconds to decode each tile of a level once, by the same call, on as many threads."""
    part = slide.levels[level].parts[0]
    _, rows, columns = part.offsets.shape
    tiles = [(r, c) for r in range(rows) for c in range(columns)]

    def decode(some: list[tuple[int, int]]) -> None:
        for row, column in some:
            slide._decode(level, part, row, column)

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(decode, [tiles[i::threads] for i in range(threads)]))
    return time.perf_counter() - start


def read(slide: Slide, grid: dfx.PatchGrid, threads: int) -> float:
    """Seconds to read every patch through the lazy array, each block reduced to a number a patch."""
    TILES.clear()
    patches = dfx.patches(slide, grid)
    reduced = patches[:, ::56, ::56].max(axis=(1, 2, 3))
    start = time.perf_counter()
    reduced.compute(scheduler="threads", num_workers=threads)
    return time.perf_counter() - start


def openslide_reader(path: Path, grid: dfx.PatchGrid, threads: int) -> Callable[[], float] | None:
    """Time OpenSlide, a read a patch, a handle a thread, on a part of the grid; None where it can't read."""
    try:
        import openslide
    except ImportError:
        return None
    from PIL import Image

    try:
        openslide.OpenSlide(path).close()
    except openslide.OpenSlideError:  # a compression that it does not read
        return None
    scale = grid.view.to_baseline[0]
    size = round(grid.shape_yx[0] * scale)
    origins = (grid.coordinates[:1024, :2] * scale).round().astype(int).tolist()

    def some(part: list[list[int]]) -> None:
        slide = openslide.OpenSlide(path)
        for x, y in part:
            image = slide.read_region((x, y), 0, (size, size)).convert("RGB")
            if size != grid.shape_yx[0]:
                image = image.resize(grid.shape_yx[::-1], Image.Resampling.BOX)
            np.asarray(image)

    def run() -> float:
        start = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(some, [origins[i::threads] for i in range(threads)]))
        return (time.perf_counter() - start) / len(origins)

    return run


def measure(path: Path, *, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Time every view in turn, `rounds` times; a row a view."""
    slide = dfx.open_slide(path)
    tiles = slide.levels[0].parts[0].offsets.size
    grids = {
        name: dfx.PatchGrid.over(slide, shape=shape, resolution=mpp, stride=stride, mask=None)
        for name, (shape, mpp, stride) in VIEWS.items()
    }
    peers = {name: openslide_reader(path, grid, threads) for name, grid in grids.items()}
    decode_alone(slide, 1, threads)
    found: dict[str, list[tuple[float, float, float | None]]] = {name: [] for name in grids}
    for _ in range(rounds):
        for name, grid in grids.items():
            alone, ours = decode_alone(slide, 0, threads), read(slide, grid, threads)
            peer = peers[name]
            found[name].append((alone, ours, peer() * len(grid) if peer else None))
    return [
        {
            "view": name,
            "tiles": tiles,
            "patches": len(grids[name]),
            "patches_per_s": round(len(grids[name]) / median(ours for _, ours, _ in rows)),
            "of_decoding_alone": round(median(alone / ours for alone, ours, _ in rows), 2),
            "times_openslide": round(median((peer or 0) / ours for _, ours, peer in rows), 1) or None,
        }
        for name, rows in found.items()
    ]
