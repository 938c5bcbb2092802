"""A segmentation network as a function of a thumbnail, by the encoders' route."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from dfx.encoders.spec import EncoderSpec, Triple
from dfx.errors import CallError, CallTypeError
from dfx.resolution import one

if TYPE_CHECKING:
    from torch import nn

GLASS = 255
"""What is beyond the thumbnail."""


@dataclass(frozen=True, eq=False)
class Segmenter:
    """Finds tissue with a network: takes a thumbnail, uint8 RGB (H, W, 3), at `mpp`; gives bool (H, W).

    Small to pickle: workers have the network as they have encoders.
    """

    encoder: EncoderSpec
    """Gives the probabilities of a tile's pixels, one after another."""
    name: str
    """Class and digest of the network."""
    mpp: float
    """Microns per pixel of the thumbnails that it takes."""
    tile: int = 512
    """Rows and columns that it takes at a time."""
    margin: int = 64
    """Pixels around a tile that are not used, since it sees too little around them."""
    threshold: float = 0.5
    """Probability above which a pixel is tissue."""
    device: str = "auto"
    """Torch device."""

    def __call__(self, thumbnail: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Find tissue; raises `EncoderError` when the network can't be run."""
        from dfx.encoders import encode

        (height, width), step = thumbnail.shape[:2], self.tile - 2 * self.margin
        rows, columns = math.ceil(height / step), math.ceil(width / step)
        around = [(self.margin, n * step - size + self.margin) for n, size in ((rows, height), (columns, width))]
        padded = np.pad(thumbnail, [*around, (0, 0)], constant_values=GLASS)
        found = np.empty((rows * step, columns * step), np.bool_)
        inner = slice(self.margin, self.margin + step)
        for top in range(0, rows * step, step):
            band = padded[top : top + self.tile]
            tiles = np.stack([band[:, left : left + self.tile] for left in range(0, columns * step, step)])
            maps = encode(self.encoder, tiles, batch_size=4, device=self.device)
            kept = maps.reshape(columns, self.tile, self.tile)[:, inner, inner] > self.threshold
            found[top : top + step] = kept.swapaxes(0, 1).reshape(step, columns * step)
        return found[:height, :width]


def load_segmenter(
    module: nn.Module,
    *,
    mpp: float,
    output: Literal["logits", "probabilities"] = "logits",
    channel: int | None = None,
    threshold: float = 0.5,
    tile: int = 512,
    margin: int = 64,
    mean: Triple | None = None,
    std: Triple | None = None,
    precision: str | None = None,
    device: str = "auto",
) -> Segmenter:
    """Make a `mask=` and `tissue=` of a segmentation network.

    `module` gets float32 NCHW RGB in [0, 1], less `mean` and divided by `std` where given, `tile` pixels a side at
    `mpp` microns a pixel, and gives maps (N, classes, h, w), as a tensor, as `{"out": maps}` or with `.logits`;
    smaller maps are enlarged. `output`: what they are; logits of one class go through a sigmoid, those of
    several through a softmax. `channel`: the class that is tissue, None: the only one. `margin`: pixels on each side of
    a tile that are left to its neighbours. A pixel is tissue above `threshold`. Raises `CallError` or
    `CallTypeError` for a bad value, `EncoderError` for a module that can't be copied.
    """
    import sys

    from dfx.encoders import check_device, load_encoder

    torch = sys.modules.get("torch")  # a module can't exist before torch is imported
    if torch is None or not isinstance(module, torch.nn.Module):
        raise CallTypeError(f"a segmenter is made of a torch.nn.Module, not of {type(module).__name__}.")
    if output not in ("logits", "probabilities"):
        raise CallError(f"output must be 'logits' or 'probabilities', not {output!r}.")
    for name, value, least in (("tile", tile, 1), ("margin", margin, 0), ("channel", channel or 0, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise CallError(f"{name} must be a whole number, at least {least}, not {value!r}.")
    if 2 * margin >= tile:
        raise CallError(f"margins of {margin} leave nothing of a tile of {tile} pixels: use a larger tile.")
    from dfx.encoders.maps import TissueMap

    spec = load_encoder(TissueMap(module, output, channel), mean=mean, std=std, precision=precision)
    name = f"{type(module).__name__}-{spec.weights_digest[:12]}"
    limit = probability(threshold)
    return Segmenter(spec, name, one(mpp, "mpp"), tile, margin, limit, check_device(device))


def probability(value: Any) -> float:
    """Give a threshold as a float from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise CallError(f"threshold must be a probability from 0 to 1, not {value!r}.")
    return float(value)
