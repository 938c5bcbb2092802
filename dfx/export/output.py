"""One file that an export writes."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from dfx.errors import CallError, StoreError

Pool: TypeAlias = Literal["mean", "max"]


@dataclass(frozen=True)
class Output:
    """A file or folder of an export."""

    path: str
    """Below the folder that is exported to."""
    write: Callable[[Path], None]
    """Writes it to a path."""
    same: Callable[[Path], bool] = lambda path: False
    """Whether what lies at a path is this already."""
    replaceable: Callable[[Path], bool] = Path.is_file
    """Whether what lies at a path may be replaced, when the user says so."""


def legible(path: str) -> str:
    """Give a path as text that a file can hold: bytes of names that are no UTF-8 are replaced."""
    return os.fsencode(path).decode("utf-8", "replace")


def plain_name(name: str) -> str:
    """Give a name as a part of a path; raises `StoreError` for one that would lead elsewhere."""
    part = legible(name).replace("/", "-")
    if part in ("", ".", "..") or "\0" in part or "\\" in part:
        raise StoreError(f"{name!r} is no name that a file can have.")
    return part


def needed(module: str) -> Any:
    """Import a library of the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise CallError(f"this needs {module.split('.')[0]} ({e}): pip install dfx[export].") from e
