"""The store: one zarr group a slide, its fingerprint, which blocks are missing, completion.

    <name>.zarr/            zarr format 3; attribute `dfx`: status, fingerprint, slide, patches, encoder(s)
        features            (N, D) floating, one chunk a block, NaN where nothing was written yet;
                            with several encoders a group with one such array each
        coordinates         int64 (N, 4) [x0, y0, x1, y1] at the requested resolution, end exclusive
        mask                bool (rows, columns) over the whole slide, where a mask chose the patches
        labels              where given
        notes/              while it is written: what blocks noted; goes into the attribute when it is closed

Arrays name their dimensions, as xarray needs: ("patch", "feature"), ("patch", "corner"), ("y", "x"); with several
encoders ("patch", "feature_<name>").

A chunk is written whole, by one task, by an atomic rename, so a chunk that is there is right, and
writing it again changes nothing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from dfx.errors import StoreError
from dfx.masks import Mask
from dfx.plan import FORMAT, Head
from dfx.store.disk import Disk
from dfx.store.place import At, Place, place_of

VERSION = version("dfx")
META = "zarr.json"
"""Where zarr keeps a group's attributes."""
NOTES = "notes"
"""Where blocks note what is to be known of them beside their features."""
NODES = (META, "features", "coordinates", "mask", "labels", NOTES)
"""What dfx writes into a store's folder."""


def check_folder(save_dir: str | Path, storage_options: Mapping[str, Any] | None = None) -> Place:
    """Give an output folder, made absolute; raises `StoreError` for a file, or a place that can't be written."""
    place = place_of(save_dir, storage_options)
    text = str(save_dir)
    if "\0" in text or not text:
        raise StoreError(f"{text!r} is no path: give a folder.")
    if not isinstance(place, Disk):
        return check_bucket(place)
    try:
        folder = place.path.expanduser().absolute()
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    except (OSError, RuntimeError, ValueError) as e:  # a name too long, a user who is not there, a null byte
        raise StoreError(f"{text!r} can't be an output folder ({e}): give another save_dir.") from e
    if not existing.is_dir():
        raise StoreError(f"{existing} is a file, so it can't be an output folder: give another save_dir.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StoreError(f"{existing} can't be written to: check its permissions, or give another save_dir.")
    return Disk(folder)


def check_bucket(place: Place) -> Place:
    """Refuse a URL that outputs can't go to, or that does not answer; what it answers to writing is seen later."""
    protocol = str(place).partition("://")[0]
    if protocol in ("memory", "http", "https"):
        why = "is the memory of one process" if protocol == "memory" else "can only be read"
        raise StoreError(f"{place} {why}: give a folder or an object storage as save_dir.")
    try:
        place.exists()
    except OSError as e:
        raise StoreError(f"{place} can't be an output folder: {e}.") from None
    return place


def is_ours(place: Place) -> bool:
    """Whether a store of dfx lies there, or blocks of one; an empty folder is nobody's, and counts as ours."""
    if not place.exists():
        return True
    if not place.is_folder():
        return False
    return dfx_attributes(place) is not None or all(is_block(name) for name in place.files())


def is_block(name: str) -> bool:
    """Whether a file of a store is a block's: what is left when a store is removed while it is written."""
    return re.fullmatch(r"features/([^/]+/)?c/\d+/0|notes/([0-9a-f]{32}\.jsonl|closing\.json)", name) is not None


def check_ours(place: Place) -> None:
    """Raise `StoreError` when something else than a store of dfx is in the way."""
    if not is_ours(place):
        raise StoreError(
            f"{place} exists and was not made by dfx, so it is left alone: move it, or give another save_dir."
        )


def dfx_attributes(at: At) -> dict[str, Any] | None:
    """Give what a store says of itself, None where there is no store of dfx."""
    place = place_of(at)
    try:
        said = json.loads(place.read(META))
        found = said["attributes"]["dfx"] if (said["zarr_format"], said["node_type"]) == (3, "group") else None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, KeyError, TypeError):  # no group
        return None
    except OSError as e:
        raise StoreError(f"{place} can't be read ({e}): check its permissions and storage_options.") from None
    return found if isinstance(found, dict) and {"format", "status"} <= found.keys() else None


@contextmanager
def in_one_step(place: Place, instead_of: dict[str, Any] | None) -> Iterator[Place]:
    """Give a folder to make a store in, which then takes its place whole: no other run sees half of it.

    `instead_of`: what lies there now, of dfx, and is replaced. Where another run was quicker, its store stays.
    """
    with place.making() as made:
        yield made
        if (dfx_attributes(place) or {}).get("created") != (instead_of or {}).get("created"):
            return
        if instead_of is not None:
            place.remove(NODES)
        if not place.take(made) and dfx_attributes(place) is None:  # blocks of a removed store, or a user's files
            place.remove([name for name in place.files() if is_block(name)])  # others may be putting theirs there now
            place.fill(made, META)


def create_group(place: Place, said: dict[str, Any]) -> zarr.Group:
    """Create a store's group; `said` is what it says of its content."""
    head = {"format": FORMAT, "version": VERSION, "status": "running"}
    created = {"created": datetime.now(UTC).isoformat(timespec="microseconds")}
    return zarr.create_group(place.zarr(), attributes={"dfx": head | created | said})


def node_names(encoders: Sequence[str]) -> list[str]:
    """Where each encoder's features lie in the group."""
    return ["features"] if len(encoders) == 1 else [f"features/{name}" for name in encoders]


def encoders_in(attributes: dict[str, Any]) -> list[str]:
    """Name the encoders of a store, from what it says of itself."""
    return list(attributes["encoders"]) if "encoders" in attributes else [attributes["encoder"]["name"]]


def create_features(group: zarr.Group, n: int, heads: Sequence[Head], block_size: int) -> None:
    """Create the empty features arrays, one chunk a block."""
    for name, head in zip(node_names([head.name for head in heads]), heads, strict=True):
        group.create_array(
            name,
            # Encoders differ in their width, and in a group xarray expects one size per name.
            dimension_names=("patch", "feature" if len(heads) == 1 else f"feature_{head.name}"),
            shape=(n, head.dim),
            dtype=head.dtype,
            chunks=(max(1, min(block_size, n)), max(1, head.dim)),
            fill_value=np.nan,
            compressors=None,  # zstd takes 3 times as long to write floats and saves 8 %
            config={"write_empty_chunks": True},  # so that a chunk that is absent was not written
        )


def create_mask(group: zarr.Group, mask: Mask, dimensions: tuple[int, int]) -> None:
    """Write the mask that chose the patches: bool (rows, columns), stretched over the slide's (width, height)."""
    factors = [whole / cells for whole, cells in zip(dimensions, mask.cells.shape[::-1], strict=True)]
    group.create_array(
        "mask",
        data=mask.cells,
        dimension_names=("y", "x"),
        chunks=(min(2048, mask.cells.shape[0]), min(2048, mask.cells.shape[1])),
        attributes={"method": mask.method, "to_baseline": factors},
    )


def features_array(place: Place, name: str) -> zarr.Array[Any]:
    """Open a features array to write blocks; what is given pickles small."""
    return zarr.open_array(place.zarr(), path=name, mode="r+", zarr_format=3, config={"write_empty_chunks": True})


def update(at: At, **changes: Any) -> None:
    """Change what a store says of itself; None removes."""
    group = zarr.open_group(place_of(at).zarr(), mode="r+", zarr_format=3)
    said = {**dict(group.attrs["dfx"]), **changes}  # type: ignore[arg-type]
    group.attrs["dfx"] = {name: value for name, value in said.items() if value is not None}
