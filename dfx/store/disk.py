"""A store's place on a mounted disk."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

WRITER = uuid.uuid4().hex
"""Names this process among those that write to a store."""
STALE = 3600
"""Seconds after which a store that is being made belongs to a run that was killed; it takes less than one."""
NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST)
TRIES = 100
"""Times that others may remove, or write into, a folder while it is removed."""


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

    def children(self) -> list[Disk]:
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
        make_folder(target.parent)
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

    def add(self, folder: str, line: str) -> None:
        """Add a line to this process's own file there: making a file costs ten times as much."""
        file = self.path / folder / f"{WRITER}.jsonl"
        data = f"\n{line}\n".encode()  # begun anew after what a full disk cut
        try:
            appended = file.open("ab", buffering=0)
        except FileNotFoundError:  # the first line, or another run of the same store has just removed the folder
            make_folder(file.parent)
            appended = file.open("ab", buffering=0)
        with appended:
            if appended.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

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
            if node.is_symlink() or not node.is_dir():
                try:
                    node.unlink(missing_ok=True)
                    continue
                except IsADirectoryError:  # another run has made this folder since
                    pass
            remove_folder(node)
        try:
            self.path.rmdir()
        except OSError as e:
            if e.errno not in (errno.ENOENT, *NOT_EMPTY):
                raise

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
        """Rename what was made to it, which fails where anything is; sweep up what killed runs were making there."""
        for old in self.path.parent.glob(f".*.{'[0-9a-f]' * 32}.partial"):
            with suppress(FileNotFoundError):  # its run has just renamed it
                if made.path.stat().st_mtime - old.stat().st_mtime > STALE:
                    shutil.rmtree(old)
        try:
            made.path.rename(self.path)
        except OSError as e:
            if e.errno not in NOT_EMPTY:
                raise
            return False
        return True

    def fill(self, made: Disk, last: str) -> None:
        """Rename what was made into it."""
        make_folder(self.path)
        for node in sorted(made.path.iterdir(), key=lambda node: node.name == last):
            if (self.path / node.name).is_dir():
                remove_folder(self.path / node.name)
            node.rename(self.path / node.name)

    def zarr(self) -> Path:
        """Give the path; zarr treats a text with "::" or "://" as a URL."""
        return self.path


def make_folder(folder: Path) -> None:
    """Make a folder unless it is there."""
    with suppress(FileExistsError):  # `exist_ok=True` raises it where another run removes the folder at that moment
        folder.mkdir()


def remove_folder(folder: Path) -> None:
    """Remove a folder, also while others remove it or put a last file there."""
    for left in reversed(range(TRIES)):
        try:
            return shutil.rmtree(folder)
        except OSError as e:
            if not folder.exists():
                return
            if not left or e.errno not in (errno.ENOENT, *NOT_EMPTY):
                raise
