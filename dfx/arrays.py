"""The lazy arrays: patches and features of a slide; a level's is `Slide.level`.

A task carries its own block's grid positions (1 kB) and the slide's address; a worker opens the
slide and builds the encoder once for many tasks. No pixel passes through the scheduler.
"""

from __future__ import annotations

import pickle
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import dask
import dask.array as da
import numpy as np
import zarr
from dask import core
from dask._task_spec import Alias, GraphNode
from dask._task_spec import Task as GraphTask
from dask.base import tokenize
from dask.typing import Key
from numpy.typing import NDArray

from dfx import cluster, kernel, memory
from dfx.encoders import EncoderLike, EncoderSpec, footprint, load_encoder, measure, output, unusual_mpp
from dfx.errors import CallError, CallTypeError, StoreError
from dfx.grid import PatchGrid
from dfx.plan import BlockWork, Head, Options, Plan, head_names
from dfx.slides import Slide
from dfx.store import Columns, Place, write_note


def patches(
    slide: Slide, grid: PatchGrid, *, block_size: int = 256, reading: Literal["exact", "fast"] = "exact"
) -> da.Array:
    """Give a grid's patches as a lazy uint8 array (N, rows, columns, 3), `block_size` patches a chunk.

    Row i is the patch at `grid.coordinates[i]`. Raises `SlideError` when the slide's channels are
    no colours. `reading`: see `Options`.
    """
    options = Options(block_size=block_size, reading=reading)
    check_pair(slide, grid)
    slide.check_picture(grid.view.level)
    work = BlockWork.of(slide, grid, (), options)
    return map_steps(read_task, work, grid, (*grid.pixels_yx, 3), np.dtype(np.uint8), "patches")


def features(
    slide: Slide,
    grid: PatchGrid,
    encoder: EncoderLike,
    *,
    block_size: int = 256,
    batch_size: int = 64,
    device: str = "auto",
    reading: Literal["exact", "fast"] = "exact",
) -> da.Array:
    """Give a grid's features as a lazy array (N, D): row i belongs to `grid.coordinates[i]`.

    `encoder`: what `load_encoder` takes or gives. A module is handed to the workers of the current Dask client now. It
    also runs here, on the CPU, on synthetic patches: a worker on which it gives other features raises `WorkerMismatch`
    rather than give them. A named encoder is not built here, so workers check the digest of its weights alone. Warns
    where patches are far from the resolution that a named encoder was trained at. Raises as `load_encoder` does,
    `EncoderError` for a module that fails, and `SlideError` when the slide is no picture.
    """
    options = Options(block_size=block_size, batch_size=batch_size, device=device, reading=reading)
    spec = load_encoder(encoder)
    plan = make_plan(slide, grid, [spec], options)
    if spec.named and (unusual := unusual_mpp(spec.name, plan.mpp)):
        warnings.warn(f"{slide.url}: {unusual}", UserWarning, stacklevel=2)
    cluster.share(spec)
    return lazy_features(replace(plan, heads=measured_modules(plan.heads, grid.pixels_yx)))


def check_pair(slide: object, grid: object) -> None:
    """Refuse what is no slide or no grid, and a grid of another slide, whose positions would mean other places."""
    if not isinstance(slide, Slide) or not isinstance(grid, PatchGrid):
        raise CallTypeError(
            f"a Slide and its PatchGrid are needed, not {type(slide).__name__} and {type(grid).__name__}."
        )
    if grid.slide != slide.identity:
        raise CallError(f"the grid was made for another slide than {slide.url}: use PatchGrid.over(this slide, ...).")


def make_plan(slide: Slide, grid: PatchGrid, encoders: Sequence[EncoderSpec], options: Options) -> Plan:
    """Plan a slide: check that its patches can be made, and find what the encoders give for them."""
    check_pair(slide, grid)
    slide.check_picture(grid.view.level)
    return Plan(slide, grid, make_heads(encoders, grid.pixels_yx), options)


def measured(plan: Plan, device: str, threads: int | None = None) -> Plan:
    """Run a plan's encoders on synthetic patches in this process; raises `EncoderError`.

    A slide without patches has no features to compare, and its encoders are not built.
    """
    if not len(plan.grid):
        return plan
    shape = plan.grid.pixels_yx
    heads = (replace(h, behaviour=measure(h.encoder, device, shape, threads=threads)) for h in plan.heads)
    return replace(plan, heads=tuple(heads))


def measured_modules(heads: Sequence[Head], shape_yx: tuple[int, int], channels: int = 3) -> tuple[Head, ...]:
    """Run the given modules among encoders on synthetic patches in this process, which has them, on the CPU."""
    return tuple(
        h if h.encoder.named else replace(h, behaviour=measure(h.encoder, "cpu", shape_yx, channels)) for h in heads
    )


def make_heads(encoders: Sequence[EncoderSpec], shape_yx: tuple[int, int], channels: int = 3) -> tuple[Head, ...]:
    """Find what each encoder gives for patches of a shape."""
    names = head_names(encoders)
    return tuple(
        Head(name, encoder, *output(encoder, shape_yx, channels), *footprint(encoder, shape_yx, channels))
        for name, encoder in zip(names, encoders, strict=True)
    )


def lazy_features(plan: Plan, notes: Place | None = None) -> da.Array:
    """Give a plan's features as a lazy array, several encoders' side by side.

    A given module is to be shared with the workers before it is computed. `notes`: the store in which a
    block notes its seconds, tiles that it could not decode, and a batch that it had to halve.
    """
    work = BlockWork.of(plan.slide, plan.grid, plan.heads, plan.options)
    work = replace(work, needs=plan.needs, notes=notes)
    return map_steps(encode_task, work, plan.grid, plan.shape[1:], plan.dtype, "features")


class Task:
    """A function with its work bound, which Dask takes as one opaque callable.

    It unpickles its work when it is called: a scheduler or client that only passes it on opens no slide.
    """

    def __init__(self, function: Callable[[NDArray[Any], BlockWork], NDArray[Any]], work: BlockWork | bytes) -> None:
        self.function = function
        self.work = work

    def __call__(self, steps_xy: NDArray[Any]) -> NDArray[Any]:
        """Do a block."""
        if isinstance(self.work, bytes):
            self.work = pickle.loads(zlib.decompress(self.work))
        return self.function(steps_xy, self.work)  # type: ignore[arg-type]

    def __reduce__(self) -> tuple[Any, ...]:
        work = self.work if isinstance(self.work, bytes) else zlib.compress(pickle.dumps(self.work))
        return Task, (self.function, work)

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        work = self.work if isinstance(self.work, bytes) else self.work.__dask_tokenize__()
        return self.function.__name__, work


class Stopwatch:
    """A meter that also keeps the seconds of each stage."""

    def __init__(self, meter: kernel.Meter) -> None:
        self._meter = meter
        self.seconds: dict[str, float] = {}
        """Of each stage, in all."""

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a stage."""
        name, start = stage.removeprefix("dfx-"), time.perf_counter()
        with self._meter(stage):
            yield
        self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - start, 6)


def read_task(steps_xy: NDArray[Any], work: BlockWork) -> NDArray[np.uint8]:
    """Read a block on a worker."""
    return kernel.read_block(steps_xy, work, meter=cluster.meter)


def encode_task(steps_xy: NDArray[Any], work: BlockWork) -> NDArray[np.floating[Any]]:
    """Read and encode a block on a worker, when there is room for it."""
    options, threads = work.options, cluster.task_threads()
    if options.memory_threshold is None:
        cluster.check_encoders(work.heads, options.device, threads)
        return kernel.encode_block(steps_xy, work, threads=threads, meter=cluster.meter)
    key = tuple(head.encoder for head in work.heads)
    limit, asked = cluster.memory_limit(), min(options.batch_size, len(steps_xy))
    damaged: set[str] = set()
    timed = Stopwatch(cluster.meter)
    with memory.GUARD.admit(key, work.needs, asked, options.memory_threshold, limit) as (batch, tell):
        if batch < asked:
            work = replace(work, options=replace(options, batch_size=batch))
        cluster.check_encoders(work.heads, options.device, threads)
        found = kernel.encode_block(steps_xy, work, threads=threads, meter=timed, damaged=damaged, tell=tell)
    if work.notes is not None:
        said: dict[str, Any] = {"seconds": timed.seconds, "damaged_tiles": sorted(damaged)}
        said |= {"batch_size": batch} if batch < asked else {}
        write_note(work.notes, "-".join(map(str, steps_xy[0].tolist())), said)
    return found


def map_steps(
    function: Callable[[NDArray[Any], BlockWork], NDArray[Any]],
    work: BlockWork,
    grid: PatchGrid,
    row_shape: tuple[int, ...],
    dtype: np.dtype[Any],
    name: str,
) -> da.Array:
    """Map a function over the blocks of a grid's positions: (n, 2) -> (n, *row_shape)."""
    if da.array_expr_enabled():
        raise CallError("Dask's 'array.query-planning' is on, which has no to_zarr yet: set it to False.")
    task = Task(function, work)
    token = tokenize(task, grid.steps_xy)
    if len(grid) == 0:
        return da.empty((0, *row_shape), dtype=dtype, chunks=(1, *row_shape), name=f"{name}-{token}")
    steps = da.from_array(grid.steps_xy, chunks=(work.options.block_size, 2), name=f"steps-{token}")
    return da.map_blocks(
        task,
        steps,
        chunks=(steps.chunks[0], *((size,) for size in row_shape)),
        new_axis=list(range(2, len(row_shape) + 1)) or None,
        dtype=dtype,
        meta=np.empty((0,) * (len(row_shape) + 1), dtype),
        name=f"{name}-{token}",
    )


@dataclass(frozen=True, eq=False)
class Tasks:
    """What makes each block of a lazy array by itself, in the order of the blocks.

    Slicing the array for every few blocks would send the graph of all to the scheduler each time.
    """

    keys: tuple[Key, ...]
    """Of each block's last task."""
    graph: Mapping[Key, GraphNode]
    """All tasks of all blocks."""

    @classmethod
    def of(cls, lazy: da.Array) -> Tasks:
        """Optimise a lazy array: reading, encoding and writing a block become one task."""
        (optimised,) = dask.optimize(lazy)
        graph = dict(optimised.__dask_graph__())
        keys = []
        for key in core.flatten(optimised.__dask_keys__()):
            while isinstance(node := graph[key], Alias):  # a task of its own to the scheduler
                key = node.target
            keys.append(key)
        return cls(tuple(keys), graph)

    def part(self, blocks: Mapping[int, Key]) -> dict[Key, GraphNode]:
        """Give what makes some blocks, each under a key, and nothing more."""
        found: dict[Key, GraphNode] = {}
        for block, name in blocks.items():
            task = self.graph[self.keys[block]]
            assert isinstance(task, GraphTask)
            found[name] = task if task.key == name else GraphTask(name, task.func, *task.args, **task.kwargs)
            wanted = list(task.dependencies)
            while wanted:
                key = wanted.pop()
                if key not in found:
                    found[key] = self.graph[key]
                    wanted += self.graph[key].dependencies
        return found


def written(array: da.Array, target: zarr.Array[Any] | Columns) -> da.Array:
    """Give a lazy array whose blocks, computed, write those of `array` to `target`, one chunk each.

    One block is one chunk exactly: a chunk shared by two tasks would lose updates (dask#12583).
    """
    rows, chunk = array.chunks[0], target.chunks[0]
    aligned = array.shape == target.shape == (array.shape[0], target.chunks[1]) and array.numblocks[1] == 1
    if not aligned or any(n != chunk for n in rows[:-1]) or rows[-1] > chunk:
        raise StoreError(
            f"blocks of {array.chunksize} in {array.shape} don't match chunks of {target.chunks} in {target.shape}: "
            f"use block_size={chunk}."
        )
    if isinstance(target, Columns):
        lazy: da.Array = da.store(array, target, lock=False, compute=False)
        return lazy
    nbytes = int(np.prod(target.chunks)) * target.dtype.itemsize
    # to_zarr rechunks to multiples of the chunk up to array.chunk-size; at one chunk it leaves blocks alone.
    with dask.config.set({"array.chunk-size": nbytes}):
        lazy = da.to_zarr(array, target, compute=False)
    if lazy.numblocks[0] != array.numblocks[0]:
        raise StoreError(
            f"Dask made {lazy.numblocks[0]} writes of {array.numblocks[0]} blocks: report this with your dask version."
        )
    return lazy
