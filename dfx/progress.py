"""A progress bar over the events of a run."""

from __future__ import annotations

import sys
from collections import Counter
from types import TracebackType

from tqdm import tqdm

from dfx.run import BlockDone, Event, Planned, SlideDone, SlideFailed, Stopping, Throttled, Timed


class ProgressBar:
    """Counts patches and slides; the total grows as slides are planned."""

    def __init__(self, slides: int, *, show: bool) -> None:
        self._slides = slides
        self._done = self._failed = 0
        self._seconds: Counter[str] = Counter()
        self._bar = tqdm(total=0, unit="patch", disable=not show, desc=self._text())

    def _text(self) -> str:
        failed = f", {self._failed} failed" if self._failed else ""
        return f"{self._done}/{self._slides} slides{failed}"

    def _say(self, text: str) -> None:
        if not self._bar.disable:
            self._bar.write(f"dfx: {text}", file=sys.stderr)

    def __call__(self, event: Event) -> None:
        """Take an event of a run."""
        if isinstance(event, Planned):
            self._bar.total = (self._bar.total or 0) + event.patches
            self._bar.update(event.done)
        elif isinstance(event, BlockDone):
            self._bar.update(event.patches)
        elif isinstance(event, Stopping):
            self._say(f"stopping; {event.blocks} blocks are finished or dropped, the same call goes on from here")
        elif isinstance(event, Throttled):
            self._say(event.reason)
        elif isinstance(event, Timed):
            self._seconds.update(event.seconds)
            if self._seconds:
                told = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in self._seconds.items())
                self._bar.set_postfix_str(f"workers: {told}")
        else:
            self._done += isinstance(event, SlideDone)
            self._failed += isinstance(event, SlideFailed)
            self._bar.set_description_str(self._text())

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
