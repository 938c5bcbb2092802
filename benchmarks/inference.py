"""A network on the CPU, end to end, against a bare loop over tensors that are there already."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import timm
import torch
from dask.system import CPU_COUNT
from safetensors.torch import save_file

import dfx
from benchmarks.peers import Peer
from dfx.cluster import embedded
from dfx.plan import Options
from dfx.run import GridOptions, Item, run_slides
from dfx.store import place_of

NAME, BATCH, PATCH, MPP = "resnet18", 64, 224, 0.5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def bare(module: torch.nn.Module, batches: list[torch.Tensor]) -> float:
    """Patches a second of a network over batches in memory, in the better layout, on every core."""
    torch.set_num_threads(CPU_COUNT)
    best = 0.0
    for layout in (torch.contiguous_format, torch.channels_last):
        laid = [batch.contiguous(memory_format=layout) for batch in batches]
        with torch.inference_mode():
            module(laid[0])
            start = time.perf_counter()
            for batch in laid:
                module(batch)
            best = max(best, sum(map(len, laid)) / (time.perf_counter() - start))
    return best


def measure(path: Path, *, rounds: int, threads: int, part: int = 1024, peers: list[Peer]) -> list[dict[str, Any]]:
    """Encode `part` patches of a slide; the ratios are to things timed in the same round."""
    slide = dfx.open_slide(path)
    grid = dfx.PatchGrid.over(slide, shape=PATCH, resolution=MPP, mask=None)
    side = round(np.sqrt(part))
    size = grid.view.size_xy
    mask = np.zeros((size[1] // PATCH, size[0] // PATCH), bool)
    mask[:side, :side] = True
    module = timm.create_model(NAME, num_classes=0).eval()
    found: dict[str, list[float]] = {"of the bare loop": [], **{f"times {peer.name}": [] for peer in peers}}
    rates: list[float] = []
    with tempfile.TemporaryDirectory() as folder, embedded(threads) as client:
        weights = Path(folder) / "weights.safetensors"
        save_file(module.state_dict(), weights)
        encoder = dfx.load_encoder(NAME, weights=weights)
        masked = dfx.PatchGrid.over(slide, shape=PATCH, resolution=MPP, mask=mask)
        pixels = dfx.patches(slide, masked).compute(scheduler="threads")[: part // 2]
        floats = (
            torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]
        ) / torch.tensor(STD)[:, None, None]
        batches = list(floats.contiguous().split(BATCH))
        for n in range(rounds):
            alone = bare(module, batches)
            start = time.perf_counter()
            result = run_slides(
                [Item(("slide",), path, mask)],
                [encoder],
                GridOptions(PATCH, MPP, "mpp"),
                Options(batch_size=BATCH, memory_threshold=80),
                client,
                save_dir=place_of(Path(folder) / str(n)),
            )
            ours = len(masked) / (time.perf_counter() - start)
            assert not result.failures, result.failures
            rates.append(ours)
            found["of the bare loop"].append(ours / alone)
            for peer in peers:
                found[f"times {peer.name}"].append(ours / peer.encode(path, mask, weights, threads))
    rows = [{"what": f"{NAME}, patches/s", "figure": round(median(rates), 1)}]
    return rows + [{"what": name, "figure": round(median(values), 2)} for name, values in found.items()]
