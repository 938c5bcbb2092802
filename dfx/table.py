"""Which slides a call is about: a list, a table of them, or patterns of names."""

from __future__ import annotations

import csv
import glob
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dfx.errors import CallError, CallTypeError
from dfx.masks import METHODS
from dfx.remote import is_chain, is_key, is_remote, local_path, matching, read_bytes, shown, suffix
from dfx.resolution import one

COLUMNS = ("slide", "mpp", "power", "mask", "label")
SUFFIXES = (".csv", ".txt")


@dataclass(frozen=True)
class Row:
    """One slide of a call, and what was said of it."""

    given: Any
    """As the user gave it: the key of the result."""
    slide: Any
    """What is opened."""
    mpp: float | None = None
    """Microns per baseline pixel, before the file's."""
    power: float | None = None
    """Objective power, before the file's."""
    mask: str | None = None
    """A path, "tissue", a method's name or "none"; None: nothing was said."""
    label: str | None = None
    """As it stands in the table."""


def rows_of(images: Any, storage_options: Mapping[str, Any] | None = None) -> list[Row]:
    """Give the slides of a call, in order: patterns are replaced by what they match, sorted.

    `images`: a table (a path or URL that ends with .csv or .txt), a pattern, or a list of slides and patterns. A
    pattern has `*`, `?` or `[` (`**` for folders at any depth) and is no file's name as it stands. Raises
    `CallError` for a table that can't be read or a pattern that matches nothing, `CallTypeError` for what is neither.
    """
    if isinstance(images, str | Path):
        if suffix(images) in SUFFIXES:
            return read_table(str(images), storage_options)
        if not is_pattern(images):
            raise CallTypeError(
                f"images must be a list of slides (paths or Slides), a table of them (.csv, .txt) or a pattern such as "
                f"'slides/*.svs', not {shown(str(images))!r}: for one slide give a list of it."
            )
        images = [images]
    if not isinstance(images, Sequence):
        hint = "; for arrays of patches pass patch_mode=True" if isinstance(images, np.ndarray) else ""
        raise CallTypeError(f"images must be a list of slides (paths or Slides), not {type(images).__name__}{hint}.")
    found: list[Row] = []
    for image in images:
        named = matches(image, storage_options) if is_pattern(image) else [image]
        found += [Row(name, name) for name in named]
    return found


def is_pattern(image: object) -> bool:
    """Whether a slide is given by a pattern; in a URL `?` is not a wildcard, and chains have no wildcards."""
    if not isinstance(image, str | Path):
        return False
    if is_remote(image):
        url = str(image)
        return not is_chain(url) and any(c in (url if is_key(url) else url.partition("?")[0]) for c in "*[")
    return any(c in str(image) for c in "*?[") and not os.path.lexists(local_path(image))


def matches(pattern: str | Path, storage_options: Mapping[str, Any] | None) -> list[str]:
    """Give what a pattern matches, sorted; a remote file of that very name is meant itself."""
    if is_remote(pattern):
        try:
            found = matching(str(pattern), storage_options)
        except OSError as e:
            raise CallError(f"{shown(str(pattern))} can't be listed ({e}): check it and storage_options.") from None
    else:
        found = sorted(glob.glob(str(local_path(pattern)), recursive=True))  # noqa: PTH207  # absolute patterns too
    if not found:
        raise CallError(f"{shown(str(pattern))} matches no file: check the folder and the ending.")
    return found


def read_table(address: str, storage_options: Mapping[str, Any] | None = None) -> list[Row]:
    """Read a table of slides.

    .csv: comma-separated UTF-8 with a header: `slide`, and where wanted `mpp`, `power`, `mask` ("tissue",
    "hsv", "none" or a path) and `label` (kept as it stands); an empty cell says nothing. Another column is refused:
    it may be one of these, misspelt. .txt: a slide a line; empty lines and those that begin with # are left out.
    Paths are relative to the table. Raises `CallError`, naming file and line, for what can't be meant.
    """
    kind, name = suffix(address), shown(address)
    if kind not in SUFFIXES:
        raise CallError(f"{name} is no table: its name must end with {' or '.join(SUFFIXES)}.")
    try:
        data = read_bytes(address, storage_options)
        text = data.decode("utf-8-sig")  # Excel puts a mark at the start
    except UnicodeDecodeError as e:
        raise CallError(f"{name} is not UTF-8 ({e}): save it as CSV UTF-8.") from e
    except OSError as e:
        raise CallError(f"table {name} can't be read ({e}): check its path.") from e
    if kind == ".csv":
        rows = list(csv_rows(address, text))
    else:
        lines = (line.strip() for line in text.splitlines())
        rows = [Row(line, beside(address, line)) for line in lines if line and not line.startswith("#")]
    if not rows:
        raise CallError(f"{name} names no slide: give one a line{', below the header' * (kind == '.csv')}.")
    return rows


def csv_rows(address: str, text: str) -> Iterator[Row]:
    """Read the lines of a CSV table."""
    table = shown(address)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        unknown = [name for name in header if name not in COLUMNS]
        if unknown or "slide" not in header or len(set(header)) < len(header):
            problem = f"unknown columns {', '.join(map(repr, unknown))}" if unknown else f"columns {', '.join(header)}"
            raise CallError(
                f"{table}, line 1: {problem}; the first line names the columns, separated by commas, each once: "
                f"{', '.join(COLUMNS)}, of which slide is needed. Remove or rename others."
            )
        for cells in reader:
            where = f"{table}, line {reader.line_num}"
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if len(cells) != len(header):
                raise CallError(f"{where}: {len(cells)} cells for {len(header)} columns: quote cells that have commas.")
            said = {name: cell for name, cell in zip(header, cells, strict=True) if cell}
            if "slide" not in said:
                raise CallError(f"{where}: no slide: give its path.")
            mask = said.get("mask")
            yield Row(
                said["slide"],
                beside(address, said["slide"]),
                number(said, "mpp", where),
                number(said, "power", where),
                mask if mask is None or mask in ("tissue", "none", *METHODS) else beside(address, mask),
                said.get("label"),
            )
    except csv.Error as e:
        raise CallError(f"{table}, line {reader.line_num}: no CSV ({e}): check the quotes.") from e


def number(said: Mapping[str, str], name: str, where: str) -> float | None:
    """Give a cell that is a number; raises `CallError` that names file and line."""
    if name not in said:
        return None
    try:
        value = float(said[name])
    except ValueError:
        raise CallError(
            f"{where}: {name} {said[name]!r} is not a number: write it with a point, or leave it empty."
        ) from None
    return one(value, f"{where}: {name}")


def beside(address: str, path: str) -> str:
    """Give a path that stands in a table: relative ones begin at its folder."""
    if is_remote(path) or local_path(path).is_absolute():
        return path
    if is_remote(address):
        folder = address.partition("?versionId=" if is_key(address) else "?")[0].rpartition("/")[0]
        return f"{folder}/{path}"
    return str(local_path(address).parent / path)
