"""What is on its way through a cluster: slides being planned, blocks being made, stores being closed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from distributed.scheduler import KilledWorker

from dfx import store
from dfx.errors import DfxError, SlideError, StoreError
from dfx.run.item import Item
from dfx.run.job import Job
from dfx.run.planning import Request
from dfx.store import Place

TRIES = 3
"""Times that something is tried that failed for no fault of its own."""


@dataclass(frozen=True, eq=False)
class Planning:
    """A slide that is being planned."""

    request: Request
    item: Item


@dataclass(frozen=True, eq=False)
class Block:
    """A block that is being made."""

    job: Job
    number: int
    attempt: int = 0
    """Which one: every attempt has a key of its own, since Dask may not have done with the last one's."""
    alone_on: str | None = None
    """Address of the worker that runs nothing else."""

    @property
    def key(self) -> str:
        """Of its task. One name for the blocks of all slides: Dask keeps what it knows of each name for ever."""
        return f"dfx-block-{self.job.id}-{self.number}-{self.attempt}"

    def __str__(self) -> str:
        return f"block {self.number} of {self.job.address}"


@dataclass(frozen=True, eq=False)
class Closing:
    """A slide whose blocks are done."""

    job: Job


Flight: TypeAlias = Planning | Block | Closing


@dataclass(frozen=True)
class Finish:
    """Closes a store, as a task."""

    place: Place

    def __call__(self) -> None:
        """Do it; raises `StoreError`."""
        try:
            store.finish(self.place)
        except (OSError, ValueError, KeyError) as e:
            raise StoreError(f"{self.place} can't be closed ({e}): check the disk and run again to resume.") from e


def described(flight: Flight, status: str, error: BaseException | None) -> DfxError:
    """Say what went wrong with a task."""
    if isinstance(error, DfxError):
        return error
    item = flight.item if isinstance(flight, Planning) else flight.job.item
    where = str(flight) if isinstance(flight, Block) else item.address
    if error is None:
        return SlideError(f"{where} was {status} by the cluster {TRIES} times: run again to resume.")
    if isinstance(error, KilledWorker):
        return SlideError(f"{where} killed the workers that planned or closed it: {error}.")
    if isinstance(error, OSError) and not isinstance(flight, Planning):
        return StoreError(f"{where} can't be written ({error}): check the disk and run again to resume.")
    if isinstance(flight, Planning):
        return SlideError(f"{where} can't be planned ({type(error).__name__}: {error}).")
    return SlideError(f"{where} failed ({type(error).__name__}: {error}); run again to resume.")
