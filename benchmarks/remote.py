"""Slides on servers: requests and bytes to open one and to read its patches, and how fast that is beside the disk."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import dfx
from benchmarks.reading import read
from dfx.slides.cache import OPENED

PATCH, MPP = 224, 0.5
LATENCY = 0.03


@contextmanager
def serving(*options: str) -> Iterator[str]:
    """Run `benchmarks.server` in a process of its own, since its time is not the reader's; gives its URL."""
    line = [sys.executable, "-m", "benchmarks.server", *options]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.stdin.close()


@contextmanager
def bucket(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run an S3 server with a slide in it; gives the URL that counts, and options that lead there."""
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # each request
    moto = ThreadedMotoServer(port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    with serving("--upstream", f"http://{host}:{port}") as url:
        options = {"key": "key", "secret": "secret", "client_kwargs": {"endpoint_url": url}}
        files = s3fs.S3FileSystem(**options)
        files.mkdir("slides")
        files.pipe_file(f"slides/{path.name}", path.read_bytes())
        yield url, options
    moto.stop()


def asked(url: str) -> tuple[int, int]:
    """Requests and bytes since this was last asked."""
    if not url:
        return 0, 0
    with urllib.request.urlopen(f"{url}/-asked") as answer:
        requests, sent = answer.read().split()
    return int(requests), int(sent)


def measure(path: Path, *, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Open a slide and read all its patches from a disk, over HTTP without and with latency, and from S3, in turn."""
    near = dfx.open_slide(path)
    grid = dfx.PatchGrid.over(near, shape=PATCH, resolution=MPP, mask=None)
    part = near.levels[grid.view.level].parts[0]
    needed = int(part.counts.sum())  # without a mask, every tile of the level
    with ExitStack() as stack:
        http = stack.enter_context(serving("--root", str(path.parent)))
        slow = stack.enter_context(serving("--root", str(path.parent), "--latency", str(LATENCY)))
        s3, options = stack.enter_context(bucket(path))
        places: dict[str, tuple[str, str, dict[str, Any] | None]] = {
            "disk": (str(path), "", None),
            "HTTP": (f"{http}/{path.name}", http, None),
            f"HTTP, {LATENCY * 1e3:.0f} ms": (f"{slow}/{path.name}", slow, None),
            "S3": (f"s3://slides/{path.name}", s3, options),
        }
        read(near, grid, threads)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in places}
        for _ in range(rounds):
            for name, (url, server, given) in places.items():
                OPENED.clear()
                asked(server)
                start = time.perf_counter()
                slide = dfx.open_slide(url, storage_options=given)
                opening = time.perf_counter() - start
                at_open = asked(server)
                rate = len(grid) / read(slide, grid, threads)
                at_read = asked(server)
                found[name].append(
                    {
                        "open_requests": at_open[0],
                        "open_mb": at_open[1] / 1e6,
                        "open_s": opening,
                        "read_requests": at_read[0],
                        "times_needed_bytes": at_read[1] / needed,
                        "patches_per_s": rate,
                        "of_disk": rate / found["disk"][-1]["patches_per_s"] if name != "disk" else 1,
                    }
                )
    rows = []
    for name, timed in found.items():
        figures = {key: round(median(row[key] for row in timed), 2) for key in timed[0]}
        rows.append({"from": name, "tiles": part.offsets.size, "patches": len(grid), **figures})
    return rows
