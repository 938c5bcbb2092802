"""Arrays as files of torch, for tools that read those."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray


def save_tensor(array: NDArray[Any], path: Path) -> None:
    """Write a writable array as a tensor that `torch.load(path, weights_only=True)` gives.

    It is copied out of where it lies, so that a memory-mapped one is never in memory whole.
    """
    torch.save(torch.from_numpy(array), path)
