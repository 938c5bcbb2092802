"""The whole engine against an emulated device: how busy it is kept, and what a second encoder costs."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import distributed

import dfx
from benchmarks.devices import Sleeping, extract
from benchmarks.reading import read
from dfx.run import Item

PATCH, MPP = 224, 0.5
SHARE = 0.65
"""Of the reading rate: what the device takes."""


def measure(path: Path, *, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Extract a slide to zarr on a running cluster; the device's rate is a share of the reading rate."""
    slide = dfx.open_slide(path)
    grid = dfx.PatchGrid.over(slide, shape=PATCH, resolution=MPP, mask=None)
    item = Item((str(path),), path, None)
    reading: list[float] = []
    one: list[tuple[float, float]] = []
    pairs: list[float] = []
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=2 * threads, processes=False, memory_limit=0, dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        read(slide, grid, threads)
        for _ in range(rounds):
            reading.append(len(grid) / read(slide, grid, threads))
            rate = SHARE * reading[-1]
            whole, planned, patches = extract(client, [item], [Sleeping(rate)], patch=PATCH, mpp=MPP)
            one.append((patches / whole / rate, patches / planned / rate))
            # the slowest alone, and with another that takes four fifths of its time
            slow, quick = Sleeping(rate / 2), Sleeping(rate / 1.6)
            alone, _, _ = extract(client, [item], [slow], patch=PATCH, mpp=MPP)
            both, _, _ = extract(client, [item], [slow, quick], patch=PATCH, mpp=MPP)
            pairs.append(both / alone)
    return [
        {"what": "reading, patches/s", "figure": round(median(reading))},
        {"what": f"device, patches/s ({SHARE:.0%} of it)", "figure": round(SHARE * median(reading))},
        {"what": "share of the device's rate, planning excluded", "figure": round(median(p for _, p in one), 3)},
        {"what": "share of the device's rate, planning included", "figure": round(median(w for w, _ in one), 3)},
        {"what": "two encoders, times the slower one alone", "figure": round(median(pairs), 3)},
    ]
