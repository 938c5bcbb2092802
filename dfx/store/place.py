"""Where stores lie: a folder on a mounted disk, or a prefix of an object storage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from zarr.abc.store import Store as ZarrStore

from dfx import remote
from dfx.errors import CallTypeError, StoreError
from dfx.store.bucket import Bucket
from dfx.store.disk import Disk


class Place(Protocol):
    """A folder of stores, or that of one. `str` is how it is told; it pickles small.

    What can't be done is an `OSError`, as a disk raises it.
    """

    @property
    def name(self) -> str:
        """The last part of its address."""
        ...

    @property
    def output(self) -> Path | str:
        """What a run gives for it: a path, or a URL."""
        ...

    def __truediv__(self, name: str) -> Place: ...

    def exists(self) -> bool:
        """Whether anything is there."""
        ...

    def is_folder(self) -> bool:
        """Whether it is a folder, and no link to one."""
        ...

    def children(self) -> Sequence[Place]:
        """What lies directly in it, by name; raises where it is no folder."""
        ...

    def files(self) -> list[str]:
        """Name the files in it, however deep, as "features/c/0/0"."""
        ...

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Bytes of files in it, None where there is none."""
        ...

    def read(self, name: str) -> bytes:
        """Read a file in it."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write a file in it, whole or not at all."""
        ...

    def add(self, folder: str, line: str) -> None:
        """Add a line to the files of a folder in it, at little cost.

        Where the process is killed meanwhile, a part of it may be there, as a line of its own.
        """
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Write a file in it unless it is there; gives whether it was not: to one of those who try at once."""
        ...

    def remove(self, names: Iterable[str]) -> None:
        """Remove files and folders in it, those that are there, and itself when nothing is left."""
        ...

    def making(self) -> AbstractContextManager[Disk]:
        """Give a folder to make a store in, which goes with the block."""
        ...

    def take(self, made: Disk) -> bool:
        """Take what was made, in one step, unless anything is there; gives whether it did."""
        ...

    def fill(self, made: Disk, last: str) -> None:
        """Take what was made beside what is there, the file `last` last."""
        ...

    def zarr(self) -> ZarrStore | Path:
        """Give what zarr opens."""
        ...


At: TypeAlias = str | Path | Place
"""How a place may be given."""


def place_of(at: At, storage_options: Mapping[str, Any] | None = None) -> Place:
    """Give the place that a path or URL means; raises `CallTypeError` and `StoreError`."""
    if not isinstance(at, str | Path):
        if not isinstance(at, Disk | Bucket):
            raise CallTypeError(f"a folder or store is given by its path (str or Path), not by {type(at).__name__}.")
        return at
    if not remote.is_remote(at):
        return Disk(remote.local_path(at))
    url = str(at).rstrip("/")
    if remote.shown(url) != url:
        raise StoreError(
            f"{remote.shown(url)} came with a query or a password, which outputs would show: use storage_options."
        )
    return Bucket(url, remote.options_for(url, storage_options))
