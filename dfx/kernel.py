"""One block: read it, encode it, return an array. No Dask here: it runs alone in a debugger."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfx.encoders import EncoderSpec, encode
from dfx.errors import EncoderError
from dfx.plan import BlockWork
from dfx.reader import read_patches
from dfx.slides.buffers import unwritten

Meter = Callable[[str], AbstractContextManager[Any]]

_thread = threading.local()


def batch_buffer(n: int, shape_yx: tuple[int, int]) -> NDArray[np.uint8]:
    """Give this thread's buffer of patches, uint8 (n, rows, columns, 3): fresh ones cost page faults."""
    buffer: NDArray[np.uint8] | None = getattr(_thread, "patches", None)
    if buffer is None or buffer.shape[0] < n or buffer.shape[1:3] != shape_yx:
        buffer = _thread.patches = np.empty((n, *shape_yx, 3), np.uint8)
    return unwritten(buffer[:n])


def read(
    steps_xy: NDArray[Any],
    work: BlockWork,
    out: NDArray[np.uint8] | None = None,
    damaged: set[str] | None = None,
    following: NDArray[Any] | None = None,
) -> NDArray[np.uint8]:
    """Read the patches at some positions of a grid, uint8 (n, rows, columns, 3); `following` are read next."""
    grid = work.grid
    return read_patches(
        work.slide,
        grid.view,
        grid.origins(steps_xy),
        grid.shape_yx,
        out,
        pixels_yx=grid.pixels_yx,
        stride_yx=grid.stride_yx,
        fast=work.options.fast,
        damaged=damaged if work.options.on_bad_tile == "fill" else None,
        following_xy=None if following is None else grid.origins(following),
    )


def read_block(steps_xy: NDArray[Any], work: BlockWork, *, meter: Meter = nullcontext) -> NDArray[np.uint8]:
    """Read a block's patches, uint8 (n, rows, columns, 3)."""
    with meter("dfx-read"):
        return read(steps_xy, work)


def encode_block(
    steps_xy: NDArray[Any],
    work: BlockWork,
    *,
    threads: int | None = None,
    meter: Meter = nullcontext,
    damaged: set[str] | None = None,
    tell: Callable[[int], None] = lambda patches: None,
) -> NDArray[np.floating[Any]]:
    """Read and encode a block, a batch at a time: floating (n, D), the encoders' features side by side.

    `steps_xy` (n, 2): the block's positions in strides. `threads`: how many torch may use on a CPU.
    `meter` times the stages "dfx-read" and "dfx-encode". `damaged` takes the names of tiles that
    `on_bad_tile="fill"` left white. `tell` is told of every batch that is done.
    """
    size = work.options.batch_size
    edges = np.cumsum([0, *(head.dim for head in work.heads)]).tolist()
    out = unwritten(np.empty((len(steps_xy), edges[-1]), np.result_type(*(head.dtype for head in work.heads))))
    damaged = set() if damaged is None else damaged
    for start in range(0, len(steps_xy), size):
        batch, following = steps_xy[start : start + size], steps_xy[start + size : start + 2 * size]
        with meter("dfx-read"):
            patches = read(batch, work, batch_buffer(len(batch), work.grid.pixels_yx), damaged, following)
        for head, left, right in zip(work.heads, edges, edges[1:], strict=False):
            with meter("dfx-encode"):
                found = encode(head.encoder, patches, batch_size=size, device=work.options.device, threads=threads)
            if found.shape[1] != head.dim:  # it would be broadcast into the output
                raise EncoderError(
                    f"encoder {head.name} gave {found.shape[1]} numbers a patch for {len(batch)} patches, "
                    f"but {head.dim} when it was planned: its width must not depend on the batch."
                )
            out[start : start + size, left:right] = found
        tell(len(batch))
    return out


def encode_patches(
    patches: NDArray[np.uint8], encoder: EncoderSpec, *, batch_size: int, device: str, threads: int | None = None
) -> NDArray[np.floating[Any]]:
    """Encode patches that are in memory already: floating (n, D)."""
    return encode(encoder, patches, batch_size=batch_size, device=device, threads=threads)
