"""Planning a slide, as a task on a worker: opened, laid out, its store made, its blocks' tasks built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import dask.array as da
import numpy as np
from numpy.typing import NDArray

from dfx import arrays, cluster, memory
from dfx.encoders import Behaviour, EncoderSpec
from dfx.errors import MemoryShortage, SlideError, StoreError
from dfx.grid import PatchGrid
from dfx.masks import Origin
from dfx.plan import Options, Plan
from dfx.resolution import Units
from dfx.run.item import Item
from dfx.store import Place, Store

Expected: TypeAlias = Mapping[tuple[int, int], tuple[Behaviour | None, ...]]
"""By shape of the patches: what each encoder must give for synthetic patches; None: the first slide's plan decides."""


@dataclass(frozen=True)
class GridOptions:
    """Where the patches of every slide of a run lie; see `PatchGrid.over`."""

    shape: int | tuple[int, int]
    """Rows and columns of a patch."""
    resolution: float | tuple[float, float]
    """At which patches are made."""
    units: Units
    """Units of the resolution."""
    stride: int | tuple[int, int] | None = None
    """Rows and columns between patches; None: the shape."""
    min_mask_ratio: float = 0.0
    """Share of a patch that must be above this under the mask."""
    mask_origin: Origin | None = None
    """Which corner masks begin at, of slides with bounds."""


@dataclass(frozen=True, eq=False)
class Planned:
    """A slide's patches are known, and how many of them are there from an earlier run.

    No slide is in it: the process that directs a run opens none.
    """

    item: Item
    """Which slide."""
    patches: int
    """How many there are."""
    done: int
    """How many of them are there already."""
    block_size: int
    """Patches in a block."""
    todo: tuple[int, ...]
    """Blocks that are to be made."""
    tasks: arrays.Tasks
    """What makes each block: it writes the block, or gives it."""
    names: tuple[str, ...]
    """Of the encoders."""
    dims: tuple[int, ...]
    """Width of each one's features."""
    dtypes: tuple[np.dtype[Any], ...]
    """And their data types."""
    pixels_yx: tuple[int, int]
    """Rows and columns of a patch as the encoders get it."""
    behaviours: tuple[Behaviour | None, ...]
    """Behaviour of each encoder in the process that planned the slide; None: not measured."""
    projected: int
    """Bytes that a worker of the cluster takes for it."""
    place: Place | None = None
    """The store where blocks are written; None: they are given."""
    coordinates: NDArray[np.int64] | None = None
    """Of the patches, where there is no store."""
    doubt: str = ""
    """Why features that are kept might be those of other pixels; see `Store.doubt`."""
    mpp: float | None = None
    """About how many microns a pixel of the patches has; None: unknown."""

    def rows(self, block: int) -> slice:
        """The rows of a block."""
        start = block * self.block_size
        return slice(start, min(start + self.block_size, self.patches))

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self.tasks.keys)

    @property
    def nbytes(self) -> int:
        """Bytes of features and coordinates."""
        a_patch = sum(dim * dtype.itemsize for dim, dtype in zip(self.dims, self.dtypes, strict=True))
        return self.patches * (a_patch + 32)


@dataclass(frozen=True, eq=False)
class Request:
    """What is to be planned."""

    item: Item
    """The slide."""
    encoders: tuple[EncoderSpec, ...]
    """With what."""
    where: GridOptions
    """Where."""
    options: Options
    """How."""
    place: Place | None
    """Where the store is to be; None: blocks come back."""
    overwrite: bool
    """Whether a store of another plan is replaced."""
    expected: Expected = field(default_factory=dict)
    """Behaviours that the encoders must have on the worker that plans."""

    def __call__(self) -> Planned:
        """Plan the slide; raises `DfxError`, of which `WorkerMismatch` is this worker's fault."""
        plan = self.plan()
        threads = cluster.task_threads() or 1
        check_room(plan, self.options.memory_threshold, cluster.memory_limit())
        plan = arrays.measured(plan, self.options.device, cluster.task_threads())  # builds the encoders
        for head, expected in zip(plan.heads, self.expected.get(plan.grid.pixels_yx, ()), strict=False):
            if expected is not None and head.behaviour is not None:
                cluster.check_same(head.name, expected, head.behaviour)
        if self.place is None:
            tasks, todo, coordinates = arrays.Tasks.of(arrays.lazy_features(plan)), None, plan.grid.coordinates
            doubt = ""
        else:
            coordinates = None
            try:
                store = Store.prepare(self.place, plan, self.item.label, overwrite=self.overwrite)
            except OSError as e:
                raise StoreError(f"{self.place} can't be written ({e}): check the disk and its permissions.") from e
            lazy = arrays.written(arrays.lazy_features(plan, store.place), store.target) if len(plan.grid) else None
            tasks = arrays.Tasks.of(da.empty((0,)) if lazy is None else lazy)
            todo, doubt = store.missing(), store.doubt
        blocks = list(range(plan.blocks)) if todo is None else todo
        left = sum(rows.stop - rows.start for rows in map(plan.rows, blocks))
        return Planned(
            item=self.item,
            patches=len(plan.grid),
            done=len(plan.grid) - left,
            block_size=self.options.block_size,
            todo=tuple(blocks),
            tasks=tasks,
            names=tuple(head.name for head in plan.heads),
            dims=tuple(head.dim for head in plan.heads),
            dtypes=tuple(head.dtype for head in plan.heads),
            pixels_yx=plan.grid.pixels_yx,
            behaviours=tuple(head.behaviour for head in plan.heads),
            projected=plan.projected(threads),
            place=self.place,
            coordinates=coordinates,
            doubt=doubt if len(blocks) < plan.blocks else "",
            mpp=plan.mpp,
        )

    def plan(self) -> Plan:
        """Open the slide, lay its grid, and find the shape of its features."""
        where = self.where
        try:
            slide = self.item.open()
            grid = PatchGrid.over(
                slide,
                shape=where.shape,
                resolution=where.resolution,
                units=where.units,
                stride=where.stride,
                mask=self.item.mask,
                min_mask_ratio=where.min_mask_ratio,
                mask_origin=where.mask_origin,
                storage_options=self.item.storage_options,
            )
        except OSError as e:
            raise SlideError(f"{self.item.address} can't be read ({e}): check the disk and the file.") from e
        return arrays.make_plan(slide, grid, self.encoders, self.options)


def check_room(plan: Plan, threshold: float | None, limit: int | None) -> None:
    """Refuse what a worker has no memory for, even one block at a time and a patch a batch."""
    if threshold is None or not len(plan.grid):
        return
    least = plan.needs.of_worker(1, 1)
    most = (limit or memory.allowed()) * memory.HARD // 100
    if least > most:
        raise MemoryShortage(
            f"{plan.slide.url} takes {least / 2**20:,.0f} MB with one thread and one patch a batch "
            f"({plan.needs.shared / 2**20:,.0f} MB for weights and tiles, {plan.needs.of_thread(1) / 2**20:,.0f} MB a "
            f"thread), but workers may take {most / 2**20:,.0f} MB: "
            "give them more memory, or use a smaller block_size, patch or encoder."
        )
