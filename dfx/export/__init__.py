"""Stores as other tools' files: each format says which files a store becomes, `export` writes them."""

from __future__ import annotations

import shutil
import uuid
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from dfx.errors import CallError, StoreError
from dfx.export.h5 import clam, stamp, trident
from dfx.export.output import Output, Pool
from dfx.export.source import Source
from dfx.export.tables import anndata, spatialdata
from dfx.remote import is_remote, local_path, shown
from dfx.store import check_folder, statuses

__all__ = ["FORMATS", "POOLS", "Format", "Pool", "export"]

Format: TypeAlias = Literal["trident", "clam", "stamp", "anndata", "spatialdata"]
LAYOUTS: dict[Format, Callable[[Source], list[Output]]] = {
    "trident": trident,
    "clam": clam,
    "stamp": stamp,
    "anndata": anndata,
    "spatialdata": spatialdata,
}
FORMATS = tuple(LAYOUTS)
POOLS: tuple[Pool, ...] = get_args(Pool)


def export(
    stores: str | Path | Sequence[str | Path],
    to: Format,
    out: str | Path,
    *,
    encoder: str | None = None,
    pool: Pool | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write stores as the files that another tool reads; gives what was written, in order.

    `stores`: one store, several, or folders of them, whose complete ones are taken (with a warning
    that names the others). `to`, and what is then below `out`:

    - "trident": `<mag>x_<size>px_<overlap>px_overlap/` with `patches/<name>_patches.h5` and
      `features_<encoder>/<name>.h5`, and `slide_features_<pool>-<encoder>/<name>.h5` where `pool` is "mean" or "max"
    - "clam": `h5_files/<name>.h5`, `pt_files/<name>.pt`, `patches/<name>.h5`
    - "stamp": `<encoder>/<name>.h5`, positions in µm
    - "anndata": `<name>.h5ad`
    - "spatialdata": `<name>.zarr` as LazySlide has it

    Positions in level-0 pixels are rounded to the nearest whole one, halves to the even one. `encoder`: whose
    features; None takes all where the layout has a place for each (trident, stamp, spatialdata). Features
    are copied some thousand rows at a time, whatever their number. A file is there whole or not at all.

    Raises `StoreError` for a store that isn't complete or lacks what the format needs, and `CallError` where two
    files would have one name, or one is there already and `overwrite` is not set: all before anything is written.
    """
    if to not in LAYOUTS:
        raise CallError(f"features are exported to {', '.join(FORMATS)}, not to {to!r}.")
    if pool is not None and (to != "trident" or pool not in POOLS):
        raise CallError(f"pool is {' or '.join(POOLS)} of a trident export, not {pool!r} of {to}.")
    folder = on_disk(out)
    check_folder(folder)
    outputs: dict[Path, Output] = {}
    for path in find(stores):
        for output in LAYOUTS[to](Source(path, encoder, pool)):
            place = folder / output.path
            if place in outputs:
                raise CallError(f"{path} and another store both become {place}: export one of them to another folder.")
            outputs[place] = output
    kept = {place for place, output in outputs.items() if place.exists() and output.same(place)}
    for place, output in outputs.items():
        if not place.exists() or place in kept:
            continue
        if not output.replaceable(place):
            raise StoreError(f"{place} was not exported by dfx, so it is left alone: move it, or give another folder.")
        if not overwrite:
            raise CallError(f"{place} exists: pass overwrite=True (--overwrite) to replace it, or another folder.")
    for place, output in outputs.items():
        if place not in kept:
            put(output, place)
    return list(outputs)


def find(stores: str | Path | Sequence[str | Path]) -> list[Path]:
    """Give the stores that are meant: those given, and the complete ones of folders that are none themselves."""
    given = [stores] if isinstance(stores, str | Path) else stores
    if not given:
        raise CallError("there is no store to export: give the <name>.zarr of a run, or its folder.")
    found: list[Path] = []
    for path in map(on_disk, given):
        if (path / "zarr.json").exists() or not path.is_dir():
            found.append(path)
            continue
        inside = [status for status in statuses(path) if status.state != "foreign"]
        complete = [path / status.name for status in inside if status.state == "complete"]
        if not complete:
            raise StoreError(f"{path} has no complete store: `dfx status {path}` says how far they are.")
        found += complete
        if len(complete) < len(inside):
            left = ", ".join(status.name for status in inside if status.state != "complete")
            warnings.warn(f"not complete, so not exported: {left} of {path}.", UserWarning, stacklevel=3)
    return list(dict.fromkeys(found))


def on_disk(path: str | Path) -> Path:
    """Give a path made absolute; raises `StoreError` for a URL."""
    if is_remote(path):
        raise StoreError(f"{shown(str(path))} is not on a mounted disk, where files are exported from and to: copy it.")
    return local_path(path).expanduser().absolute()


def put(output: Output, place: Path) -> None:
    """Write an output beside its place and move it there, so that it is there whole or not at all."""
    part = place.with_name(f".{place.name[-100:]}.{uuid.uuid4().hex[:8]}.partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        output.write(part)
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        part.replace(place)
    except OSError as e:
        raise StoreError(f"{place} can't be written ({e}): check the disk and its permissions.") from e
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)
