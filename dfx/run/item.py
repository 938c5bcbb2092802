"""One slide of a run, as the user gave it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dfx.remote import is_remote, local_path, shown
from dfx.slides import Slide, open_slide


@dataclass(frozen=True, repr=False)
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
    storage_options: Mapping[str, Any] | None = field(default=None, hash=False)
    """Of the file systems of slide and mask; never told."""

    def __post_init__(self) -> None:
        if not isinstance(self.slide, Slide) and not is_remote(self.slide):  # a worker may be in another folder
            object.__setattr__(self, "slide", os.path.abspath(local_path(self.slide)))  # noqa: PTH100

    def __repr__(self) -> str:
        return f"Item({self.address})"

    def open(self) -> Slide:
        """Open the slide; raises `SlideError`."""
        if isinstance(self.slide, Slide) and self.overrides == self.slide.overrides:
            return self.slide
        mpp, power = self.overrides
        if isinstance(self.slide, Slide):
            at, options = self.slide.source.address, self.slide.storage_options
            return open_slide(at, mpp, power, options, backend=self.backend)
        return open_slide(self._url, mpp, power, self.storage_options)

    @property
    def backend(self) -> Literal["auto", "openslide"]:
        """What an open slide was opened by, where that is not what would read its file anyway."""
        chosen = isinstance(self.slide, Slide) and self.slide.backend != "tiff"
        return "openslide" if chosen else "auto"

    @property
    def overrides(self) -> tuple[Any, Any]:
        """Mpp and power that go before the file's: the run's, else those that the slide was opened with."""
        own = self.slide.overrides if isinstance(self.slide, Slide) else (None, None)
        return self.mpp or own[0], self.power or own[1]

    @property
    def address(self) -> str:
        """Where the slide lies, as it may be told."""
        return shown(self._url)

    @property
    def _url(self) -> str:
        if isinstance(self.slide, Slide):
            return self.slide.source.address
        return str(self.slide)

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for the same file read the same way."""
        told = self.address  # two files of a server may differ in their query alone
        same = [] if told == self._url else [hashlib.sha256(self._url.encode()).hexdigest()]
        return told, *self.overrides, self.backend, *same
