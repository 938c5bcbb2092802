"""One slide of a run, as the user gave it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfx.slides import Slide, open_slide


@dataclass(frozen=True)
class Item:
    """One slide of a run, as the user gave it."""

    given: tuple[Any, ...]
    """The keys of the result: the slide as the user gave it, in each way that it was given."""
    slide: str | Path | Slide
    """What is opened, or is open already."""
    mask: Any = "tissue"
    """As `PatchGrid.over` takes it."""
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
