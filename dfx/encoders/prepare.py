"""From uint8 patches to what a network takes, on its device."""

from __future__ import annotations

import threading
from typing import TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from dfx.encoders.spec import EncoderSpec, Triple

_thread = threading.local()
T = TypeVar("T", torch.Tensor, NDArray[np.uint8])


class Prepare:
    """Makes float32 (N, 3, rows, columns) of uint8 patches, scaled to [0, 1], resized and normalised as a spec says.

    Safe in threads: each has a buffer of its own, which its next batch overwrites. Fresh memory
    for every batch costs several times as much as the arithmetic.
    """

    def __init__(self, spec: EncoderSpec, device: torch.device) -> None:
        self._size = spec.resize or spec.input_size
        self._crop = spec.input_size if spec.resize else None
        self._interpolation = spec.interpolation
        self._device = device
        self._mean = self._colours(spec.mean)
        self._std = self._colours(spec.std)
        # A byte has 256 values, so what is done to each is done once; the same float32 operations, so the same bits.
        values = torch.arange(256.0).view(256, 1, 1, 1).expand(256, 3, 1, 1) / 255
        self._unit_table = values.reshape(256, 1, 3).numpy().copy()
        if device.type == "cpu":
            self._table = self._normalised(values.clone()).reshape(256, 1, 3).numpy().copy()

    def _colours(self, values: Triple | None) -> torch.Tensor | None:
        return None if values is None else torch.tensor(values, device=self._device).view(1, 3, 1, 1)

    def __call__(self, patches: NDArray[np.uint8]) -> torch.Tensor:
        """Prepare uint8 patches (N, rows, columns, 3)."""
        resized = self._size is not None and patches.shape[1:3] != self._size
        if self._crop and not resized:  # what is cut off needs no more work
            patches = middle(patches, self._crop, axis=1)
        if self._device.type == "cpu":
            x = looked_up(patches, self._unit_table if resized else self._table)
            return self._normalised(self._resized(x)) if resized else x
        if self._device.type != "cuda":
            x = torch.from_numpy(np.ascontiguousarray(patches)).to(self._device)
            return self._scaled(x, resized=resized)
        stream = side_stream(self._device)
        with torch.cuda.stream(stream):
            x = self._scaled(pinned(patches).to(self._device, non_blocking=True), resized=resized)
        stream.synchronize()
        return x

    def _scaled(self, x: torch.Tensor, *, resized: bool) -> torch.Tensor:
        x = x.permute(0, 3, 1, 2).to(torch.float32).div_(255)
        return self._normalised(self._resized(x) if resized else x)

    def _resized(self, x: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(x, self._size, mode=self._interpolation, antialias=True).clamp_(0, 1)
        return middle(x, self._crop, axis=2) if self._crop else x

    def _normalised(self, x: torch.Tensor) -> torch.Tensor:
        if self._mean is not None:
            x = x.sub_(self._mean)
        return x if self._std is None else x.div_(self._std)


def middle(x: T, size: tuple[int, int], axis: int) -> T:
    """Cut the middle out of images whose rows are at `axis`, as torchvision's CenterCrop does."""
    tops = [round((whole - part) / 2) for whole, part in zip(x.shape[axis : axis + 2], size, strict=True)]
    inside = (slice(None),) * axis + tuple(slice(top, top + part) for top, part in zip(tops, size, strict=True))
    return x[inside]


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Give this thread's stream of a device, so that a batch comes in while another is computed."""
    streams: dict[torch.device, torch.cuda.Stream] = _thread.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return streams[device]


def looked_up(patches: NDArray[np.uint8], table: NDArray[np.float32]) -> torch.Tensor:
    """Replace each byte by its colour's value in a table, float32 (256, 1, 3), in this thread's buffer."""
    n, rows, columns, _ = patches.shape
    buffer: NDArray[np.float32] | None = getattr(_thread, "floats", None)
    if buffer is None or buffer.shape[0] < n or buffer.shape[1:3] != (rows, columns):
        buffer = _thread.floats = np.empty(patches.shape, np.float32)
    lines = np.ascontiguousarray(patches).reshape(n * rows, columns, 3)
    cv2.LUT(lines, table, dst=buffer[:n].reshape(n * rows, columns, 3))
    return torch.from_numpy(buffer[:n]).permute(0, 3, 1, 2)


def pinned(patches: NDArray[np.uint8]) -> torch.Tensor:
    """Copy patches to this thread's page-locked buffer, out of which a device reads by itself."""
    buffer: torch.Tensor | None = getattr(_thread, "pinned", None)
    if buffer is None or buffer.shape[0] < len(patches) or buffer.shape[1:] != patches.shape[1:]:
        buffer = _thread.pinned = torch.empty(patches.shape, dtype=torch.uint8, pin_memory=True)
    buffer.numpy()[: len(patches)] = patches
    return buffer[: len(patches)]
