"""Byte ranges of a slide's file: the seam between where a slide lies and how it is decoded."""

from __future__ import annotations

import itertools
import os
import stat
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from dfx import remote
from dfx.errors import SlideError
from dfx.slides.fetch import RemoteFile

PROBE = 64 * 1024
_serials = itertools.count()


class ByteSource(Protocol):
    """The bytes of one file. Safe to use from several threads at once."""

    url: str
    """Its address as it may be told."""
    address: str
    """What opens it again; may hold a signature, so it is never told."""
    size: int
    serial: int
    """Tells this opening of a file from every other in the process: what was read through it is known by it."""
    version: str
    """Changes when the file is written anew, as far as its file system tells: "mtime:..." or "ETag:..."; may be empty.
    Unlike the identity of the content, it differs for a copy."""
    prefetches: bool
    """Whether `expect` is worth calling."""

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Give the bytes of each (offset, count), whole; raises `SlideError` when some are missing."""
        ...

    def sample(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Give the bytes of a few short ranges that lie far apart, whole, as cheaply as possible."""
        ...

    def expect(self, *runs: Sequence[tuple[int, int]]) -> None:
        """Take what this thread will read next, run after run, to be fetched meanwhile; all else is let go of."""
        ...

    def open(self) -> BinaryIO:
        """Open the file for a header parser; the caller closes it."""
        ...


class LocalFile:
    """A file on a mounted disk: one descriptor a process, positioned reads, so no seek and no lock."""

    prefetches = False

    def __init__(self, path: Path) -> None:
        self.url = self.address = str(path)
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as e:
            raise SlideError(f"{path} can't be opened: {e.strerror}. Check the path and its permissions.") from e
        self._finalizer = weakref.finalize(self, os.close, self._fd)
        found = os.fstat(self._fd)
        self.size = found.st_size
        self.version = f"mtime:{found.st_mtime_ns}"
        self.serial = next(_serials)

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Give the bytes of each (offset, count), whole; raises `SlideError` once the file was overwritten in place."""
        found = [self._read(offset, count) for offset, count in ranges]
        now = os.fstat(self._fd)
        if (now.st_size, f"mtime:{now.st_mtime_ns}") != (self.size, self.version):
            raise SlideError(f"{self.url} changed since it was opened: open it again, or restore the file.")
        return found

    sample = read

    def _read(self, offset: int, count: int) -> bytes:
        data = os.pread(self._fd, count, offset)
        while len(data) < count:  # a read may be interrupted, or meet its 2 GiB limit
            more = os.pread(self._fd, count - len(data), offset + len(data))
            if not more:
                raise SlideError(
                    f"{self.url} ends at byte {offset + len(data)}, inside a piece of {count} bytes at {offset}: "
                    "the file is truncated, or it changed while it was read; copy it again."
                )
            data += more
        return data

    def expect(self, *runs: Sequence[tuple[int, int]]) -> None:
        """Do nothing: the page cache reads ahead."""

    def open(self) -> BinaryIO:
        """Open a handle of its own."""
        return Path(self.url).open("rb")


def open_source(url: str, storage_options: Mapping[str, Any] | None = None) -> ByteSource:
    """Open the file behind a path or a URL."""
    if remote.is_remote(url):
        return RemoteFile(url, storage_options, next(_serials))
    path = remote.local_path(url)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise SlideError(f"{path} does not exist: check the path.") from None
    except (OSError, ValueError) as e:
        raise SlideError(f"{path} can't be opened ({e}): check the path and its permissions.") from e
    if stat.S_ISDIR(mode):
        raise SlideError(f"{path} is a folder, not a slide: give the slide's file.")
    if not stat.S_ISREG(mode):
        raise SlideError(f"{path} is a pipe or device, not a file: give the slide's file.")
    return LocalFile(path.absolute())
