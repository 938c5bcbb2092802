"""What a run tells of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from dfx.errors import DfxError
from dfx.run.item import Item
from dfx.run.planning import Planned


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


@dataclass(frozen=True)
class Throttled:
    """Something waits: for memory, or until a block that may have killed a worker has run alone."""

    reason: str


@dataclass(frozen=True)
class Stopping:
    """The run was interrupted; blocks that run are finished or dropped, and running again resumes."""

    blocks: int


@dataclass(frozen=True)
class Timed:
    """Where the workers' time went since this was last told, and at the end: seconds of all threads, by stage
    (read, encode, write).
    """  # noqa: D205

    seconds: Mapping[str, float]


Event: TypeAlias = Planned | BlockDone | SlideDone | SlideFailed | Throttled | Stopping | Timed
