"""What can go wrong, in words: each message states the fact, the offender and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class DfxError(Exception):
    """Anything that dfx refuses or that failed; the message names the offender and the remedy."""


class CallError(DfxError, ValueError):
    """A call that can't be carried out: raised before anything is read or removed."""


class CallTypeError(DfxError, TypeError):
    """A value of a kind that can't be used: raised before anything is read or removed."""


class SlideError(DfxError):
    """A slide that can't be opened or read; it never ends a run of other slides."""


class FormatError(SlideError):
    """A slide of a kind that dfx does not read itself and OpenSlide may."""


class UnknownFormatError(FormatError):
    """A file of a kind that dfx does not know or can't interpret; dfx then tries whether OpenSlide recognises it."""


class TileError(SlideError):
    """A tile whose bytes are damaged; `on_bad_tile="fill"` goes on without it."""

    def __init__(self, tile: str, message: str) -> None:
        super().__init__(tile, message)
        self.tile = tile
        """Which one, of which level and slide."""
        self.message = message

    def __str__(self) -> str:
        return self.message


class ResolutionError(DfxError, ValueError):
    """A resolution that this slide's metadata can't place."""


class EncoderError(DfxError):
    """An encoder that is unknown, or whose weights or output are not as they must be."""


class StoreError(DfxError):
    """An output folder or store that can't be used as it is."""


class MemoryShortage(DfxError):
    """A worker has no room for a block, however small its batches."""


class WorkerMismatch(DfxError):
    """A worker whose encoder gives other features than the process that planned the run: it gets no blocks."""

    def __init__(self, worker: str, difference: str) -> None:
        super().__init__(worker, difference)
        self.worker = worker
        """Its address."""
        self.difference = difference
        """Which encoder differs, and how much."""

    def __str__(self) -> str:
        return (
            f"worker {self.worker} differs from the process that planned the run: {self.difference}. "
            "Use one environment or image for all workers, and check their devices."
        )


class RunError(DfxError):
    """Some slides of a run failed; the others are done.

    `result` is what `run()` would have returned (with `failures`: input -> `DfxError`).
    """

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message, result)
        self.message = message
        self.result = result

    @property
    def failures(self) -> Mapping[Any, DfxError]:
        """Input -> what went wrong with it."""
        return self.result.failures if self.result is not None else {}

    def __str__(self) -> str:
        return self.message


class ClusterLost(RunError):
    """A cluster that can't be reached, went away or can't work; what is written stays, running again resumes."""
