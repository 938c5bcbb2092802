"""How far the stores of a folder are."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from dfx.errors import DfxError, StoreError
from dfx.store.layout import dfx_attributes, encoders_in
from dfx.store.place import At, Place, place_of
from dfx.store.writing import Store

State: TypeAlias = Literal["complete", "partial", "failed", "foreign"]
AT_ONCE = 16
"""Stores that are looked at together: each takes a few requests where they lie in a bucket."""


@dataclass(frozen=True)
class Status:
    """How far one store is."""

    path: Path | str
    """Its folder (`Path` when local, `str` URL when remote), or what else lies there."""
    name: str
    """The last part of it."""
    state: State
    """"foreign": dfx did not make it."""
    done: int = 0
    """Blocks that are written."""
    blocks: int = 0
    """Blocks that there are to be."""
    reason: str = ""
    """Why it failed, or what a user should know."""


def statuses(folder: At, storage_options: Mapping[str, Any] | None = None) -> list[Status]:
    """Tell of everything in an output folder, in the order of its names; raises `StoreError` where there is none."""
    place = place_of(folder, storage_options)
    try:
        found = [child for child in place.children() if not child.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{place} is no folder: give the one that a run wrote to.") from None
    except OSError as e:
        raise StoreError(f"{place} can't be listed ({e}): check its permissions and storage_options.") from None
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(status, found))


def status(place: Place) -> Status:
    """Tell how far a store is; a block counts when every encoder's chunk of it is there."""

    def told(state: State, done: int = 0, blocks: int = 0, reason: str = "") -> Status:
        return Status(place.output, place.name, state, done, blocks, reason)

    try:
        said = dfx_attributes(place)
        if said is None:
            return told("foreign", reason="not made by dfx")
        store = Store.at(place, encoders_in(said))
        missing, blocks = len(store.missing()), store.arrays[0].cdata_shape[0]
    except (DfxError, OSError, KeyError, ValueError) as e:
        return told("failed", reason=f"its arrays can't be opened ({e}): run it again with overwrite")
    done = blocks - missing
    if said["status"] == "complete":
        if missing:
            return told("failed", done, blocks, f"complete, but {missing} of its blocks are gone: run it again")
        damaged = len(said.get("damaged_tiles", ()))
        return told("complete", done, blocks, f"{damaged} damaged tiles left white" if damaged else "")
    if said["status"] == "failed":
        return told("failed", done, blocks, str(said.get("failure", "")))
    return told("partial", done, blocks)
