"""Everything that will happen to a slide, known before anything is computed. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfx.encoders import EncoderSpec
from dfx.errors import CallError, CallTypeError
from dfx.grid import PatchGrid
from dfx.resolution import View
from dfx.slides import Slide

FORMAT = 1
"""Version of the store's layout; a store of another is not resumed."""


@dataclass(frozen=True)
class Options:
    """How the work is done. None of it changes what is stored beyond rounding, but `block_size` its chunks."""

    block_size: int = 256
    """Patches in a block: one Dask block, one zarr chunk, one unit of work and resume."""
    batch_size: int = 64
    """Patches that the network takes at a time."""
    device: str = "auto"
    """Torch device on the workers; "auto" is the GPU where there is one."""

    def __post_init__(self) -> None:
        for name in ("block_size", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise CallTypeError(f"{name} must be a whole number of patches, not {value!r}.")
            if not 1 <= value < 2**24:
                raise CallError(f"{name} must be at least 1 patch and below {2**24}, not {value}.")
            object.__setattr__(self, name, int(value))  # numpy's integers are no JSON


@dataclass(frozen=True, eq=False)
class Plan:
    """A slide, its grid and its encoder, and so the shape of what comes out."""

    slide: Slide
    """What is read."""
    grid: PatchGrid
    """Where."""
    encoder: EncoderSpec
    """With what."""
    dim: int
    """Width of a feature vector."""
    dtype: np.dtype[Any]
    """Its data type."""
    options: Options
    """How."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D) of the features."""
        return len(self.grid), self.dim

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return -(-len(self.grid) // self.options.block_size)

    def rows(self, block: int) -> slice:
        """The rows of a block."""
        start = block * self.options.block_size
        return slice(start, min(start + self.options.block_size, len(self.grid)))

    @property
    def nbytes(self) -> int:
        """Bytes of features and coordinates."""
        return len(self.grid) * (self.dim * self.dtype.itemsize + 32)

    def fingerprint(self) -> dict[str, Any]:
        """All that the stored features depend on, as JSON values: equal exactly when a run may be resumed."""
        view = self.grid.view
        return {
            "format": FORMAT,
            "slide": self.slide.identity,
            "resolution": view.resolution_json,
            "units": view.units,
            "level": view.level,
            "scale": list(view.scale_xy),
            "patch_shape": list(self.grid.shape_yx),
            "stride": list(self.grid.stride_yx),
            "patches": len(self.grid),
            "coordinates": self.grid.digest,
            "encoder": self.encoder.describe(),
            "dimension": self.dim,
            "dtype": str(self.dtype),
            "block_size": self.options.block_size,
        }

    def describe(self) -> dict[str, Any]:
        """What a store says of its content, as JSON values."""
        slide, view = self.slide, self.grid.view
        return {
            "slide": {
                "url": slide.url,
                "dimensions": list(slide.dimensions),
                "mpp": None if slide.mpp is None else list(slide.mpp),
                "power": slide.power,
                "vendor": slide.vendor,
                "notes": list(slide.notes),
            },
            "patches": {
                "shape": list(self.grid.shape_yx),
                "stride": list(self.grid.stride_yx),
                "resolution": view.resolution_json,
                "units": view.units,
                "level": view.level,
                "read_scale": list(view.scale_xy),
                "slide_size": list(view.size_xy),
            },
            "encoder": {
                **self.encoder.describe(),
                "weights": self.encoder.weights,
                "dimension": self.dim,
                "dtype": str(self.dtype),
            },
        }


def differences(stored: dict[str, Any], planned: dict[str, Any]) -> list[str]:
    """Name the fields in which two fingerprints differ, with both values."""
    found = []
    for name in [*planned, *sorted(stored.keys() - planned.keys())]:
        old, new = stored.get(name), planned.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += [f"{name} {line}" for line in differences(old, new)]
        elif old != new:
            found.append(f"{name}: stored {short(old)}, asked {short(new)}")
    return found


def short(value: Any) -> str:
    """Give a value for a message; of a digest, its beginning."""
    text = str(value)
    return f"{text[:12]}…" if len(text) > 30 and isinstance(value, str) else text


@dataclass(frozen=True, eq=False)
class BlockWork:
    """What a task needs to make any block of a plan from its grid steps: small, and the same for each."""

    slide: Slide
    grid: PatchGrid
    """Without its steps, which each task brings for its own block."""
    encoder: EncoderSpec | None
    """None: the pixels themselves are wanted."""
    dim: int
    """Width of the features that were planned."""
    options: Options
    """How."""

    @classmethod
    def of(cls, slide: Slide, grid: PatchGrid, encoder: EncoderSpec | None, dim: int, options: Options) -> BlockWork:
        """Take what tasks need of a plan."""
        bare = PatchGrid(grid.shape_yx, grid.stride_yx, grid.view, grid.steps_xy[:0])
        return cls(slide, bare, encoder, dim, options)

    def origins(self, steps_xy: NDArray[Any]) -> NDArray[np.int64]:
        """Top left corners of a block's patches."""
        return self.grid.origins(steps_xy)

    def __reduce__(self) -> tuple[Any, ...]:
        # Values without field names: every task carries this, and a task is to stay below 4 kB.
        view, options = (tuple(getattr(part, f.name) for f in fields(part)) for part in (self.grid.view, self.options))
        encoder = self.encoder and self.encoder.values()
        return _restored, (self.slide, self.grid.shape_yx, self.grid.stride_yx, view, encoder, self.dim, options)

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        grid = self.grid
        return (
            "dfx.BlockWork",
            self.slide.__dask_tokenize__(),
            grid.shape_yx,
            grid.stride_yx,
            grid.view,
            self.encoder,
            self.options,
        )


def _restored(
    slide: Slide,
    shape_yx: tuple[int, int],
    stride_yx: tuple[int, int],
    view: tuple[Any, ...],
    encoder: tuple[Any, ...] | None,
    dim: int,
    options: tuple[Any, ...],
) -> BlockWork:
    grid = PatchGrid(shape_yx, stride_yx, View(*view), np.empty((0, 2), np.uint16))
    return BlockWork(slide, grid, EncoderSpec(*encoder) if encoder else None, dim, Options(*options))
