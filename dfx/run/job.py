"""A planned slide on its way through the window."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dfx.run.item import Item
from dfx.run.planning import Planned

T = TypeVar("T")


class Job:
    """What is still to be done for a slide, and what came of it."""

    def __init__(self, planned: Planned) -> None:
        self.id = uuid.uuid4().hex
        """Names it to the cluster."""
        self.planned = planned
        self.item = planned.item
        self.todo = list(planned.todo)
        """Blocks not yet submitted."""
        self.unfinished = len(self.todo)
        """Blocks not yet done."""
        self.failed = False
        """Whether what comes back of it is to be ignored."""
        self.kept: NDArray[Any] | None = None
        """Where blocks are kept that come back."""
        if planned.place is None:
            self.kept = np.empty((planned.patches, sum(planned.dims)), np.result_type(*planned.dtypes))

    @property
    def address(self) -> str:
        """Where the slide lies."""
        return self.item.address

    def take(self, most: int) -> list[int]:
        """Take the next blocks, `most` at a time."""
        taken, self.todo = self.todo[:most], self.todo[most:]
        return taken

    def result(self) -> Any:
        """Give the store's place, or what was kept."""
        if self.kept is None:
            return self.planned.place
        edges = np.cumsum(self.planned.dims)[:-1]
        parts = [
            part.astype(dtype, copy=False)
            for part, dtype in zip(np.split(self.kept, edges, axis=1), self.planned.dtypes, strict=True)
        ]
        found = {"features": one_or_named(self.planned.names, parts), "coordinates": self.planned.coordinates}
        return found | labelled(self.item)


def one_or_named(names: Sequence[str], features: Sequence[T]) -> T | dict[str, T]:
    """Give the features of one encoder as they are, those of several by name."""
    return features[0] if len(features) == 1 else dict(zip(names, features, strict=True))


def labelled(item: Item) -> dict[str, Any]:
    """The item's label as part of a result."""
    return {} if item.label is None else {"labels": item.label}
