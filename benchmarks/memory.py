"""Peak memory of one extraction on slides of different sizes, against what the plan projects."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.slide import write_large_slide

SIZES = (12_000, 36_000)
PATCH, MPP, BLOCK = 224, 0.5, 64
CHILD = """
import json, sys, tempfile
from pathlib import Path
import timm  # so that importing it is not counted
import dfx
from benchmarks.memory import BLOCK, MPP, PATCH, peak, reset_peak, resident
from dfx import arrays, cluster, run
from dfx.plan import Options
from dfx.store import place_of

path, name, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with cluster.embedded(threads) as client:
    before = resident()
    encoder = dfx.load_encoder(name, weights="random")
    plans = []
    reset_peak()
    with tempfile.TemporaryDirectory() as folder:
        result = run.run_slides(
            [run.Item(("slide",), path, None)], [encoder], run.GridOptions(PATCH, MPP, "mpp"),
            Options(block_size=BLOCK, memory_threshold=80), client, save_dir=place_of(folder),
            notify=lambda event: plans.append(event) if isinstance(event, run.Planned) else None,
        )
        assert not result.failures, result.failures
    print(json.dumps({"before": before, "peak": peak(), "projected": plans[0].projected,
                      "blocks": plans[0].blocks}))
"""


def status(name: str) -> int:
    """Bytes of a field of this process's status (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def resident() -> int:
    """Bytes resident now."""
    return status("VmRSS")


def peak() -> int:
    """Most bytes resident since the last reset."""
    return status("VmHWM")


def reset_peak() -> None:
    """Forget the peak (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(
    folder: Path, *, threads: int, encoder: str = "resnet18", sizes: tuple[int, ...] = SIZES
) -> list[dict[str, Any]]:
    """Extract each slide in a process of its own; a row a slide."""
    rows: list[dict[str, Any]] = []
    for size in sizes:
        path = write_large_slide(folder / f"dfx-benchmark-jpeg-{size}.svs", size)
        line = [sys.executable, "-c", CHILD, str(path), encoder, str(threads)]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        said = json.loads(done.stdout.splitlines()[-1])
        taken = said["peak"] - said["before"]
        rows.append(
            {
                "slide_px": size,
                "blocks": said["blocks"],
                "peak_mb": said["peak"] >> 20,
                "of_the_extraction_mb": taken >> 20,
                "projected_mb": said["projected"] >> 20,
                "projected_over_measured": round(said["projected"] / taken, 2),
                "peak_over_first": round(said["peak"] / (rows[0]["peak_mb"] << 20), 2) if rows else 1.0,
            }
        )
    return rows
