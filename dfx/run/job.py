"""One slide of a run: as it was given, planned, on its way, and what is told of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import dask.array as da
import numpy as np
from numpy.typing import NDArray

from dfx import arrays
from dfx.errors import DfxError, StoreError
from dfx.plan import Plan
from dfx.slides import Slide, open_slide
from dfx.store import Store

T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """One slide of a run, as the user gave it."""

    given: tuple[Any, ...]
    """The keys of the result: the slide as the user gave it, in each way that it was given."""
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
        if isinstance(self.slide, Slide) and self.overrides == self.slide.overrides:
            return self.slide
        mpp, power = self.overrides
        return open_slide(self.address, mpp=mpp, power=power)

    @property
    def overrides(self) -> tuple[Any, Any]:
        """Mpp and power that go before the file's: the run's, else those that the slide was opened with."""
        own = self.slide.overrides if isinstance(self.slide, Slide) else (None, None)
        return self.mpp or own[0], self.power or own[1]

    @property
    def address(self) -> str:
        """Where the slide lies."""
        return self.slide.url if isinstance(self.slide, Slide) else os.path.abspath(self.slide)  # noqa: PTH100

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for the same file read the same way."""
        return self.address, *self.overrides


@dataclass(eq=False)
class Job:
    """A planned slide on its way through the window."""

    item: Item
    plan: Plan
    tasks: arrays.Tasks
    """One a block: it writes the block, or gives it."""
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
        tasks = arrays.Tasks.of(arrays.lazy_features(plan))
        return cls(item, plan, tasks, list(range(plan.blocks)), kept=np.empty(plan.shape, plan.dtype))

    @classmethod
    def on_disk(cls, item: Item, plan: Plan, path: Path, *, overwrite: bool) -> Job:
        """Make a job whose features are written where they are made; blocks that are there are not made again."""
        try:
            store = Store.prepare(path, plan, item.label, overwrite=overwrite)
        except OSError as e:
            raise StoreError(f"{path} can't be written ({e}): check the disk and its permissions.") from e
        lazy = arrays.written(arrays.lazy_features(plan), store.target) if len(plan.grid) else da.empty((0,))
        return cls(item, plan, arrays.Tasks.of(lazy), store.missing(), store=store)

    def take(self, most: int) -> list[int]:
        """Take the next blocks, `most` at a time."""
        taken, self.todo = self.todo[:most], self.todo[most:]
        return taken

    def finish(self) -> SlideDone:
        """Close what is done."""
        if self.store is None:
            assert self.kept is not None
            features = one_or_named([head.name for head in self.plan.heads], self.plan.split(self.kept))
            found = {"features": features, "coordinates": self.plan.grid.coordinates}
            return SlideDone(self.item, found | labelled(self.item))
        if not self.store.complete:
            self.store.finish()
        return SlideDone(self.item, self.store.path)


def one_or_named(names: Sequence[str], features: Sequence[T]) -> T | dict[str, T]:
    """Give the features of one encoder as they are, those of several by name."""
    return features[0] if len(features) == 1 else dict(zip(names, features, strict=True))


def labelled(item: Item) -> dict[str, Any]:
    """The item's label as part of a result."""
    return {} if item.label is None else {"labels": item.label}


# What a run tells of


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
