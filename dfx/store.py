"""The store: one zarr group a slide, its fingerprint, which blocks are missing, completion.

    <name>.zarr/            zarr format 3; attribute `dfx`: status, fingerprint, slide, patches, encoder
        features            (N, D) floating, one chunk a block, NaN where nothing was written yet
        coordinates         int64 (N, 4) [x0, y0, x1, y1] at the requested resolution, end exclusive
        labels              where given

A chunk is written whole, by one task, by an atomic rename, so a chunk that is there is right, and
writing it again changes nothing.
"""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import zarr
from numpy.typing import NDArray

from dfx.errors import CallTypeError, StoreError
from dfx.plan import FORMAT, Plan, differences

NODES = ("zarr.json", "features", "coordinates", "labels")
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
    """Whether a store of dfx lies there; an empty folder is nobody's, and counts as ours."""
    if not path.exists():
        return True
    if not path.is_dir() or path.is_symlink():
        return False
    return not any(path.iterdir()) or dfx_attributes(path) is not None


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
    return found if isinstance(found, dict) and {"format", "status", "encoder"} <= found.keys() else None


@dataclass(frozen=True, eq=False)
class Store:
    """One slide's output on disk, open for writing."""

    path: Path
    """The group's folder."""
    features: zarr.Array[Any]
    """Where blocks go."""

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
                store = cls(path, features_array(path))
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
        create_features(group, plan.shape, plan.dtype, plan.options.block_size)
        update(path, status="running")
        return cls(path, features_array(path))

    @property
    def complete(self) -> bool:
        """Whether all blocks are written and the store is closed."""
        return (dfx_attributes(self.path) or {}).get("status") == "complete"

    def missing(self) -> list[int]:
        """Which blocks are not written yet, in order."""
        whole = int(np.prod(self.features.chunks)) * self.features.dtype.itemsize  # chunks are not compressed
        chunks = self.path / self.features.path / "c"

        def there(block: int) -> bool:
            try:
                return (chunks / str(block) / "0").stat().st_size == whole
            except FileNotFoundError:
                return False

        return [block for block in range(self.features.cdata_shape[0]) if not there(block)]

    def finish(self) -> None:
        """Close the store: consolidated metadata, then the status, which is so the last thing written."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Consolidated metadata")  # not in the zarr 3 standard yet
            warnings.filterwarnings("ignore", message="Object at")  # a user's file in the store's folder
            zarr.consolidate_metadata(str(self.path))
        update(self.path, status="complete", failure=None)

    def fail(self, reason: str) -> None:
        """Note why the slide failed; running again goes on from here."""
        update(self.path, status="failed", failure=reason)


def create_group(path: Path, status: str, said: dict[str, Any]) -> zarr.Group:
    """Create a store's group in the place of what dfx had there; `said` is what it says of its content."""
    if path.exists():
        remove(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"format": FORMAT, "version": version("dfx"), "status": status}
    created = {"created": datetime.now(UTC).isoformat(timespec="seconds")}
    return zarr.create_group(str(path), attributes={"dfx": head | created | said})


def create_features(group: zarr.Group, shape: tuple[int, int], dtype: np.dtype[Any], block_size: int) -> None:
    """Create the empty features array, one chunk a block."""
    group.create_array(
        "features",
        shape=shape,
        dtype=dtype,
        chunks=(max(1, min(block_size, shape[0])), max(1, shape[1])),
        fill_value=np.nan,
        compressors=None,  # zstd takes 3 times as long to write floats and saves 8 %
        config={"write_empty_chunks": True},  # so that a chunk that is absent was not written
    )


def features_array(path: Path) -> zarr.Array[Any]:
    """Open the features array to write blocks; what is given pickles small."""
    return zarr.open_array(str(path), path="features", mode="r+", config={"write_empty_chunks": True})


def update(path: Path, **changes: Any) -> None:
    """Change what a store says of itself; None removes."""
    group = zarr.open_group(str(path), mode="r+")
    said = {**dict(group.attrs["dfx"]), **changes}  # type: ignore[arg-type]
    group.attrs["dfx"] = {name: value for name, value in said.items() if value is not None}


def write_patch_mode(
    path: Path, features: NDArray[Any], labels: list[Any] | None, encoder: dict[str, Any], block_size: int
) -> Path:
    """Write the features of loose patches: a complete store without coordinates."""
    check_ours(path)
    try:
        return _write_patch_mode(path, features, labels, encoder, block_size)
    except OSError as e:
        raise StoreError(f"{path} can't be written ({e}): check the disk and its permissions.") from e


def _write_patch_mode(
    path: Path, features: NDArray[Any], labels: list[Any] | None, encoder: dict[str, Any], block_size: int
) -> Path:
    group = create_group(path, "running", {"encoder": encoder})
    create_features(group, features.shape, features.dtype, block_size)
    features_array(path)[...] = features
    if labels is not None:
        values = np.asarray(labels)
        if values.dtype.kind in "biuf":
            group.create_array("labels", data=values)
        else:
            update(path, labels=[str(value) for value in values])
    Store(path, features_array(path)).finish()
    return path


class Features:
    """A complete store, read lazily. `.attrs` is what it says of itself (see README, "The store")."""

    def __init__(self, path: str | Path) -> None:
        if not isinstance(path, str | Path):
            raise CallTypeError(f"a store is given by its path (str or Path), not by {type(path).__name__}.")
        self.path = Path(path)
        attributes = dfx_attributes(self.path)
        if attributes is None:
            raise StoreError(f"{path} is no store of dfx: give a <name>.zarr that a run wrote.")
        if attributes.get("status") != "complete":
            reason = f": {attributes['failure']}" if "failure" in attributes else ""
            raise StoreError(f"{path} is {attributes.get('status')}, not complete{reason}; run the extraction again.")
        self.attrs: dict[str, Any] = attributes
        self._group = zarr.open_group(str(path), mode="r")

    @property
    def features(self) -> da.Array:
        """(N, D) lazy array."""
        return self._lazy("features")

    @property
    def coordinates(self) -> da.Array:
        """int64 (N, 4) lazy array: [x0, y0, x1, y1] at the requested resolution, end exclusive."""
        return self._lazy("coordinates")

    def to_baseline(self) -> NDArray[np.float64]:
        """float64 (N, 4): the coordinates in baseline (level 0) pixels."""
        array = self._group[self._present("coordinates")]
        assert isinstance(array, zarr.Array)
        return np.asarray(np.asarray(array[...]) * np.tile(np.asarray(array.attrs["to_baseline"], float), 2))

    def _lazy(self, name: str) -> da.Array:
        return da.from_zarr(self._group[self._present(name)])

    def _present(self, name: str) -> str:
        if name not in self._group:
            raise StoreError(f"{self.path} has no {name}: it holds loose patches, not those of a slide.")
        return name

    def __repr__(self) -> str:
        return f"Features({str(self.path)!r}, {self._group['features'].shape}, {self.attrs['encoder']['name']})"  # type: ignore[union-attr]


def open_features(path: str | Path, encoder: str | None = None) -> Features:
    """Open a complete store. `encoder`: the name that it must be of, None for whatever it is.

    Raises `StoreError` for what is no store of dfx, is not complete, or is of another encoder.
    """
    found = Features(path)
    name = found.attrs["encoder"]["name"]
    if encoder is not None and encoder != name:
        raise StoreError(f"{path} holds features of {name}, not of {encoder}.")
    return found
