"""What networks give, as one row a patch; refused where that would be a guess."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dfx.encoders.spec import EncoderSpec
from dfx.encoders.tokens import TokenLayout
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


def pool(
    out: Any, spec: EncoderSpec, n: int, layout: TokenLayout | None = None, shape_yx: Sequence[int] = ()
) -> torch.Tensor:
    """Returns a network's output as (N, D); raises `EncoderError` where that would be a guess.

    `layout`: the tokens of a given module. None: the first token is the class token, and "mean" averages all tokens.
    `shape_yx`: rows and columns of the images.
    """
    rank = out.ndim if isinstance(out, torch.Tensor) else 0
    if rank == 3 and spec.pooling and not spec.named:
        mean = out.mean(1) if spec.pooling == "mean" else out[:, 1:].mean(1)
        if layout is not None:
            prefix = layout.prefix_in(out.shape[1], spec.name, spec.pooling, shape_yx)
            mean = out[:, prefix:].mean(1)
        out = {"cls": out[:, 0], "mean": mean, "cls+mean": torch.cat([out[:, 0], mean], 1)}[spec.pooling]
    elif rank == 4 and spec.pooling == "mean":
        out = out.mean((2, 3))
    elif rank == 2 and spec.pooling and not spec.named:
        raise EncoderError(f"encoder {spec.name} gives (N, D) itself: leave out pooling={spec.pooling!r}.")
    if not isinstance(out, torch.Tensor) or out.ndim != 2 or out.shape[0] != n:
        raise EncoderError(f"encoder {spec.name} gives {described(out)} for {n} patches, not ({n}, D): {remedy(out)}.")
    return out


def described(out: Any) -> str:
    """Returns a description of a network's output, for messages."""
    if isinstance(out, torch.Tensor):
        return f"a tensor of shape {tuple(out.shape)}"
    keys = ", ".join(map(repr, out)) if isinstance(out, Mapping) else ", ".join(getattr(out, "_fields", ()))
    return f"a {type(out).__name__}{f' with {keys}' if keys else ''}"


def remedy(out: Any) -> str:
    """Returns the remedy for an output of a wrong shape."""
    if not isinstance(out, torch.Tensor):
        return "wrap it in a module whose forward returns only the wanted tensor"
    if out.ndim == 3:
        return "pool inside the module, or use load_encoder(module, pooling='cls'|'mean'|'cls+mean') for tokens"
    if out.ndim == 4:
        return "pool inside the module, or use load_encoder(module, pooling='mean') for maps"
    if out.ndim == 1:
        return "return one number per patch as x[:, None]"
    return "return one row per patch, in the order of the patches"


def to_numpy(out: torch.Tensor) -> NDArray[np.floating[Any]]:
    """Bring features to main memory as numpy; bfloat16 and integers become float32."""
    if out.is_complex():
        raise EncoderError(f"features must be real numbers, not {out.dtype}: give their parts as columns.")
    if out.dtype not in (torch.float16, torch.float32, torch.float64):
        out = out.float()
    found: NDArray[np.floating[Any]] = out.cpu().numpy()
    return found
