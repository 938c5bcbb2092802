"""Where stores lie: a folder on a mounted disk, or a prefix of an object storage. The difference is here alone."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

from zarr.abc.store import ByteRequest
from zarr.abc.store import Store as ZarrStore
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore

from dfx import remote
from dfx.errors import CallTypeError, StoreError

T = TypeVar("T")

STALE = 3600
"""Seconds after which a store that is being made belongs to a run that was killed; it takes less than one."""


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

    def children(self) -> list[Place]:
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

    def zarr(self) -> ZarrStore | str:
        """Give what zarr opens."""
        ...


@dataclass(frozen=True)
class Disk:
    """A folder on a mounted disk."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Disk:
        return Disk(self.path / name)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def output(self) -> Path:
        """The path."""
        return self.path

    def exists(self) -> bool:
        """Whether anything is there."""
        return self.path.exists()

    def is_folder(self) -> bool:
        """Whether it is a folder, and no link to one."""
        return self.path.is_dir() and not self.path.is_symlink()

    def children(self) -> list[Place]:
        """What lies directly in it, by name."""
        return [Disk(path) for path in sorted(self.path.iterdir())]

    def files(self) -> list[str]:
        """Name the files in it, however deep."""
        return [file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if not file.is_dir()]

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Bytes of files in it, None where there is none."""
        return [self._size(name) for name in names]

    def _size(self, name: str) -> int | None:
        try:
            return (self.path / name).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        """Read a file in it."""
        return (self.path / name).read_bytes()

    def _whole(self, name: str, data: bytes) -> tuple[Path, Path]:
        target = self.path / name
        target.parent.mkdir(exist_ok=True)
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
        part.write_bytes(data)
        return part, target

    def write(self, name: str, data: bytes) -> None:
        """Write a file in it, by an atomic rename."""
        try:
            part, target = self._whole(name, data)
            part.replace(target)
        except FileNotFoundError:  # another run of the same store has just removed the file's folder
            part, target = self._whole(name, data)
            part.replace(target)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file in it unless it is there, by a link, which fails where there is one."""
        part, target = self._whole(name, data)
        try:
            os.link(part, target)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            with suppress(FileExistsError), target.open("xb") as file:
                file.write(data)
                return True
            return False
        finally:
            part.unlink()
        return True

    def remove(self, names: Iterable[str]) -> None:
        """Remove files and folders in it, and itself when nothing is left."""
        for name in names:
            node = self.path / name
            if node.is_dir() and not node.is_symlink():
                shutil.rmtree(node)
            else:
                node.unlink(missing_ok=True)
        if self.path.exists() and not any(self.path.iterdir()):
            self.path.rmdir()

    @contextmanager
    def making(self) -> Iterator[Disk]:
        """Give a folder beside it, which can be renamed to it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.name}.{uuid.uuid4().hex}.partial")
        try:
            yield Disk(part)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def take(self, made: Disk) -> bool:
        """Rename what was made to it, which fails where anything is; sweep up what killed runs were making."""
        for old in self.path.parent.glob(f".{glob.escape(self.name)}.*.partial"):
            with suppress(FileNotFoundError):  # its run has just renamed it
                if made.path.stat().st_mtime - old.stat().st_mtime > STALE:
                    shutil.rmtree(old)
        try:
            made.path.rename(self.path)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
        return True

    def fill(self, made: Disk, last: str) -> None:
        """Rename what was made into it."""
        self.path.mkdir(exist_ok=True)
        for node in sorted(made.path.iterdir(), key=lambda node: node.name == last):
            if (self.path / node.name).is_dir():
                shutil.rmtree(self.path / node.name)
            node.rename(self.path / node.name)

    def zarr(self) -> str:
        """Give the path."""
        return str(self.path)


@dataclass(frozen=True)
class Bucket:
    """A prefix of an object storage, or of what else fsspec writes to."""

    url: str
    options: Mapping[str, Any] = field(repr=False)
    """Of its file system; never told."""

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Bucket:
        return Bucket(f"{self.url}/{name}", self.options)

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition("/")[2]

    @property
    def output(self) -> str:
        """The URL."""
        return self.url

    def _do(self, work: Callable[[Any, str], T], name: str = "") -> T:
        url = f"{self.url}/{name}" if name else self.url
        fs, path = remote.filesystem(url, self.options)
        return remote.patiently(lambda: work(fs, path), url, self.options)

    def exists(self) -> bool:
        """Whether any object is there or below."""
        return self._type() is not None

    def is_folder(self) -> bool:
        """Whether there are objects below."""
        return self._type() == "directory"

    def _type(self) -> str | None:
        def look(fs: Any, path: str) -> str:
            fs.invalidate_cache()  # others write there too
            return str(fs.info(path)["type"])

        try:
            return self._do(look)
        except FileNotFoundError:
            return None

    def children(self) -> list[Place]:
        """What lies directly in it, by name."""

        def listed(fs: Any, path: str) -> list[str]:
            fs.invalidate_cache()
            return [str(one).rstrip("/") for one in fs.ls(path, detail=False) if str(one).rstrip("/") != path]

        return [self / one.rpartition("/")[2] for one in sorted(self._do(listed))]

    def files(self) -> list[str]:
        """Name the objects below it."""
        return list(self._found())

    def _found(self) -> dict[str, int]:
        def find(fs: Any, path: str) -> dict[str, int]:
            fs.invalidate_cache()
            found = fs.find(path, detail=True).items()
            return {str(name).removeprefix(path).lstrip("/"): int(said["size"] or 0) for name, said in found}

        return self._do(find)

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Bytes of objects below it, None where there is none: by one listing, whatever their number."""
        found = self._found()
        return [found.get(name) for name in names]

    def read(self, name: str) -> bytes:
        """Read an object below it."""
        return bytes(self._do(lambda fs, path: fs.cat_file(path), name))

    def write(self, name: str, data: bytes) -> None:
        """Write an object below it; a put is atomic."""
        self._do(lambda fs, path: fs.pipe_file(path, data), name)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object below it unless it is there, by a create-only put where the storage has it."""
        with suppress(FileExistsError):
            self._do(lambda fs, path: fs.pipe_file(path, data, mode="create"), name)
            return True
        return False

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects and prefixes below it."""
        for name in names:
            with suppress(FileNotFoundError):
                self._do(lambda fs, path: fs.rm(path, recursive=True), name)

    @contextmanager
    def making(self) -> Iterator[Disk]:
        """Give a folder on this machine's disk."""
        with tempfile.TemporaryDirectory(prefix="dfx-making-") as folder:
            yield Disk(Path(folder))

    def take(self, made: Disk) -> bool:
        """Put what was made there; of several who try at once, one puts the file that makes it a store."""
        if self.exists():
            return False
        self.fill(made, "zarr.json")
        return True

    def fill(self, made: Disk, last: str) -> None:
        """Put what was made there, `last` by a create-only put."""
        for name in made.files():
            if name != last:
                self.write(name, made.read(name))
        self.create(last, made.read(last))

    def zarr(self) -> ZarrStore:
        """Give what zarr opens."""
        return Objects.of(self)


class Objects(FsspecStore):
    """zarr's store over a place: it tries again what fails for the moment, and tells no secret."""

    place: Bucket

    @classmethod
    def of(cls, place: Bucket, read_only: bool = False) -> Objects:
        """Open the store of a place."""
        fs, path = remote.filesystem(place.url, place.options, asynchronous=True)
        fs.invalidate_cache()
        made = cls(fs, read_only=read_only, path=path)
        made.place = place
        return made

    def with_read_only(self, read_only: bool = False) -> Objects:
        """Give the same store, which may be written or not."""
        return self.of(self.place, read_only)

    def __reduce__(self) -> tuple[Any, ...]:
        return Objects.of, (self.place, self.read_only)

    async def _do(self, work: Callable[[], Awaitable[T]]) -> T:
        return await remote.patiently_async(work, self.place.url, self.place.options)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Read an object, None where there is none."""
        return await self._do(lambda: super(Objects, self).get(key, prototype, byte_range))

    async def set(self, key: str, value: Buffer, byte_range: tuple[int, int] | None = None) -> None:
        """Write an object."""
        await self._do(lambda: super(Objects, self).set(key, value, byte_range))

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Name what lies below a prefix, as it is now."""
        self.fs.invalidate_cache()
        async for name in super().list_dir(prefix):
            yield name


At: TypeAlias = str | Path | Place
"""How a place may be given."""


def place_of(at: At, storage_options: Mapping[str, Any] | None = None) -> Place:
    """Give the place that a path or URL means; raises `CallTypeError` and `StoreError`."""
    if not isinstance(at, str | Path):
        if not isinstance(at, Disk | Bucket):
            raise CallTypeError(f"a folder or store is given by its path (str or Path), not by {type(at).__name__}.")
        return at
    if not remote.is_remote(at):
        return Disk(Path(str(at).removeprefix("file://")))
    url = str(at).rstrip("/")
    if remote.shown(url) != url:
        raise StoreError(
            f"{remote.shown(url)} came with a query or a password, which outputs would show: use storage_options."
        )
    return Bucket(url, remote.options_for(url, storage_options))
