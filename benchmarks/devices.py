"""Devices that are emulated, by a module that sleeps, and how busy the engine keeps one or many."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import dfx
from dfx import kernel, run
from dfx.plan import BlockWork, Options
from dfx.store import place_of

WIDTH = 512


class Sleeping(nn.Module):
    """Takes a fixed time a patch without the interpreter lock, as a device does."""

    def __init__(self, patches_per_s: float) -> None:
        super().__init__()
        self.seconds = 1 / patches_per_s

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Sleep, then give (N, WIDTH)."""
        time.sleep(self.seconds * len(x))
        return x[:, :1, 0, 0].expand(-1, WIDTH)


def extract(
    client: distributed.Client,
    slides: Sequence[run.Item],
    modules: Sequence[nn.Module],
    *,
    patch: int,
    mpp: float,
    options: Options | None = None,
) -> tuple[float, float, int]:
    """Extract slides to zarr: seconds in all, seconds since the first was planned, and patches."""
    encoders = [dfx.load_encoder(module) for module in modules]
    patches: list[int] = []
    planned: list[float] = []

    def notify(event: run.Event) -> None:
        if isinstance(event, run.Planned):
            planned.append(time.perf_counter())
            patches.append(event.patches)

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        result = run.run_slides(
            slides,
            encoders,
            run.GridOptions(patch, mpp, "mpp"),
            options or Options(memory_threshold=80),
            client,
            save_dir=place_of(folder),
            notify=notify,
        )
        end = time.perf_counter()
    assert not result.failures, result.failures
    return end - start, end - planned[0], sum(patches)


class Unread(distributed.WorkerPlugin):  # type: ignore[misc]
    """Gives a worker's tasks patches that nobody read: only the devices and Dask are measured."""

    name = "unread"

    def setup(self, worker: distributed.Worker) -> None:
        """Replace reading in this worker's process."""
        kernel.read = unread


def unread(
    steps_xy: NDArray[Any], work: BlockWork, out: NDArray[np.uint8] | None = None, *others: Any
) -> NDArray[np.uint8]:
    """Stand in for reading patches."""
    assert out is not None
    return out


def measure(path: Path, *, counts: Sequence[int], seconds: float, rate: float) -> list[dict[str, Any]]:
    """Share of their time that 1 to 16 devices work, a process each; with slides alike, and one ten times larger."""
    share = np.zeros((10, 10), bool)
    share[:, 0] = True  # a tenth of the slide
    patch = 44
    tenth = len(dfx.PatchGrid.over(dfx.open_slide(path), shape=patch, resolution=0.25, mask=share))
    rows = []
    for devices in counts:
        with (
            distributed.LocalCluster(
                n_workers=devices, threads_per_worker=4, memory_limit=0, dashboard_address=":0"
            ) as cluster,
            distributed.Client(cluster, set_as_default=False) as client,
            tempfile.TemporaryDirectory() as folder,
        ):
            client.register_plugin(Unread())
            module = Sleeping(rate)
            links = [Path(folder) / f"{i}{path.suffix}" for i in range(1 + round(devices * seconds * rate / tenth))]
            for link in links:
                link.symlink_to(path)
            alike = [run.Item((str(link),), link, share) for link in links]
            one_large = [*alike[:-2], run.Item(("large",), links[-1], None)]
            extract(client, alike[:devices], [module], patch=patch, mpp=0.25)  # every process has its encoder
            for name, slides in (("alike", alike), ("one ten times larger", one_large)):
                whole, _, patches = extract(client, slides, [module], patch=patch, mpp=0.25)
                rows.append(
                    {
                        "devices": devices,
                        "slides": f"{len(slides)} {name}",
                        "patches": patches,
                        "seconds": round(whole, 1),
                        "efficiency": round(patches / rate / devices / whole, 3),
                    }
                )
    return rows
