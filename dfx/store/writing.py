"""Writing a store: made for a plan, filled block by block, closed."""

from __future__ import annotations

import json
import shutil
import threading
import uuid
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from dfx.errors import StoreError
from dfx.plan import Head, Plan, describe_heads, differences
from dfx.store.layout import (
    check_ours,
    create_features,
    create_group,
    create_mask,
    dfx_attributes,
    features_array,
    node_names,
    update,
)


@dataclass(frozen=True, eq=False)
class Store:
    """One slide's output on disk, open for writing."""

    path: Path
    """The group's folder."""
    arrays: tuple[zarr.Array[Any], ...]
    """Where blocks go, one for each encoder."""

    @classmethod
    def at(cls, path: Path, encoders: Sequence[str]) -> Store:
        """Open the store of some encoders to write blocks."""
        return cls(path, tuple(features_array(path, name) for name in node_names(encoders)))

    @property
    def notes(self) -> Path:
        """Where blocks note what is to be known of them beside their features."""
        return self.path / "notes"

    @property
    def target(self) -> zarr.Array[Any] | Columns:
        """What takes the blocks of all encoders side by side."""
        return self.arrays[0] if len(self.arrays) == 1 else Columns.of(self)

    @classmethod
    def prepare(cls, path: Path, plan: Plan, label: Any = None, *, overwrite: bool = False) -> Store:
        """Open the store of a plan: a new one, or the same plan's to be resumed.

        Raises `StoreError` when what lies there is of another plan (it says what differs) or not
        dfx's. With `overwrite`, a store of dfx is replaced.
        """
        check_ours(path)
        stored = dfx_attributes(path) if path.exists() else None
        if stored is not None and not overwrite:
            fingerprint = stored.get("fingerprint")
            found = differences(fingerprint if isinstance(fingerprint, dict) else {}, plan.fingerprint())
            if found:
                raise StoreError(
                    f"{path} holds the output of another run ({'; '.join(found[:4])}"
                    f"{f'; and {len(found) - 4} more' if len(found) > 4 else ''}): "
                    "give another save_dir (--out), or overwrite=True (--overwrite) to replace it."
                )
            if stored.get("status") != "created":  # its arrays are all there
                store = cls.at(path, [head.name for head in plan.heads])
                changes = {} if label in (None, stored.get("label")) else {"label": label}
                if stored.get("status") != "running" and store.missing():
                    changes |= {"status": "running"}
                if changes:
                    update(path, **changes)
                return store
        return cls._create(path, plan, label)

    @classmethod
    def _create(cls, path: Path, plan: Plan, label: Any) -> Store:
        said = {"fingerprint": plan.fingerprint(), **plan.describe()}
        group = create_group(path, "created", said if label is None else said | {"label": label})
        coordinates = plan.grid.coordinates
        view = plan.grid.view
        array = group.create_array(
            "coordinates",
            shape=coordinates.shape,
            dtype=coordinates.dtype,
            chunks=(max(1, min(len(coordinates), 2**16)), 4),
            attributes={
                "resolution": view.resolution_json,
                "units": view.units,
                "to_baseline": list(view.to_baseline),
            },
        )
        array[...] = coordinates
        if plan.grid.mask is not None:
            create_mask(group, plan.grid.mask, plan.slide.dimensions)
        create_features(group, len(plan.grid), plan.heads, plan.options.block_size)
        update(path, status="running")
        return cls.at(path, [head.name for head in plan.heads])

    @property
    def complete(self) -> bool:
        """Whether all blocks are written and the store is closed."""
        return (dfx_attributes(self.path) or {}).get("status") == "complete"

    def missing(self) -> list[int]:
        """Which blocks are not written yet, in order."""
        places = [  # a chunk's size is known: chunks are not compressed
            (self.path / array.path / "c", int(np.prod(array.chunks)) * array.dtype.itemsize) for array in self.arrays
        ]

        def there(block: int) -> bool:
            try:
                return all((chunks / str(block) / "0").stat().st_size == whole for chunks, whole in places)
            except FileNotFoundError:
                return False

        return [block for block in range(self.arrays[0].cdata_shape[0]) if not there(block)]


def write_note(folder: Path, name: str, said: dict[str, Any]) -> None:
    """Note something of a block; whole or not at all, as a chunk is."""
    folder.mkdir(exist_ok=True)
    part = folder / f".{name}.{uuid.uuid4().hex}.partial"
    part.write_text(json.dumps(said))
    part.replace(folder / f"{name}.json")


def with_notes(path: Path, said: dict[str, Any]) -> dict[str, Any]:
    """Give what a store says of itself with what its blocks have noted since; seconds of several runs add up."""
    damaged: set[str] = set(said.get("damaged_tiles", ()))
    batches: dict[str, int] = dict(said.get("batches", {}))
    seconds: Counter[str] = Counter(said.get("seconds", {}))
    for file in sorted((path / "notes").glob("*.json")):
        note = json.loads(file.read_text())
        damaged.update(note["damaged_tiles"])
        seconds.update(note.get("seconds", {}))  # none in those of an earlier version
        if "batch_size" in note:
            batches[file.stem] = note["batch_size"]
    rounded = {stage: round(s, 3) for stage, s in seconds.items()}
    found = {"damaged_tiles": sorted(damaged), "batches": batches, "seconds": rounded}
    return said | {name: value for name, value in found.items() if value}


_closing = threading.Lock()


def finish(path: Path) -> None:
    """Close a store: notes, consolidated metadata, then the status, which is so the last thing written."""
    said = with_notes(path, dfx_attributes(path) or {})
    shutil.rmtree(path / "notes", ignore_errors=True)
    with _closing, warnings.catch_warnings():  # which is no other thread's to enter
        warnings.filterwarnings("ignore", message="Consolidated metadata")  # not in the zarr 3 standard yet
        warnings.filterwarnings("ignore", message="Object at")  # a user's file in the store's folder
        zarr.consolidate_metadata(str(path))
    update(path, **said | {"status": "complete", "failure": None})


def fail(path: Path, reason: str) -> None:
    """Note why the slide failed; running again goes on from here."""
    update(path, status="failed", failure=reason)


@dataclass(frozen=True, eq=False)
class Columns:
    """The arrays of several encoders as one array side by side, written a whole block at a time.

    Small to pickle: a task opens the arrays that it writes.
    """

    path: Path
    """The group's folder."""
    names: tuple[str, ...]
    """The arrays in it, from left to right."""
    edges: tuple[int, ...]
    """First column of each, and the number of all."""
    shape: tuple[int, int]
    """Rows and columns."""
    dtype: np.dtype[Any]
    """That which holds all of theirs."""
    chunks: tuple[int, int]
    """Of a block."""

    @classmethod
    def of(cls, store: Store) -> Columns:
        """Put the arrays of a store side by side."""
        arrays = store.arrays
        edges = tuple(np.cumsum([0, *(array.shape[1] for array in arrays)]).tolist())
        shape, dtype = (arrays[0].shape[0], edges[-1]), np.result_type(*(array.dtype for array in arrays))
        names = tuple(array.path for array in arrays)
        return cls(store.path, names, edges, shape, np.dtype(dtype), (arrays[0].chunks[0], edges[-1]))

    def __setitem__(self, index: tuple[slice, ...], block: NDArray[Any]) -> None:
        for name, start, stop in zip(self.names, self.edges, self.edges[1:], strict=False):
            features_array(self.path, name)[index[0]] = block[:, start:stop]


def write_patch_mode(
    path: Path, heads: Sequence[Head], features: Sequence[NDArray[Any]], labels: list[Any] | None, block_size: int
) -> Path:
    """Write the features of loose patches: a complete store without coordinates."""
    check_ours(path)
    try:
        group = create_group(path, "running", describe_heads(heads))
        create_features(group, len(features[0]), heads, block_size)
        store = Store.at(path, [head.name for head in heads])
        for array, rows in zip(store.arrays, features, strict=True):
            array[...] = rows
        if labels is not None:
            values = np.asarray(labels)
            if values.dtype.kind in "biuf":
                group.create_array("labels", data=values)
            else:
                update(path, labels=[str(value) for value in values])
        finish(path)
    except OSError as e:
        raise StoreError(f"{path} can't be written ({e}): check the disk and its permissions.") from e
    return path
