"""A store's place in an object storage."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from zarr.abc.store import ByteRequest
from zarr.abc.store import Store as ZarrStore
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore

from dfx import remote
from dfx.store.disk import Disk

T = TypeVar("T")


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

    def children(self) -> list[Bucket]:
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

    def add(self, folder: str, line: str) -> None:
        """Write an object of that line there: none can be appended to."""
        self.write(f"{folder}/{uuid.uuid4().hex}.jsonl", line.encode())

    def create(self, name: str, data: bytes) -> bool:
        """Write an object below it unless it is there, by a create-only put where the storage has it."""
        try:
            self._do(lambda fs, path: fs.pipe_file(path, data, mode="create"), name)
        except FileExistsError:
            self._do(lambda fs, path: fs.invalidate_cache())  # what was listed before it was there says that it is not
            return False
        return True

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
