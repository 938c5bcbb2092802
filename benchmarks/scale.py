"""What planning and scheduling cost: blocks that do nothing, against bare Dask, and over a long run."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import dask
import dask.array as da
import distributed
import numpy as np
import psutil
import zarr
from numpy.typing import NDArray
from torch import nn

import dfx
from dfx.plan import BlockWork, Options
from dfx.run import GridOptions, Item, Planned, SlideDone, SlideFailed
from dfx.run.driver import Driver
from dfx.run.planning import Request
from dfx.store import place_of
from dfx.store.disk import Disk

WIDTH = 8
BLOCK = 16
"""Patches a block: many blocks on a small slide."""
BLOCKS = 100
"""Blocks a slide of the long run."""


def nothing(steps_xy: NDArray[Any], work: BlockWork, **_: Any) -> NDArray[np.float32]:
    """Stand in for reading and encoding a block."""
    return np.zeros((len(steps_xy), WIDTH), np.float32)


@contextmanager
def cluster(threads: int) -> Iterator[distributed.Client]:
    """Run a cluster in this process, so that this process's time is that of client, scheduler and worker.

    Dask's profiler is off: it keeps a tree of calls a second, for 1,000 seconds, which hides whether anything grows.
    """
    with (
        dask.config.set({"distributed.worker.profile.enabled": False}),
        mock.patch("dfx.kernel.encode_block", nothing),
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=threads, processes=False, memory_limit=0, dashboard_address=":0"
        ) as local,
        distributed.Client(local, set_as_default=False) as client,
    ):
        yield client


def items(path: Path, n: int) -> list[Item]:
    """Give the same slide under `n` names."""
    folder = Path(tempfile.mkdtemp(prefix="dfx-benchmark-"))
    links = [folder / f"slide{i}{path.suffix}" for i in range(n)]
    for link in links:
        link.symlink_to(path)
    return [Item((str(link),), link, None) for link in links]


def engine(client: distributed.Client, slides: list[Item], patch: int) -> None:
    """Extract slides through the whole engine: planned, stored, scheduled and closed."""
    encoder = dfx.load_encoder(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, WIDTH)))
    with tempfile.TemporaryDirectory() as folder:
        result = dfx.run.run_slides(
            slides,
            [encoder],
            GridOptions(patch, 0.25, "mpp"),
            Options(block_size=BLOCK, memory_threshold=80),
            client,
            save_dir=place_of(folder),
        )
        assert not result.failures, result.failures


def bare_to_zarr(client: distributed.Client, slides: int, blocks: int) -> None:
    """Write as many blocks of as many arrays by `da.to_zarr`, an array at a time, all blocks at once."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(slides):
            shape, chunks = (blocks * BLOCK, WIDTH), (BLOCK, WIDTH)
            target = zarr.create_array(f"{folder}/{i}.zarr", shape=shape, chunks=chunks, dtype="f4", compressors=None)
            source = da.ones(shape, chunks=chunks, dtype="f4").map_blocks(np.copy, dtype="f4")
            client.compute(da.store(source, target, lock=False, compute=False), sync=True)


def bare_map(client: distributed.Client, slides: int, blocks: int) -> None:
    """Write as many blocks by `client.map`, all at once."""
    with tempfile.TemporaryDirectory() as folder:
        shape, chunks = (blocks * BLOCK, WIDTH), (BLOCK, WIDTH)
        targets = [
            zarr.create_array(f"{folder}/{i}.zarr", shape=shape, chunks=chunks, dtype="f4", compressors=None)
            for i in range(slides)
        ]

        def write(target: zarr.Array[Any], block: int) -> None:
            target[block * BLOCK : (block + 1) * BLOCK] = np.ones(chunks, np.float32)

        pairs = itertools.product(targets, range(blocks))
        client.gather(client.map(lambda pair: write(*pair), list(pairs), pure=False))


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Give the seconds by the clock and of all this process's threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(path: Path, *, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Compare dfx with bare Dask on as many blocks that do nothing; a row a shape of run."""
    slide = dfx.open_slide(path)
    rows = []
    with cluster(threads) as client:
        for n, patch in ((1, 112), (4, 224), (40, 736)):
            grid = dfx.PatchGrid.over(slide, shape=patch, resolution=0.25, mask=None)
            blocks = -(-len(grid) // BLOCK)
            slides = items(path, n)
            found: dict[str, list[tuple[float, float]]] = {"dfx": [], "to_zarr": [], "map": []}
            for _ in range(rounds):
                found["to_zarr"].append(timed(lambda: bare_to_zarr(client, n, blocks)))  # noqa: B023
                found["dfx"].append(timed(lambda: engine(client, slides, patch)))  # noqa: B023
                found["map"].append(timed(lambda: bare_map(client, n, blocks)))  # noqa: B023
            rows.append(
                {"slides": n, "blocks": n * blocks}
                | {
                    f"{name}_ms_a_block": round(median(cpu for _, cpu in times) / (n * blocks) * 1e3, 2)
                    for name, times in found.items()
                }
                | {
                    f"times_{name}": round(
                        median(ours[1] / bare[1] for ours, bare in zip(found["dfx"], found[name], strict=True)), 2
                    )
                    for name in ("to_zarr", "map")
                }
            )
    return rows


@dataclass(frozen=True, eq=False)
class Some(Request):
    """Plans a slide all but the first few of whose blocks are there, as holes in a disk."""

    executed: int = 0

    def __call__(self) -> Planned:
        """Plan the slide."""
        planned = super().__call__()
        assert isinstance(planned.place, Disk)
        for block in planned.todo[self.executed :]:
            folder = planned.place.path / "features" / "c" / str(block)
            folder.mkdir(parents=True)
            with (folder / "0").open("wb") as chunk:
                chunk.truncate(BLOCK * WIDTH * np.dtype(np.float32).itemsize)
        return replace(planned, todo=planned.todo[: self.executed])


def measure_long(path: Path, *, slides: int, executed: int, threads: int) -> list[dict[str, Any]]:
    """Run many slides of 100 blocks each through the driver; a row for each tenth of them.

    Every slide is opened, planned, stored and closed; of its blocks the first few are executed. Client,
    scheduler and worker are this process, so its memory is theirs together.
    """
    patch = dfx.open_slide(path).dimensions[0] // round((BLOCKS * BLOCK) ** 0.5)
    encoder = dfx.load_encoder(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, WIDTH)))
    process = psutil.Process()
    rows: list[dict[str, Any]] = []
    with cluster(threads) as client, tempfile.TemporaryDirectory() as folder:
        scheduler = client.cluster.scheduler

        options = Options(block_size=BLOCK, memory_threshold=80)
        where = GridOptions(patch, 0.25, "mpp")
        given = (Item((n,), path, None) for n in range(slides))

        def request(item: Item) -> Some:
            place = place_of(folder) / f"{item.given[0]}.zarr"
            return Some(item, (encoder,), where, options, place, False, executed=executed)

        requests = ((item, request(item)) for item in given)

        done, blocks = 0, 0
        wall, cpu = time.perf_counter(), time.process_time()
        driver = Driver(
            client,
            requests,
            keeps=lambda planned: False,
            cache=lambda item: place_of(folder),
            timeout=3600,
            expected={},
        )
        for event in driver.events():
            if isinstance(event, Planned):
                blocks += event.blocks
            elif isinstance(event, SlideFailed):
                raise event.error
            elif isinstance(event, SlideDone):
                shutil.rmtree(event.output.path)
                done += 1
                if done % (slides // 10) == 0:
                    now, cpu_now = time.perf_counter(), time.process_time()
                    rows.append(
                        {
                            "slides": done,
                            "blocks": blocks,
                            "s": round(now - wall, 1),
                            "cpu_s": round(cpu_now - cpu, 1),
                            "rss_mb": process.memory_info().rss >> 20,
                            "scheduler_tasks": len(scheduler.tasks),
                        }
                    )
                    wall, cpu = now, cpu_now
    return rows
