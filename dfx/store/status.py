"""How far the stores of a folder are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dfx.errors import StoreError
from dfx.store.layout import dfx_attributes, encoders_in
from dfx.store.writing import Store


@dataclass(frozen=True)
class Status:
    """How far one store is."""

    path: Path
    """Its folder, or what else lies there."""
    state: Literal["complete", "partial", "failed", "foreign"]
    """"foreign": dfx did not make it."""
    done: int = 0
    """Blocks that are written."""
    blocks: int = 0
    """Blocks that there are to be."""
    reason: str = ""
    """Why it failed, or what a user should know."""


def statuses(folder: str | Path) -> list[Status]:
    """Tell of everything in an output folder, in the order of its names; raises `StoreError` where there is none."""
    place = Path(folder)
    if not place.is_dir():
        raise StoreError(f"{place} is no folder: give the one that a run wrote to.")
    return [status(path) for path in sorted(place.iterdir()) if not path.name.startswith(".")]


def status(path: Path) -> Status:
    """Tell how far a store is; a block counts when every encoder's chunk of it is there."""
    said = dfx_attributes(path) if path.is_dir() else None
    if said is None:
        return Status(path, "foreign", reason="not made by dfx")
    try:
        store = Store.at(path, encoders_in(said))
        missing, blocks = len(store.missing()), store.arrays[0].cdata_shape[0]
    except (OSError, KeyError, ValueError) as e:
        return Status(path, "failed", reason=f"its arrays can't be opened ({e}): run it again with overwrite")
    done = blocks - missing
    if said["status"] == "complete":
        if missing:
            return Status(path, "failed", done, blocks, f"complete, but {missing} of its blocks are gone: run it again")
        damaged = len(said.get("damaged_tiles", ()))
        return Status(path, "complete", done, blocks, f"{damaged} damaged tiles left white" if damaged else "")
    if said["status"] == "failed":
        return Status(path, "failed", done, blocks, str(said.get("failure", "")))
    return Status(path, "partial", done, blocks)
