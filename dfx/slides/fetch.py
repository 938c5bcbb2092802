"""A slide's bytes from fsspec: the header by blocks, tiles by merged ranges that are fetched ahead."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, TypeAlias, TypeVar, cast

from dfx import remote
from dfx.errors import SlideError

T = TypeVar("T")
Range: TypeAlias = tuple[int, int]
"""(offset, count)."""

BLOCK = 256 * 1024
"""Bytes in which a header is fetched: fewer take more requests, s3fs's 50 MiB took 284 MB for one header."""
GAP = 64 * 1024
"""Ranges that lie so close are fetched as one: about what a connection gives in the time of a request."""
WASTE = 0.1
"""Share of what is asked for that may be fetched between ranges beside it."""
CHECK = 10.0
"""Seconds between two looks whether the file is still the one that was opened."""
VERSION = ("ETag", "etag", "generation", "Last-Modified", "LastModified", "last_modified", "mtime", "created")
"""What file systems tell of a file that changes when it is written anew, the best first."""

_fetching = ThreadPoolExecutor(32, "dfx-fetch")
"""Threads that wait for servers: started when first needed, and idle otherwise."""


class RemoteFile:
    """A file that fsspec reaches.

    Until the first `expect` its header is being read, and blocks of it are kept; then ranges are fetched as
    they are told of, for each thread its own. `PATIENCE` bounds how long a server may fail for the moment.
    """

    prefetches = True

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None, serial: int) -> None:
        self.address = url
        self.url = remote.shown(url)
        self.serial = serial
        self._options = remote.options_for(url, storage_options)
        self._fs, self._path = remote.filesystem(url, self._options)
        said = self._patiently(lambda: self._fs.info(self._path))
        if said.get("type") == "directory":
            raise SlideError(f"{self.url} is a folder, not a slide: give the slide's file.")
        if said.get("size") is None:
            raise SlideError(f"{self.url} has no size that its server tells, so it can't be read in parts: copy it.")
        self.size = int(said["size"])
        self.version = version(said)
        self._checked = time.monotonic()
        self._header: Blocks | None = Blocks(lambda start, stop: self._get([(start, stop)])[0], self.size)
        self._mine = threading.local()

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """Give the bytes of each (offset, count), whole: at once where they were expected."""
        header = self._header
        if header is not None:
            return [header.read(offset, count) for offset, count in ranges]
        pieces: dict[Range, Piece] = getattr(self._mine, "pieces", {})
        missing = [one for one in ranges if one not in pieces]
        if missing:
            pieces = pieces | self._fetch(missing)
        return [pieces[one].bytes(one[1]) for one in ranges]

    def sample(self, ranges: Sequence[Range]) -> list[bytes]:
        """Give the bytes of ranges that lie far apart, fetched together; later reads do not reuse them."""
        pieces = self._fetch(ranges)
        return [pieces[one].bytes(one[1]) for one in ranges]

    def expect(self, *runs: Sequence[Range]) -> None:
        """Begin to fetch what this thread will read next, run after run, and let go of all else."""
        self._header = None
        before: dict[Range, Piece] = getattr(self._mine, "pieces", {})
        pieces: dict[Range, Piece] = {}
        for run in runs:
            pieces |= {one: before[one] for one in run if one in before}
            pieces |= self._fetch([one for one in run if one not in pieces])
        self._mine.pieces = pieces

    def open(self) -> BinaryIO:
        """Open a handle for a header parser."""
        return cast(BinaryIO, io.BufferedReader(Handle(self)))

    def _fetch(self, ranges: Sequence[Range]) -> dict[Range, Piece]:
        spans = merged(ranges)
        if not spans:
            return {}
        future = _fetching.submit(self._get, spans)
        pieces, n = {}, 0
        for offset, count in sorted(set(ranges)):
            while offset >= spans[n][1]:
                n += 1
            pieces[offset, count] = Piece(future, n, offset - spans[n][0])
        return pieces

    def _get(self, spans: list[Range]) -> list[bytes]:
        """Fetch each (start, stop); what came is not fetched again for the sake of what did not."""
        found: dict[Range, bytes] = {}

        def get() -> None:
            left = [span for span in spans if span not in found]
            starts, stops = zip(*left, strict=True)
            got = self._fs.cat_ranges([self._path] * len(left), list(starts), list(stops), on_error="return")
            found.update((span, data) for span, data in zip(left, got, strict=True) if not isinstance(data, Exception))
            for failure in got:
                if isinstance(failure, Exception):
                    raise failure

        self._patiently(get)
        for (start, stop), data in found.items():
            if len(data) != stop - start:
                self._check(0)
                raise SlideError(
                    f"{self.url} gave {len(data)} bytes for the {stop - start} at {start}: its server does not serve "
                    "parts of files, or the file changed while it was read; copy it to where it can be read in parts."
                )
        self._check(CHECK)
        return [found[span] for span in spans]

    def _check(self, every: float) -> None:
        """Raise `SlideError` when the file was written anew; asked after what is thereby known to be good."""
        now = time.monotonic()
        if now - self._checked < every:
            return
        self._checked = now
        self._fs.invalidate_cache(self._path)
        said = self._patiently(lambda: self._fs.info(self._path))
        if (said.get("size"), version(said)) != (self.size, self.version):
            raise SlideError(f"{self.url} changed since it was opened: open it again, or restore the file.")

    def _patiently(self, work: Callable[[], T]) -> T:
        try:
            return remote.patiently(work, self.address, self._options)
        except FileNotFoundError as e:
            raise SlideError(f"{self.url} does not exist: check the URL ({e}).") from None
        except OSError as e:
            raise SlideError(f"{self.url} can't be read: {e}.") from None


class Piece:
    """A range within what is being fetched."""

    __slots__ = ("_future", "_offset", "_span")

    def __init__(self, future: Future[list[bytes]], span: int, offset: int) -> None:
        self._future, self._span, self._offset = future, span, offset

    def bytes(self, count: int) -> bytes:
        """Wait for it; raises what fetching it raised."""
        return self._future.result()[self._span][self._offset : self._offset + count]


def merged(ranges: Sequence[Range]) -> list[Range]:
    """Give the (start, stop) to fetch for (offset, count) ranges, in the order of the file.

    The closest are joined first, at most `GAP` apart, until `WASTE` of what is asked for lies between.
    """
    spans: list[list[int]] = []
    for start, stop in sorted((offset, offset + count) for offset, count in set(ranges)):
        if spans and start <= spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], stop)
        else:
            spans.append([start, stop])
    left = WASTE * sum(stop - start for start, stop in spans)
    joined = set()
    for gap, n in sorted((spans[n + 1][0] - spans[n][1], n) for n in range(len(spans) - 1)):
        left -= gap
        if gap > GAP or left < 0:
            break
        joined.add(n)
    found: list[Range] = []
    for n, (start, stop) in enumerate(spans):
        found.append((found.pop()[0], stop) if n - 1 in joined else (start, stop))
    return found


def version(said: Mapping[str, Any]) -> str:
    """Give the server's version of a file, which changes when the file is replaced; "" if there is no version."""
    return next((f"{name}:{said[name]}" for name in VERSION if said.get(name)), "")


class Blocks:
    """The blocks of a file that its header lies in. Safe in threads."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        self._fetch, self._size = fetch, size
        self._held: dict[int, bytes] = {}
        self._lock = threading.Lock()

    def read(self, offset: int, count: int) -> bytes:
        """Give a range, fetching the blocks that are missing, neighbours at once."""
        first, last = offset // BLOCK, (offset + max(count, 1) - 1) // BLOCK
        with self._lock:
            missing = [n for n in range(first, last + 1) if n not in self._held]
            if missing:
                start, stop = missing[0] * BLOCK, min((missing[-1] + 1) * BLOCK, self._size)
                data = self._fetch(start, stop)
                self._held |= {n: data[n * BLOCK - start : (n + 1) * BLOCK - start] for n in missing}
            joined = b"".join(self._held[n] for n in range(first, last + 1))
        return joined[offset - first * BLOCK : offset - first * BLOCK + count]


class Handle(io.RawIOBase):
    """A file object over a source, for a header parser."""

    def __init__(self, source: RemoteFile) -> None:
        self._source = source
        self._at = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position."""
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._source.size}[whence]
        if at < 0:
            raise OSError(f"position {at} lies before the file")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        """Read at most as many bytes as the buffer takes."""
        count = max(0, min(len(buffer), self._source.size - self._at))
        if count:
            buffer[:count] = self._source.read([(self._at, count)])[0]
            self._at += count
        return count
