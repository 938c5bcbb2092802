"""The whole engine against an emulated device: how busy it is kept, planning included."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import distributed
import torch
from torch import nn

import dfx

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


def measure(path: Path, *, rates: list[int], rounds: int, threads: int) -> list[dict[str, Any]]:
    """Extract a slide to zarr on a running cluster, for each rate of the device in turn."""
    found: dict[int, list[float]] = {rate: [] for rate in rates}
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=threads, processes=False, memory_limit=0, dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        for _ in range(rounds):
            for rate in rates:
                extractor = dfx.DeepFeatureExtractor(Sleeping(rate), verbose=False)
                with tempfile.TemporaryDirectory() as folder:
                    start = time.perf_counter()
                    result = extractor.run(
                        [path],
                        patch_mode=False,
                        patch_input_shape=224,
                        input_resolutions=[{"resolution": 0.25, "units": "mpp"}],
                        save_dir=folder,
                        output_type="zarr",
                        auto_get_mask=False,
                        client=client,
                    )
                    seconds = time.perf_counter() - start
                    assert isinstance(result, dict)
                    patches = dfx.open_features(result[path]).features.shape[0]
                found[rate].append(patches / seconds)
    return [
        {
            "device_patches_per_s": rate,
            "patches_per_s": round(median(got)),
            "of_the_device": round(median(got) / rate, 2),
        }
        for rate, got in found.items()
    ]
