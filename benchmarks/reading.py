"""Reading against decoding alone, against other tools, and with tiles that are shrunk while they are decoded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

import dfx
from benchmarks.peers import Peer
from benchmarks.slide import CHROMA, write_one_level
from dfx.slides.cache import TILES
from dfx.slides.slide import Slide
from dfx.slides.synthetic import paint

VIEWS = {  # name: patch, mpp, stride
    "native": (224, 0.25, None),
    "shrink 2x": (224, 0.5, None),
    "native, half stride": (224, 0.25, 112),
}


GLASS = 225
"""Grey level from which a pixel is counted as glass rather than tissue."""


def decode_alone(slide: Slide, level: int, threads: int) -> float:
    """Seconds to decode each tile of a level once, by the same call, on as many threads."""
    part = slide.levels[level].parts[0]
    _, rows, columns = part.offsets.shape
    tiles = [(r, c) for r in range(rows) for c in range(columns)]

    def decode(some: list[tuple[int, int]]) -> None:
        for row, column in some:
            slide.levels[level].decode(slide.source, level, part, row, column, scratch=True)

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(decode, [tiles[i::threads] for i in range(threads)]))
    return time.perf_counter() - start


def read(slide: Slide, grid: dfx.PatchGrid, threads: int, reading: Literal["exact", "fast"] = "exact") -> float:
    """Seconds to read every patch through the lazy array, each block reduced to a number a patch."""
    TILES.clear()
    patches = dfx.patches(slide, grid, reading=reading)
    reduced = patches[:, ::56, ::56].max(axis=(1, 2, 3))
    start = time.perf_counter()
    reduced.compute(scheduler="threads", num_workers=threads)
    return time.perf_counter() - start


def measure(
    path: Path, *, rounds: int, threads: int, peers: Sequence[Peer] = (), part: int = 1024
) -> list[dict[str, Any]]:
    """Time every view in turn, `rounds` times; a row a view. Peers read `part` patches of it."""
    slide = dfx.open_slide(path)
    grids = {
        name: dfx.PatchGrid.over(slide, shape=shape, resolution=mpp, stride=stride, mask=None)
        for name, (shape, mpp, stride) in VIEWS.items()
    }
    decode_alone(slide, 1, threads)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in grids}
    for _ in range(rounds):
        for name, grid in grids.items():
            shape, mpp, stride = VIEWS[name]
            cpu = time.process_time()
            alone = decode_alone(slide, 0, threads)
            cpu, cpu_alone = time.process_time(), time.process_time() - cpu
            ours = read(slide, grid, threads)
            row = {
                "patches_per_s": len(grid) / ours,
                "of_decoding_alone": alone / ours,
                "of_its_cpu": cpu_alone / (time.process_time() - cpu),
            }
            for peer in peers if stride is None else ():
                rate = peer.read(path, shape, mpp, part, threads)
                if rate is not None:
                    row[f"times_{peer.name}"] = len(grid) / ours / rate
            found[name].append(row)
    rows = []
    for name, timed in found.items():
        figures = {key: round(median(row[key] for row in timed), 2) for key in timed[0]}
        figures |= {f"times_{peer.name}": figures.get(f"times_{peer.name}") for peer in peers}
        tiles = slide.levels[0].parts[0].offsets.size
        rows.append({"view": name, "tiles": tiles, "patches": len(grids[name]), **figures})
    return rows


def measure_fast(
    given: Path | None, folder: Path, *, size: int, rounds: int, threads: int, encoder: dfx.EncoderSpec
) -> list[dict[str, Any]]:
    """Compare `reading="fast"` with exact reading: speed, pixels and features; a row per slide and shrinking.

    The slide that is given is read as it is. Its pixels, or painted tissue of `size` pixels a side, are also written
    as slides with subsampled chroma (4:2:0) and without (4:4:4): how far fast reading is off depends on that most.
    """
    slides = {} if given is None else {"as given": given}
    if given is None:
        picture = paint(size, size, 0)
    else:
        slide = dfx.open_slide(given)
        picture = slide.region(0, (0, 0, *(min(side, size) for side in slide.levels[0].shape_yx)), rgb=True)
    slides |= {chroma: write_one_level(folder / f"{chroma.replace(':', '')}.svs", picture, chroma) for chroma in CHROMA}
    return [
        {"slide": name, **row}
        for name, path in slides.items()
        for row in measure_fast_slide(path, rounds=rounds, threads=threads, encoder=encoder)
    ]


def measure_fast_slide(path: Path, *, rounds: int, threads: int, encoder: dfx.EncoderSpec) -> list[dict[str, Any]]:
    """Compare `reading="fast"` with exact reading of a slide; a row per shrinking."""
    slide = dfx.open_slide(path)
    rows = []
    for factor in (2, 4, 8):
        grid = dfx.PatchGrid.over(slide, shape=224, resolution=1 / factor, units="baseline", mask=None)
        if grid.view.level:  # of the file is closer
            continue
        ratios = [read(slide, grid, threads) / read(slide, grid, threads, "fast") for _ in range(rounds)]
        exact, fast = (
            dfx.patches(slide, grid, reading=reading)[:512].compute(scheduler="threads").astype(int)
            for reading in ("exact", "fast")
        )
        a, b = (
            dfx.features(slide, grid, encoder, reading=reading)[:512].compute(scheduler="threads")
            for reading in ("exact", "fast")
        )
        inside = (grid.to_baseline()[:512, 2:] <= slide.dimensions).all(axis=1)
        off = np.abs(exact - fast)[inside]
        tissue = exact[inside].mean(axis=-1) < GLASS
        cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        rows.append(
            {
                "shrunk": factor,
                "patches": len(grid),
                "times_exact": round(median(ratios), 2),
                "grey_levels_mean": round(float(off.mean()), 2) if off.size else None,
                "on_tissue_mean": round(float(off[tissue].mean()), 2) if tissue.any() else None,
                "grey_levels_max": int(off.max()) if off.size else None,
                "cosine_median": round(float(np.median(cosine)), 4),
                "cosine_least": round(float(cosine.min()), 4),
            }
        )
    return rows
