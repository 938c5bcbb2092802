"""Everything that will happen to a slide, known before anything is computed. Pure."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dfx.encoders import Behaviour, EncoderSpec
from dfx.errors import CallError, CallTypeError
from dfx.grid import PatchGrid
from dfx.reader import working_memory
from dfx.resolution import View
from dfx.slides import Slide
from dfx.slides.cache import TILES

FLOAT = 4
"""Bytes of a float32."""
LIBRARIES = 80 * 2**20
"""Bytes that torch's own libraries take when a network first runs (measured: 60 to 100 MB)."""
KEPT_A_THREAD = 64 * 2**20
"""Bytes of freed activations that the allocator keeps for each thread (measured; glibc gives back at once only
what is above 32 MB)."""
FORMAT = 1
"""Version of the store's layout; a store of another is not resumed."""


@dataclass(frozen=True)
class Options:
    """How the work is done. Only `block_size` (chunks) and `reading` change what is stored beyond rounding."""

    block_size: int = 256
    """Patches in a block: one Dask block, one zarr chunk, one unit of work and resume."""
    batch_size: int = 64
    """Patches that the network takes at a time."""
    device: str = "auto"
    """Torch device on the workers; "auto" is the GPU where there is one."""
    reading: Literal["exact", "fast"] = "exact"
    """"fast": JPEG tiles are shrunk while they are decoded where patches are shrunk by an even factor.

    At 2x, tissue then differs from exact reading by 1.3 grey levels on average and by up to 33 on slides with
    subsampled chroma (4:2:0), by 0.2 to 0.5 and up to 19 on others (one real slide, see benchmarks/RESULTS.md).
    """
    on_bad_tile: Literal["fail", "fill"] = "fail"
    """"fill": a tile that can't be decoded is white, and its name goes to the store; "fail": the slide fails."""
    memory_threshold: float | None = None
    """Percent of a worker's memory above which batches are halved and blocks wait; None: whatever is free."""
    allow_nondeterministic: bool = False
    """Whether a half-done store may be resumed with an encoder whose features differ from run to run."""

    def __post_init__(self) -> None:
        for name in ("block_size", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise CallTypeError(f"{name} must be a whole number of patches, not {value!r}.")
            if not 1 <= value < 2**24:
                raise CallError(f"{name} must be at least 1 patch and below {2**24}, not {value}.")
            object.__setattr__(self, name, int(value))  # numpy's integers are no JSON
        if self.reading not in ("exact", "fast"):
            raise CallError(f"reading must be 'exact' or 'fast', not {self.reading!r}.")
        if self.on_bad_tile not in ("fail", "fill"):
            raise CallError(f"on_bad_tile must be 'fail' or 'fill', not {self.on_bad_tile!r}.")
        if self.fast and importlib.util.find_spec("simplejpeg") is None:
            raise CallError("reading='fast' needs simplejpeg: pip install dfx[fast], here and on the workers.")

    @property
    def fast(self) -> bool:
        """Whether `reading` is "fast"."""
        return self.reading == "fast"


@dataclass(frozen=True)
class Head:
    """One encoder of a plan, and what it gives."""

    name: str
    """Its name, unique in the plan."""
    encoder: EncoderSpec
    """The encoder."""
    dim: int
    """Width of a feature vector."""
    dtype: np.dtype[Any]
    """Its data type."""
    weights: int = 0
    """Bytes of its parameters."""
    activations: int = 0
    """Bytes a patch while it computes."""
    behaviour: Behaviour | None = None
    """Its behaviour on synthetic patches in the process that planned; None: not measured."""


@dataclass(frozen=True)
class Needs:
    """Bytes that a worker takes for a plan's blocks beyond what it has, on a CPU."""

    shared: int = 0
    """By all of its threads together."""
    shared_a_patch: int = 0
    """And for each patch of a batch."""
    a_thread: int = 0
    """By each thread."""
    a_thread_a_patch: int = 0
    """And for each patch of a batch."""

    def of_thread(self, batch: int) -> int:
        """Bytes of one thread more."""
        return self.a_thread + self.a_thread_a_patch * batch

    def of_worker(self, threads: int, batch: int) -> int:
        """Bytes of a worker."""
        return self.shared + self.shared_a_patch * batch + threads * self.of_thread(batch)


@dataclass(frozen=True, eq=False)
class Plan:
    """A slide, its grid and its encoders, and so the shape of what comes out."""

    slide: Slide
    """What is read."""
    grid: PatchGrid
    """Where."""
    heads: tuple[Head, ...]
    """With what."""
    options: Options
    """How."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D) of the features of all encoders side by side."""
        return len(self.grid), sum(head.dim for head in self.heads)

    @property
    def dtype(self) -> np.dtype[Any]:
        """A data type that holds the features of all encoders."""
        return np.result_type(*(head.dtype for head in self.heads))

    def split(self, features: NDArray[Any]) -> list[NDArray[Any]]:
        """Take the features of each encoder out of those of all."""
        edges = np.cumsum([head.dim for head in self.heads])
        parts = np.split(features, edges[:-1], axis=1)
        return [part.astype(head.dtype, copy=False) for part, head in zip(parts, self.heads, strict=True)]

    @property
    def mpp(self) -> float | None:
        """About how many microns a pixel of the patches has; None where the slide does not say.

        10 / objective power where that is all it says: near enough for a warning, and for nothing else.
        """
        mpp = self.slide.mpp or (None if self.slide.power is None else (10 / self.slide.power,) * 2)
        if mpp is None:
            return None
        grid = self.grid
        scale = (size / pixels for size, pixels in zip(grid.shape_yx[::-1], grid.pixels_yx[::-1], strict=True))
        return sum(one * factor * by for one, factor, by in zip(mpp, grid.view.to_baseline, scale, strict=True)) / 2

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
        return len(self.grid) * (sum(head.dim * head.dtype.itemsize for head in self.heads) + 32)

    @property
    def batch(self) -> int:
        """Patches of the largest batch."""
        return max(1, min(self.options.batch_size, len(self.grid), self.options.block_size))

    @property
    def needs(self) -> Needs:
        """Memory that the work takes.

        For each thread its tiles, patches, floats and features, and what the allocator keeps for it;
        for all of them the tiles that are kept for neighbours, the encoders' weights, the activations
        of the one that computes, and torch's libraries.
        """
        if not len(self.grid):
            return Needs()
        origins = self.grid.origins(self.grid.steps_xy[: self.batch])
        pixels = math.prod(self.grid.pixels_yx)
        sizes = [math.prod(h.encoder.resize or h.encoder.input_size or self.grid.pixels_yx) for h in self.heads]
        resized = max((size for size in sizes if size != pixels), default=0)
        activations = max((head.activations for head in self.heads), default=0)
        level = self.slide.levels[self.grid.view.level]
        tiles = min(TILES.most, math.prod(level.shape_yx) * 3)
        return Needs(
            shared=tiles + self.slide.kept + sum(head.weights for head in self.heads) + LIBRARIES,
            shared_a_patch=activations,
            a_thread=working_memory(self.slide, self.grid.view, origins, self.grid.shape_yx, self.grid.pixels_yx)
            + min(self.options.block_size, len(self.grid)) * self.shape[1] * self.dtype.itemsize
            + min(KEPT_A_THREAD, self.batch * activations),
            a_thread_a_patch=3 * (pixels + (pixels + resized) * FLOAT),
        )

    def projected(self, threads: int) -> int:
        """Bytes that a worker of `threads` threads takes beyond what it has, on a CPU."""
        return self.needs.of_worker(threads, self.batch) if len(self.grid) else 0

    @property
    def _pixels(self) -> dict[str, list[int]]:
        return {} if self.grid.resampled_yx is None else {"pixels": list(self.grid.resampled_yx)}

    def fingerprint(self) -> dict[str, Any]:
        """Give the facts on which the stored features depend, as JSON values that must be equal if a run is resumed.

        `dfx.store.fingerprint` compares them, and the behaviour of the encoders.
        """
        slide, view = self.slide, self.grid.view
        return {
            "format": FORMAT,
            "slide": slide.identity,
            "resolution": view.resolution_json,
            "units": view.units,
            "level": view.level,
            "scale": list(view.scale_xy),
            **({} if view.downsample_xy is None else {"downsample": list(view.downsample_xy)}),
            "patch_shape": list(self.grid.shape_yx),
            "stride": list(self.grid.stride_yx),
            **self._pixels,
            "patches": len(self.grid),
            "coordinates": self.grid.digest,
            **describe_heads(self.heads, weights=False),
            "block_size": self.options.block_size,
            "reading": self.options.reading,
            **({} if slide.backend == "tiff" else {"backend": slide.backend}),
        }

    def describe(self) -> dict[str, Any]:
        """What a store says of its content, as JSON values."""
        slide, view = self.slide, self.grid.view
        return {
            "slide": {
                "url": slide.url,
                "file_version": slide.source.version,
                "checksum": slide.checksum,
                "dimensions": list(slide.dimensions),
                "mpp": None if slide.mpp is None else list(slide.mpp),
                "power": slide.power,
                "vendor": slide.vendor,
                "backend": slide.backend,
                "notes": list(slide.notes),
            },
            "patches": {
                "shape": list(self.grid.shape_yx),
                "stride": list(self.grid.stride_yx),
                **self._pixels,
                "resolution": view.resolution_json,
                "units": view.units,
                "level": view.level,
                "read_scale": list(view.read_scale_xy),
                "slide_size": list(view.size_xy),
                "reading": self.options.reading,
            },
            **describe_heads(self.heads),
        }


def describe_heads(heads: Sequence[Head], *, weights: bool = True) -> dict[str, Any]:
    """Describe encoders for a store: "encoder", or "encoders" by name where there are several.

    `weights`: also the origin of the weights, on which features do not depend, and the measured behaviour, which is
    compared within a tolerance.
    """

    def describe(head: Head) -> dict[str, Any]:
        found = {**head.encoder.describe(), "dimension": head.dim, "dtype": str(head.dtype)}
        if weights:
            found["weights"] = head.encoder.weights
            if head.behaviour is not None:
                found["behaviour"] = head.behaviour.describe()
        return found

    if len(heads) == 1:
        return {"encoder": describe(heads[0])}
    return {"encoders": {head.name: describe(head) for head in heads}}


def head_names(encoders: Sequence[EncoderSpec]) -> list[str]:
    """Name encoders so that each can be a node of a store; raises `CallError` for a name that is given twice."""
    names: list[str] = []
    for n, encoder in enumerate(encoders):
        if encoder.named and encoder in encoders[:n]:
            raise CallError(f"encoder {encoder.name} is given twice: give it once.")
        name = stem = encoder.name.replace("/", "-")
        count = 1
        while name.casefold() in (taken.casefold() for taken in names):
            count += 1
            name = f"{stem}-{count}"
        names.append(name)
    return names


@dataclass(frozen=True, eq=False)
class BlockWork:
    """What a task needs to make any block of a plan from its grid steps: small, and the same for each."""

    slide: Slide
    grid: PatchGrid
    """Without its steps, which each task brings for its own block."""
    heads: tuple[Head, ...]
    """With what; none: the pixels themselves are wanted."""
    options: Options
    """How."""
    needs: Needs = Needs()
    """Memory that it takes."""
    notes: Any = None
    """Store that takes what is to be known of a block beside its features; None: nobody asks."""

    @classmethod
    def of(cls, slide: Slide, grid: PatchGrid, heads: tuple[Head, ...], options: Options) -> BlockWork:
        """Take what tasks need of a slide and its grid."""
        return cls(slide, replace(grid, steps_xy=grid.steps_xy[:0], slide="", mask=None), heads, options)

    def __reduce__(self) -> tuple[Any, ...]:
        # Values without field names: every task carries this, and a task is to stay below 4 kB.
        view, options = (tuple(getattr(part, f.name) for f in fields(part)) for part in (self.grid.view, self.options))
        heads = tuple(
            (h.name, h.encoder.values(), h.dim, str(h.dtype), None if h.behaviour is None else h.behaviour.expected())
            for h in self.heads
        )
        needs = tuple(getattr(self.needs, f.name) for f in fields(self.needs))
        grid = self.grid.shape_yx, self.grid.stride_yx, self.grid.resampled_yx, view
        return _restored, (self.slide, *grid, heads, options, needs, self.notes)

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        grid = self.grid
        heads = tuple((head.encoder, head.dim) for head in self.heads)
        place = (grid.shape_yx, grid.stride_yx, grid.resampled_yx, grid.view)
        return "dfx.BlockWork", self.slide.__dask_tokenize__(), *place, heads, self.options


def _restored(
    slide: Slide,
    shape_yx: tuple[int, int],
    stride_yx: tuple[int, int],
    resampled_yx: tuple[int, int] | None,
    view: tuple[Any, ...],
    heads: tuple[tuple[str, tuple[Any, ...], int, str, tuple[bytes, str, str] | None], ...],
    options: tuple[Any, ...],
    needs: tuple[int, ...],
    notes: Any,
) -> BlockWork:
    grid = PatchGrid(shape_yx, stride_yx, View(*view), np.empty((0, 2), np.uint16), resampled_yx=resampled_yx)
    made = tuple(
        Head(
            name,
            EncoderSpec(*values),
            dim,
            np.dtype(dtype),
            behaviour=None if expected is None else Behaviour(grid.pixels_yx, *expected),
        )
        for name, values, dim, dtype, expected in heads
    )
    return BlockWork(slide, grid, made, Options(*options), Needs(*needs), notes)
