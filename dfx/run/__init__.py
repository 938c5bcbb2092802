"""Many slides through one cluster: plan, open the store, submit blocks through the window, finish."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import distributed

from dfx import arrays, cluster, memory
from dfx.encoders import EncoderSpec
from dfx.errors import DfxError, RunError, SlideError
from dfx.grid import PatchGrid
from dfx.plan import Options, Plan
from dfx.resolution import Units
from dfx.run.driver import drive
from dfx.run.job import BlockDone, Event, Item, Job, Planned, SlideDone, SlideFailed, labelled, one_or_named
from dfx.store import check_ours, open_features

__all__ = [
    "BlockDone",
    "Event",
    "GridOptions",
    "Item",
    "Planned",
    "RunResult",
    "SlideDone",
    "SlideFailed",
    "one_or_named",
    "raise_failures",
    "run_slides",
]

log = logging.getLogger(__name__)

LONGEST = 120
"""Bytes of a slide's stem that go into a name; file systems take 255 with what is added."""


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


def run_slides(
    items: Sequence[Item],
    encoders: Sequence[EncoderSpec],
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

    Every tile is decoded once for all encoders.
    `in_memory` gives `{"features", "coordinates"}` a slide, numpy while they fit under
    `memory_threshold` percent, else lazy arrays over a store in `save_dir` (or a temporary folder).
    Slides that fail are in `failures` of the result; nothing is raised for them.
    """
    result = RunResult()
    names = output_names(items)
    if in_memory and save_dir is not None:
        log.warning("output_type='dict' writes nothing to %s while features fit in memory: 'zarr' does.", save_dir)
    if save_dir is not None:
        for name in names.values():
            check_ours(save_dir / name)

    def jobs() -> Iterator[Job | SlideFailed]:
        for item in items:
            try:
                plan = make_plan(item, encoders, where, options)
                if in_memory and memory.fits(plan.nbytes, memory_threshold):
                    yield Job.in_memory(item, plan)
                else:
                    path = (save_dir or result.make_cache()) / names[item.identity]
                    yield Job.on_disk(item, plan, path, overwrite=overwrite)
            except DfxError as e:
                yield SlideFailed(item, e)
            except Exception as e:  # one bad slide, whatever it raises, never ends a run
                log.debug("planning %s", item.address, exc_info=True)
                yield SlideFailed(item, SlideError(f"{item.address} can't be planned ({type(e).__name__}: {e})."))

    for encoder in encoders:
        cluster.share(encoder, client)
    outputs: dict[Any, Any] = {}
    for event in drive(client, jobs()):
        if isinstance(event, SlideDone):
            outputs[event.item.identity] = in_arrays(event) if in_memory else event.output
        elif isinstance(event, SlideFailed):
            result.failures.update(dict.fromkeys(event.item.given, event.error))
            log.info("%s failed: %s", event.item.address, event.error)
        notify(event)
    for item in items:  # in the order given, whichever was done first
        if item.identity in outputs:
            result.update(dict.fromkeys(item.given, outputs[item.identity]))
    return result


def make_plan(item: Item, encoders: Sequence[EncoderSpec], where: GridOptions, options: Options) -> Plan:
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
    return arrays.make_plan(slide, grid, encoders, options)


def in_arrays(event: SlideDone) -> dict[str, Any]:
    """Give a slide's output as arrays: in memory already, or lazy over its store."""
    if isinstance(event.output, dict):
        return event.output
    found = open_features(event.output)
    features = [open_features(event.output, name).features for name in found.encoders]
    return {
        "features": one_or_named(found.encoders, features),
        "coordinates": found.coordinates,
    } | labelled(event.item)


def output_names(items: Sequence[Item]) -> dict[Any, str]:
    """Name each slide's store, by `Item.identity`: its stem, with as much more as makes it unique in the run.

    A name depends on the inputs alone, never on their order, so that a second run finds the first's.
    """

    def names(item: Item) -> Iterator[str]:
        path = Path(item.address)
        digest = hashlib.sha256(os.fsencode(path) + repr(item.overrides).encode()).hexdigest()[:8]
        ending = path.suffix.lstrip(".").lower()
        stem = os.fsencode(path.stem).decode("utf-8", "replace")
        if len(os.fsencode(path.stem)) > LONGEST or "\ufffd" in stem:  # what zarr and file systems take
            stem = f"{stem.encode()[:LONGEST].decode('utf-8', 'ignore')}-{digest}"
        yield stem
        yield f"{stem}-{ending}"
        yield f"{stem}-{path.parent.name[-80:]}"
        yield f"{stem}-{digest}"

    candidates = {item.identity: list(names(item)) for item in items}
    chosen = dict.fromkeys(candidates, 0)
    while True:
        groups: dict[str, list[Any]] = {}
        for identity, n in chosen.items():
            groups.setdefault(candidates[identity][n].casefold(), []).append(identity)
        clashes = [group for group in groups.values() if len(group) > 1]
        movable = [i for group in clashes for i in group if chosen[i] + 1 < len(candidates[i])]
        if not movable:
            return {identity: f"{candidates[identity][n]}.zarr" for identity, n in chosen.items()}
        for identity in movable:
            chosen[identity] += 1


def raise_failures(result: RunResult, on_error: Literal["raise", "skip"]) -> RunResult:
    """Give the result, or raise one `RunError` that lists what failed."""
    if not result.failures or on_error == "skip":
        return result
    lines = [f"  {error}" for error in dict.fromkeys(result.failures.values())]  # each names its slide or store
    count = f"{len(lines)} of {len(lines) + len(result)} slides failed{', the others are done' if result else ''}"
    raise RunError("\n".join([f"{count}:", *lines]), result)
