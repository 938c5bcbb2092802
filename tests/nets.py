"""Small networks that tests use; importable by workers in other processes."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn


class Means(nn.Module):
    """Mean of each colour in [0, 1], and the mean of squares: (N, 6), exact enough for an oracle."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.mean((2, 3)), (x * x).mean((2, 3))], dim=1)


def means(patches: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What `Means` gives, by numpy."""
    x = patches.astype(np.float64) / 255
    return np.concatenate([x.mean((1, 2)), (x * x).mean((1, 2))], axis=1)


class Slow(Means):
    """Takes 20 ms a patch; notes how many patches it got, those of the probe left out."""

    def __init__(self, log: str | None = None) -> None:
        super().__init__()
        self.log = log

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02 * len(x))
        if self.log and x.max() > 0:
            with open(self.log, "a") as file:  # noqa: PTH123
                file.write(f"{len(x)}\n")
        return super().forward(x)


class Odd(Means):
    """Gives other features in a process whose environment says so."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1.01 if os.environ.get("DFX_TEST_ODD") else 1)


class Deadly(Means):
    """Ends its process at patches that hang far over the lower edge of their slide."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if deadly(x):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


class Stuck(Means):
    """Does not end, for an hour, at the patches that `Deadly` dies of."""

    def __init__(self, seconds: float = 3600) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if deadly(x):
            time.sleep(self.seconds)
        return super().forward(x)


def deadly(x: torch.Tensor) -> bool:
    """Whether a patch hangs over the lower edge of its slide by 56 of its 64 rows."""
    return bool(((x[:, :, 8:] == 1).all((1, 2, 3)) & (x[:, :, :8] < 1).any((1, 2, 3))).any())


class Hungry(Means):
    """Takes 12 MB a patch while it computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        big = self.widen(x)
        return super().forward(x) + 0 * big.mean()

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Conv2d(3, 768, 1, bias=False)


HOARD: list[bytearray] = []


def hoard(nbytes: int) -> None:
    """Keep as much in this process for ever as makes it so large."""
    memory = bytearray(nbytes - psutil.Process().memory_info().rss)
    memory[::4096] = b"\1" * len(memory[::4096])
    HOARD.append(memory)


class Darker(nn.Module):
    """Maps of two classes at half the size: logits that are equal where the mean of RGB is 0.8; class 1 is darker."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        grey = torch.nn.functional.avg_pool2d(x.mean(1, keepdim=True), 2)
        return {"out": torch.cat([grey - 0.8, 0.8 - grey], dim=1)}


def dark(thumbnail: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Finds what is darker than 0.8; importable by name."""
    return np.asarray(thumbnail.mean(axis=2) < 0.8 * 255)
