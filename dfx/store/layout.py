"""The store: one zarr group a slide, its fingerprint, which blocks are missing, completion.

    <name>.zarr/            zarr format 3; attribute `dfx`: status, fingerprint, slide, patches, encoder(s)
        features            (N, D) floating, one chunk a block, NaN where nothing was written yet;
                            with several encoders a group with one such array each
        coordinates         int64 (N, 4) [x0, y0, x1, y1] at the requested resolution, end exclusive
        mask                bool (rows, columns) over the whole slide, where a mask chose the patches
        labels              where given
        notes/              while it is written: what blocks noted; goes into the attribute when it is closed

A chunk is written whole, by one task, by an atomic rename, so a chunk that is there is right, and
writing it again changes nothing.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from dfx.errors import CallTypeError, StoreError
from dfx.plan import FORMAT, Head
from dfx.tissue import Mask

NODES = ("zarr.json", "features", "coordinates", "mask", "labels", "notes")
"""What dfx writes into a store's folder."""


def check_folder(save_dir: str | Path) -> Path:
    """Give an output folder made absolute; raises `StoreError` for a file, or a place that can't be written."""
    if not isinstance(save_dir, str | Path):
        raise CallTypeError(f"a folder is given by its path (str or Path), not by {type(save_dir).__name__}.")
    text = str(save_dir)
    if "\0" in text or not text:
        raise StoreError(f"{text!r} is no path: give a folder.")
    if "://" in text:
        raise StoreError(f"{text} is not on a mounted disk: this version of dfx writes local folders only.")
    try:
        folder = Path(text).expanduser().absolute()
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    except (OSError, RuntimeError, ValueError) as e:  # a name too long, a user who is not there, a null byte
        raise StoreError(f"{text!r} can't be an output folder ({e}): give another save_dir.") from e
    if not existing.is_dir():
        raise StoreError(f"{existing} is a file, so it can't be an output folder: give another save_dir.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StoreError(f"{existing} can't be written to: check its permissions, or give another save_dir.")
    return folder


def remove(path: Path) -> None:
    """Remove what dfx wrote at a store's place; what else lies in its folder stays, and so does the folder then."""
    for name in NODES:
        node = path / name
        if node.is_dir() and not node.is_symlink():
            shutil.rmtree(node)
        else:
            node.unlink(missing_ok=True)
    if path.exists() and not any(path.iterdir()):
        path.rmdir()


def is_ours(path: Path) -> bool:
    """Whether a store of dfx lies there, or blocks of one; an empty folder is nobody's, and counts as ours."""
    if not path.exists():
        return True
    if not path.is_dir() or path.is_symlink():
        return False
    return dfx_attributes(path) is not None or all(is_block(file.relative_to(path)) for file in files_in(path))


def files_in(path: Path) -> Iterator[Path]:
    """Give the files below a folder."""
    return (file for file in path.rglob("*") if not file.is_dir())


def is_block(name: Path) -> bool:
    """Whether a file of a store is a block's: what is left when a store is removed while it is written."""
    return re.fullmatch(r"features/([^/]+/)?c/\d+/0|notes/[\d-]+\.json", name.as_posix()) is not None


def check_ours(path: Path) -> None:
    """Raise `StoreError` when something else than a store of dfx is in the way."""
    if not is_ours(path):
        raise StoreError(
            f"{path} exists and was not made by dfx, so it is left alone: move it, or give another save_dir."
        )


def dfx_attributes(path: Path) -> dict[str, Any] | None:
    """Give what a store says of itself, None where there is no store of dfx."""
    try:
        found = zarr.open_group(str(path), mode="r").attrs.get("dfx")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no group, or no zarr at all
        return None
    return found if isinstance(found, dict) and {"format", "status"} <= found.keys() else None


def create_group(path: Path, status: str, said: dict[str, Any]) -> zarr.Group:
    """Create a store's group in the place of what dfx had there; `said` is what it says of its content."""
    if path.exists():
        remove(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"format": FORMAT, "version": version("dfx"), "status": status}
    created = {"created": datetime.now(UTC).isoformat(timespec="seconds")}
    return zarr.create_group(str(path), attributes={"dfx": head | created | said})


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
        chunks=(min(2048, mask.cells.shape[0]), min(2048, mask.cells.shape[1])),
        attributes={"method": mask.method, "to_baseline": factors},
    )


def features_array(path: Path, name: str) -> zarr.Array[Any]:
    """Open a features array to write blocks; what is given pickles small."""
    return zarr.open_array(str(path), path=name, mode="r+", config={"write_empty_chunks": True})


def update(path: Path, **changes: Any) -> None:
    """Change what a store says of itself; None removes."""
    group = zarr.open_group(str(path), mode="r+")
    said = {**dict(group.attrs["dfx"]), **changes}  # type: ignore[arg-type]
    group.attrs["dfx"] = {name: value for name, value in said.items() if value is not None}
