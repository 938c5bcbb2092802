"""What networks give, as one row a patch; refused where that would be a guess."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dfx.encoders.spec import EncoderSpec
from dfx.errors import EncoderError


def rows_of(out: Any, n: int, name: str) -> torch.Tensor:
    """Give what `infer_batch` returned, an array or a list of them, as one row a patch."""
    if isinstance(out, list | tuple):
        heads = [torch.as_tensor(part) for part in out]
        if heads and heads[0].ndim > 1 and heads[0].shape[0] == n:
            out = heads[0]  # one array for the batch, or one a head of the network
        elif len(heads) == n:
            out = torch.stack(heads)  # one vector a patch
        else:
            out = heads[0] if heads else None
    elif isinstance(out, np.ndarray | torch.Tensor):
        out = torch.as_tensor(out)
    else:
        out = None
    if out is None or out.ndim == 0 or out.shape[0] != n:
        raise EncoderError(
            f"infer_batch of {name} must return one row a patch ({n}), as an array or a list with one array."
        )
    rows: torch.Tensor = out.reshape(n, -1)
    return rows


def pool(out: Any, spec: EncoderSpec, n: int) -> torch.Tensor:
    """Turn a network's output into (N, D); raises `EncoderError` where that would be a guess."""
    if isinstance(out, torch.Tensor) and out.ndim == 3 and spec.pooling and not spec.named:
        cls, mean = out[:, 0], out[:, 1:].mean(1)
        out = {"cls": cls, "mean": out.mean(1), "cls+mean": torch.cat([cls, mean], 1)}[spec.pooling]
    elif isinstance(out, torch.Tensor) and out.ndim == 4 and spec.pooling == "mean":
        out = out.mean((2, 3))
    elif isinstance(out, torch.Tensor) and out.ndim == 2 and spec.pooling and not spec.named:
        raise EncoderError(f"encoder {spec.name} gives (N, D) itself: leave out pooling={spec.pooling!r}.")
    if not isinstance(out, torch.Tensor) or out.ndim != 2 or out.shape[0] != n:
        found = f"a tensor of shape {tuple(out.shape)}" if isinstance(out, torch.Tensor) else f"a {type(out).__name__}"
        raise EncoderError(
            f"encoder {spec.name} gives {found} for {n} patches, not ({n}, D): "
            "pool inside the module, or use load_encoder(module, pooling='cls'|'mean'|'cls+mean') for tokens "
            "and pooling='mean' for maps."
        )
    return out


def to_numpy(out: torch.Tensor) -> NDArray[np.floating[Any]]:
    """Bring features to main memory as numpy; bfloat16 and integers become float32."""
    if out.is_complex():
        raise EncoderError(f"features must be real numbers, not {out.dtype}: give their parts as columns.")
    if out.dtype not in (torch.float16, torch.float32, torch.float64):
        out = out.float()
    found: NDArray[np.floating[Any]] = out.cpu().numpy()
    return found
