"""What segmentation networks give, as one row of probabilities a tile."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dfx.errors import EncoderError


class TissueMap(nn.Module):
    """A segmentation network whose output is (N, rows x columns): the probability that a pixel is tissue."""

    def __init__(self, module: nn.Module, output: str, channel: int | None) -> None:
        super().__init__()
        self.module = module
        self.output = output
        self.channel = channel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give the probabilities of NCHW tiles; raises `EncoderError` for what are no maps."""
        maps = maps_of(self.module(x))
        name, classes = type(self.module).__name__, maps.shape[1] if maps is not None else 0
        if maps is None or maps.shape[0] != len(x):
            raise EncoderError(f"{name} gives no maps (N, classes, rows, columns) for {len(x)} tiles: wrap it.")
        if (classes > 1 and self.channel is None) or (self.channel or 0) >= classes:
            raise EncoderError(
                f"{name} gives {classes} class(es): say which is tissue with channel=, 0 to {classes - 1}."
            )
        maps = maps.float()
        if maps.shape[2:] != x.shape[2:]:
            maps = nn.functional.interpolate(maps, x.shape[2:], mode="bilinear")
        if self.output == "logits":
            maps = maps.sigmoid() if classes == 1 else maps.softmax(1)
        return maps[:, self.channel or 0].flatten(1)


def maps_of(out: Any) -> torch.Tensor | None:
    """Take the maps out of what torchvision, transformers and plain networks give."""
    out = out.get("out") if isinstance(out, dict) and "out" in out else getattr(out, "logits", out)
    return out if isinstance(out, torch.Tensor) and out.ndim == 4 else None
