"""Writing a store: made for a plan, filled block by block, closed."""

from __future__ import annotations

import json
import threading
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from dfx.errors import StoreError
from dfx.plan import Head, Plan, describe_heads
from dfx.slides import Slide
from dfx.store.fingerprint import differences, differing, random_encoders
from dfx.store.layout import (
    META,
    NOTES,
    check_ours,
    create_features,
    create_group,
    create_mask,
    dfx_attributes,
    encoders_in,
    features_array,
    in_one_step,
    node_names,
    update,
)
from dfx.store.place import At, Place, place_of

CLOSING = "closing.json"
"""Among the notes: what the store will say of them, by whoever came first to close it."""
AT_ONCE = 16
"""Files of notes that are read together: in a bucket there is one a block, and each takes a request."""
DOUBT = (
    "{slide} was written again after {place} was made from it, but its size and samples of its bytes are the same: "
    "the features are kept. If its pixels changed, extract the features again with overwrite=True (--overwrite)."
)


@dataclass(frozen=True, eq=False)
class Store:
    """One slide's output, open for writing."""

    place: Place
    """The group's folder."""
    arrays: tuple[zarr.Array[Any], ...]
    """Where blocks go, one for each encoder."""
    doubt: str = ""
    """Why the kept features might come from other pixels; "": there is no reason to think so."""

    @classmethod
    def at(cls, place: Place, encoders: Sequence[str]) -> Store:
        """Open the store of some encoders to write blocks."""
        return cls(place, tuple(features_array(place, name) for name in node_names(encoders)))

    @property
    def target(self) -> zarr.Array[Any] | Columns:
        """What takes the blocks of all encoders side by side."""
        return self.arrays[0] if len(self.arrays) == 1 else Columns.of(self)

    @classmethod
    def prepare(cls, at: At, plan: Plan, label: Any = None, *, overwrite: bool = False) -> Store:
        """Open the store of a plan: a new one, or the same plan's to be resumed.

        Raises `StoreError` if the store is of another plan (the error says what differs), is not a store of dfx, or is
        half done by an encoder whose features differ from run to run. With `overwrite`, a store of dfx is replaced.
        """
        place = place_of(at)
        check_ours(place)
        stored = dfx_attributes(place)
        if stored is None or overwrite:
            with in_one_step(place, stored) as made:
                cls._create(made, plan, label)
            return cls.prepare(place, plan, label)  # what lies there now is this one, or another run's
        found = differences(stored, plan)
        written_anew, checksum = was_written_anew(stored, plan.slide), stored.get("slide", {}).get("checksum")
        if written_anew and checksum:
            found += differing({"checksum of the slide": checksum}, {"checksum of the slide": plan.slide.checksum})
        if found:
            raise StoreError(
                f"{place} holds the output of another run ({'; '.join(found[:4])}"
                f"{f'; and {len(found) - 4} more' if len(found) > 4 else ''}): "
                "give another save_dir (--out), or overwrite=True (--overwrite) to replace it."
            )
        store = cls.at(place, [head.name for head in plan.heads])
        if written_anew and not checksum:
            store = replace(store, doubt=DOUBT.format(slide=plan.slide.url, place=place))
        missing = store.missing()
        random = random_encoders(plan.heads)
        if random and 0 < len(missing) < plan.blocks and not plan.options.allow_nondeterministic:
            raise StoreError(
                f"{place} is half done, and the features of {', '.join(random)} differ from run to run (dropout or "
                "sampling in forward?): resuming would mix rows of two runs. Pass overwrite=True (--overwrite) to "
                "replace it, or allow_nondeterministic=True (--allow-nondeterministic) to mix them."
            )
        changes = {} if label in (None, stored.get("label")) else {"label": label}
        if stored.get("status") != "running" and missing:
            changes |= {"status": "running"}
        if changes:
            update(place, **changes)
        return store

    @staticmethod
    def _create(place: Place, plan: Plan, label: Any) -> None:
        said = {"fingerprint": plan.fingerprint(), **plan.describe()}
        group = create_group(place, said if label is None else said | {"label": label})
        coordinates = plan.grid.coordinates
        view = plan.grid.view
        array = group.create_array(
            "coordinates",
            shape=coordinates.shape,
            dtype=coordinates.dtype,
            chunks=(max(1, min(len(coordinates), 2**16)), 4),
            dimension_names=("patch", "corner"),
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

    @property
    def complete(self) -> bool:
        """Whether all blocks are written and the store is closed."""
        return is_complete(self.place)

    def missing(self) -> list[int]:
        """Which blocks are not written yet, in order."""
        wanted = {  # a chunk's size is known: chunks are not compressed
            f"{array.path}/c/{block}/0": (block, int(np.prod(array.chunks)) * array.dtype.itemsize)
            for array in self.arrays
            for block in range(array.cdata_shape[0])
        }
        sizes = self.place.sizes(list(wanted))
        return sorted({block for (block, whole), size in zip(wanted.values(), sizes, strict=True) if size != whole})


def was_written_anew(stored: dict[str, Any], slide: Slide) -> bool:
    """Whether a slide's file was written again after its store was begun; False for a copy, which has its own time."""
    before = stored.get("slide", {})
    then, now = (str(version).partition(":") for version in (before.get("file_version", ""), slide.source.version))
    return before.get("url") == slide.url and then[0] == now[0] and then[2] != now[2]


def write_note(place: Place, block: str, said: dict[str, Any]) -> None:
    """Note something of a block of a store, before the block is written."""
    place.add(NOTES, json.dumps({"block": block, **said}))


def read_notes(place: Place, said: dict[str, Any]) -> dict[str, Any]:
    """Bring together what a store says of its blocks and what they noted since; seconds of several runs add up.

    `said` is what the store says of itself. Raises `FileNotFoundError` where another run closes it meanwhile.
    """
    damaged: set[str] = set(said.get("damaged_tiles", ()))
    batches: dict[str, int] = dict(said.get("batches", {}))
    seconds: Counter[str] = Counter(said.get("seconds", {}))
    notes = place / NOTES
    names = sorted(name for name in notes.files() if name.endswith(".jsonl"))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        lines = [line for text in pool.map(notes.read, names) for line in text.splitlines() if line]
    for line in lines:
        try:
            note = json.loads(line)
        except ValueError:  # cut short with its process, or by a full disk: its block was not written either
            continue
        damaged.update(note["damaged_tiles"])
        seconds.update(note["seconds"])
        if "batch_size" in note:
            batches[note["block"]] = note["batch_size"]
    rounded = {stage: round(s, 3) for stage, s in seconds.items()}
    found = {"damaged_tiles": sorted(damaged), "batches": batches, "seconds": rounded}
    return {name: value for name, value in found.items() if value}


def finish(at: At) -> None:
    """Close a store: notes, its nodes' metadata and the status are written in one step, after which nothing is.

    Of runs that close it at once, what the first noted holds: it is told by a file that one of them creates.
    Raises `StoreError` where blocks are gone that were written.
    """
    place = place_of(at)
    before = dfx_attributes(place) or {}
    encoders = encoders_in(before)
    missing = Store.at(place, encoders).missing()
    if missing:
        raise StoreError(f"{place} has lost {len(missing)} blocks while it was written: run again to make them anew.")
    if before["status"] != "complete":
        notes = place / NOTES
        try:
            said = read_notes(place, before)
            if not notes.create(CLOSING, json.dumps(said).encode()):
                said = json.loads(notes.read(CLOSING))
        except FileNotFoundError:  # another run is removing them, which has closed it; if not, they are lost
            if not is_complete(place):
                raise
        if not is_complete(place):  # were any removed as they were read, it is
            place.write(META, closed(place, encoders, said))
    place.remove([NOTES])


_closing = threading.Lock()


def closed(place: Place, encoders: Sequence[str], said: dict[str, Any]) -> bytes:
    """Give what zarr keeps of a complete store: its attributes, and the metadata of the nodes in it."""
    nodes = {"features", *node_names(encoders), "coordinates", "mask", "labels"}
    files = [META, *(f"{node}/{META}" for node in sorted(nodes))]
    there = [name for name, size in zip(files, place.sizes(files), strict=True) if size is not None]
    buffer = default_buffer_prototype().buffer
    copy = {name: buffer.from_bytes(place.read(name)) for name in there}
    with _closing, warnings.catch_warnings():  # which is no other thread's to enter
        warnings.filterwarnings("ignore", message="Consolidated metadata")  # not in the zarr 3 standard yet
        group = zarr.consolidate_metadata(MemoryStore(copy), zarr_format=3)
        changed = {**dict(group.attrs["dfx"]), **said, "status": "complete"}  # type: ignore[arg-type]
        changed.pop("failure", None)
        group.attrs["dfx"] = changed
    return copy[META].to_bytes()


def fail(at: At, reason: str) -> None:
    """Note why the slide failed; running again goes on from here. A store that another run has closed stays so."""
    if not is_complete(place_of(at)):
        update(at, status="failed", failure=reason)


def is_complete(place: Place) -> bool:
    """Whether a store is closed, all of its blocks written."""
    return (dfx_attributes(place) or {}).get("status") == "complete"


@dataclass(frozen=True, eq=False)
class Columns:
    """The arrays of several encoders as one array side by side, written a whole block at a time.

    Small to pickle: a task opens the arrays that it writes.
    """

    place: Place
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
        return cls(store.place, names, edges, shape, np.dtype(dtype), (arrays[0].chunks[0], edges[-1]))

    def __setitem__(self, index: tuple[slice, ...], block: NDArray[Any]) -> None:
        for name, start, stop in zip(self.names, self.edges, self.edges[1:], strict=False):
            features_array(self.place, name)[index[0]] = block[:, start:stop]


def write_patch_mode(
    place: Place, heads: Sequence[Head], features: Sequence[NDArray[Any]], labels: list[Any] | None, block_size: int
) -> Path | str:
    """Write the features of loose patches: a complete store without coordinates."""
    check_ours(place)
    names = [head.name for head in heads]
    try:
        with in_one_step(place, dfx_attributes(place)) as made:
            group = create_group(made, describe_heads(heads))
            create_features(group, len(features[0]), heads, block_size)
            for array, rows in zip(Store.at(made, names).arrays, features, strict=True):
                array[...] = rows
            if labels is not None:
                values = np.asarray(labels)
                if values.dtype.kind in "biuf":
                    group.create_array("labels", data=values, dimension_names=("patch",))
                else:
                    update(made, labels=[str(value) for value in values])
            finish(made)
    except OSError as e:
        raise StoreError(f"{place} can't be written ({e}): check the disk and its permissions.") from e
    return place.output
