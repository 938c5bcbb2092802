"""Many slides through one cluster: plan, open the store, submit blocks through the window, finish."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import dask.array as da
import distributed
import numpy as np
from numpy.typing import NDArray

from dfx import arrays, memory
from dfx.encoders import EncoderSpec
from dfx.errors import DfxError, RunError, SlideError, StoreError
from dfx.grid import PatchGrid
from dfx.plan import Options, Plan
from dfx.resolution import Units
from dfx.slides import Slide, open_slide
from dfx.store import Store, check_ours, open_features

log = logging.getLogger(__name__)

WINDOW = 3
"""Blocks submitted and unfinished, for each thread of the cluster."""


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


@dataclass(frozen=True)
class Item:
    """One slide of a run, as the user gave it."""

    given: Any
    """The key of the result."""
    slide: str | Path | Slide
    """What is opened, or is open already."""
    mask: Any = "tissue"
    """"tissue", None, an array or a path."""
    label: Any = None
    """Kept with the output."""
    mpp: float | tuple[float, float] | None = None
    """Goes before the file's."""
    power: float | None = None
    """Goes before the file's."""

    def open(self) -> Slide:
        """Open the slide; raises `SlideError`."""
        return self.slide if isinstance(self.slide, Slide) else open_slide(self.slide, mpp=self.mpp, power=self.power)

    @property
    def address(self) -> str:
        """Where the slide lies."""
        return self.slide.url if isinstance(self.slide, Slide) else str(Path(self.slide).absolute())


class RunResult(dict[Any, Any]):
    """Input (as given) -> its output, for each slide that is done."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: dict[Any, DfxError] = {}
        """Input -> what went wrong with it."""
        self.cache: Path | None = None
        """Temporary folder that lazy arrays read from; it goes with this result."""

    def make_cache(self) -> Path:
        """Give the temporary folder, made when first needed."""
        if self.cache is None:
            self.cache = Path(tempfile.mkdtemp(prefix="dfx-"))
            weakref.finalize(self, shutil.rmtree, self.cache, ignore_errors=True)
        return self.cache


# What the driver tells of


@dataclass(frozen=True)
class Planned:
    """A slide's patches are known, and how many of them are there from an earlier run."""

    item: Item
    plan: Plan
    done: int


@dataclass(frozen=True)
class BlockDone:
    """A block is computed (and written)."""

    item: Item
    patches: int


@dataclass(frozen=True)
class SlideDone:
    """A slide is complete."""

    item: Item
    output: Any


@dataclass(frozen=True)
class SlideFailed:
    """A slide can't be done; the others go on."""

    item: Item
    error: DfxError


Event: TypeAlias = Planned | BlockDone | SlideDone | SlideFailed


def run_slides(
    items: Sequence[Item],
    encoder: EncoderSpec,
    where: GridOptions,
    options: Options,
    client: distributed.Client,
    *,
    save_dir: Path | None,
    overwrite: bool = False,
    in_memory: bool = False,
    memory_threshold: float = 80,
    notify: Callable[[Event], None] = lambda event: None,
) -> RunResult:
    """Extract the features of many slides.

    `in_memory` gives `{"features", "coordinates"}` a slide, numpy while they fit under
    `memory_threshold` percent, else lazy arrays over a store in `save_dir` (or a temporary folder).
    Slides that fail are in `failures` of the result; nothing is raised for them.
    """
    result = RunResult()
    names = output_names(items)
    if save_dir is not None:
        for name in names.values():
            check_ours(save_dir / name)

    def jobs() -> Iterator[Job | SlideFailed]:
        for item in items:
            try:
                plan = make_plan(item, encoder, where, options)
                if in_memory and memory.fits(plan.nbytes, memory_threshold):
                    yield Job.in_memory(item, plan)
                else:
                    path = (save_dir or result.make_cache()) / names[item.given]
                    yield Job.on_disk(item, plan, path, overwrite=overwrite)
            except DfxError as e:
                yield SlideFailed(item, e)
            except Exception as e:  # one bad slide, whatever it raises, never ends a run
                log.exception("planning %s", item.address)
                yield SlideFailed(item, SlideError(f"{item.address} can't be planned ({type(e).__name__}: {e})."))

    for event in drive(client, jobs()):
        if isinstance(event, SlideDone):
            result[event.item.given] = in_arrays(event) if in_memory else event.output
        elif isinstance(event, SlideFailed):
            result.failures[event.item.given] = event.error
            log.warning("%s failed: %s", event.item.address, event.error)
        notify(event)
    return result


def make_plan(item: Item, encoder: EncoderSpec, where: GridOptions, options: Options) -> Plan:
    """Open a slide, lay its grid, and find the shape of its features."""
    slide = item.open()
    grid = PatchGrid.over(
        slide,
        shape=where.shape,
        resolution=where.resolution,
        units=where.units,
        stride=where.stride,
        mask=item.mask,
        min_mask_ratio=where.min_mask_ratio,
    )
    if len(grid) == 0:
        warnings.warn(f"{slide.url} has no patch under its mask: its features are empty.", UserWarning, stacklevel=2)
    return arrays.make_plan(slide, grid, encoder, options)


def in_arrays(event: SlideDone) -> dict[str, Any]:
    """Give a slide's output as arrays: in memory already, or lazy over its store."""
    if isinstance(event.output, dict):
        return event.output
    found = open_features(event.output)
    return {"features": found.features, "coordinates": found.coordinates} | labelled(event.item)


def labelled(item: Item) -> dict[str, Any]:
    """The item's label as part of a result."""
    return {} if item.label is None else {"labels": item.label}


def output_names(items: Sequence[Item]) -> dict[Any, str]:
    """Name each slide's store: its stem, with as much more as makes it unique in the run.

    A name depends on the inputs alone, never on their order, so that a second run finds the first's.
    """

    def names(item: Item) -> Iterator[str]:
        path = Path(item.address)
        digest = hashlib.sha256(f"{path} {item.mpp} {item.power}".encode()).hexdigest()[:8]
        ending = path.suffix.lstrip(".").lower()
        yield path.stem
        yield f"{path.stem}-{ending}"
        yield f"{path.stem}-{path.parent.name}"
        yield f"{path.stem}-{path.parent.name}-{ending}-{digest}"

    candidates = {item.given: list(names(item)) for item in items}
    chosen = {given: 0 for given in candidates}
    while True:
        groups: dict[str, list[Any]] = {}
        for given, n in chosen.items():
            groups.setdefault(candidates[given][n].casefold(), []).append(given)
        clashes = [group for group in groups.values() if len(group) > 1]
        movable = [given for group in clashes for given in group if chosen[given] + 1 < len(candidates[given])]
        if not movable:
            break
        for given in movable:
            chosen[given] += 1
    return {given: f"{candidates[given][n]}.zarr" for given, n in chosen.items()}


# The driver


@dataclass(eq=False)
class Job:
    """A planned slide on its way through the window."""

    item: Item
    plan: Plan
    lazy: da.Array
    """One block a task: it writes the block, or gives it."""
    todo: list[int]
    """Blocks not yet submitted, in order."""
    store: Store | None = None
    """Where blocks are written; None: they are kept."""
    kept: NDArray[Any] | None = None
    """Where blocks are kept."""
    unfinished: int = field(init=False)
    """Blocks not yet done."""
    failed: bool = False
    """Whether what comes back of it is to be ignored."""

    def __post_init__(self) -> None:
        self.unfinished = len(self.todo)

    @classmethod
    def in_memory(cls, item: Item, plan: Plan) -> Job:
        """Make a job whose features come back to this process."""
        lazy = arrays.lazy_features(plan)
        return cls(item, plan, lazy, list(range(len(plan.block_bounds))), kept=np.empty(plan.shape, plan.dtype))

    @classmethod
    def on_disk(cls, item: Item, plan: Plan, path: Path, *, overwrite: bool) -> Job:
        """Make a job whose features are written where they are made; blocks that are there are not made again."""
        try:
            store = Store.prepare(path, plan, item.label, overwrite=overwrite)
        except OSError as e:
            raise StoreError(f"{path} can't be written ({e}): check the disk and its permissions.") from e
        lazy = arrays.written(arrays.lazy_features(plan), store.features) if len(plan.grid) else da.empty((0,))
        return cls(item, plan, lazy, [] if store.complete else store.missing(), store=store)

    def take(self, most: int) -> list[int]:
        """Take the next run of neighbouring blocks, `most` at a time."""
        n = 1
        while n < min(most, len(self.todo)) and self.todo[n] == self.todo[0] + n:
            n += 1
        run, self.todo = self.todo[:n], self.todo[n:]
        return run

    def rows(self, block: int) -> slice:
        """The rows of a block."""
        return slice(*self.plan.block_bounds[block])

    def finish(self) -> SlideDone:
        """Close what is done."""
        if self.store is None:
            return SlideDone(
                self.item, {"features": self.kept, "coordinates": self.plan.grid.coordinates} | labelled(self.item)
            )
        if not self.store.complete:
            self.store.finish()
        return SlideDone(self.item, self.store.path)


def drive(client: distributed.Client, jobs: Iterable[Job | SlideFailed]) -> Iterator[Event]:
    """Send the blocks of many slides through one window of the cluster, and tell what happens.

    Slides are planned as the window has room, so no worker waits between two slides and neither
    this process nor the scheduler grows with the run.
    """
    waiting = iter(jobs)
    current: Job | None = None
    flying: dict[distributed.Future, tuple[Job, int]] = {}
    finished = distributed.as_completed(with_results=False, raise_errors=False, loop=client.loop)
    exhausted = False
    while True:
        window = WINDOW * max(1, sum(client.nthreads().values()))
        while not exhausted and len(flying) < window:
            if current is None or not current.todo or current.failed:
                following = next(waiting, None)
                if following is None:
                    exhausted = True
                elif isinstance(following, SlideFailed):
                    yield following
                else:
                    current = following
                    yield Planned(current.item, current.plan, len(current.plan.grid) - remaining(current))
                    if not current.todo:
                        yield current.finish()
                continue
            for block, future in submit(
                client, current, current.take(max(1, min(window - len(flying), window // WINDOW)))
            ):
                flying[future] = (current, block)
                finished.add(future)
        if not flying:
            return
        future = next(finished)
        job, block = flying.pop(future)
        if job.failed:
            continue
        rows = job.rows(block)
        error = failure(future, job, block)
        if error is not None:
            job.failed = True
            for other in [f for f, (owner, _) in flying.items() if owner is job]:
                other.cancel()
            yield give_up(job, error)
            continue
        if job.kept is not None:
            job.kept[rows] = future.result()
        job.unfinished -= 1
        yield BlockDone(job.item, rows.stop - rows.start)
        if not job.unfinished:
            yield job.finish()


def remaining(job: Job) -> int:
    """Patches of a job that are still to be made."""
    return sum(job.rows(block).stop - job.rows(block).start for block in job.todo)


def submit(client: distributed.Client, job: Job, blocks: list[int]) -> list[tuple[int, distributed.Future]]:
    """Start a run of neighbouring blocks; gives (block, future)."""
    held = client.persist(job.lazy.blocks[blocks[0] : blocks[-1] + 1])
    futures = {future.key: future for future in distributed.futures_of(held)}
    keys = np.array(held.__dask_keys__(), dtype=object).reshape(len(blocks), -1, len(held.shape) + 1)
    return [(block, futures[tuple(key[0])]) for block, key in zip(blocks, keys, strict=True)]


def failure(future: distributed.Future, job: Job, block: int) -> DfxError | None:
    """What went wrong with a block, None when it is done."""
    if future.status == "finished":
        return None
    where = f"block {block} of {job.plan.slide.url}"
    if future.status != "error":
        return SlideError(f"{where} was {future.status} by the cluster: run again to resume.")
    error = future.exception()
    if isinstance(error, DfxError):
        return error
    if isinstance(error, OSError):
        return StoreError(f"{where} can't be written ({error}): check the disk and run again to resume.")
    return SlideError(f"{where} failed ({type(error).__name__}: {error}); run again to resume.")


def give_up(job: Job, error: DfxError) -> SlideFailed:
    """Note a failure where the slide's output is."""
    if job.store is not None:
        try:
            job.store.fail(str(error))
        except OSError as e:  # the disk that failed the block
            log.warning("%s can't note its failure: %s", job.store.path, e)
    return SlideFailed(job.item, error)


def raise_failures(result: RunResult, on_error: Literal["raise", "skip"]) -> RunResult:
    """Give the result, or raise one `RunError` that lists what failed."""
    if not result.failures or on_error == "skip":
        return result
    lines = [f"  {error}" for error in result.failures.values()]  # each names its slide or store
    count = f"{len(lines)} of {len(lines) + len(result)} slides failed, the others are done"
    raise RunError("\n".join([f"{count}:", *lines]), result)
