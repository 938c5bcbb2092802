"""The guard: how much memory this process may take, has taken, and whether a block has room."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from distributed.system import MEMORY_LIMIT

from dfx.errors import MemoryShortage
from dfx.plan import Needs

__all__ = ["GUARD", "HARD", "Guard", "allowed", "fits", "resident", "room", "trim"]

CGROUP, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
V2 = "memory.max", "memory.current", "inactive_file"
V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
HARD = 95
"""Percent of the limit that is never planned to be passed; Dask kills workers there."""
FRESH = 0.5
"""Seconds for which what was measured of memory holds: it takes as long as a block that does little."""
WAIT = 30
"""Seconds that a block waits for others of its process to end before it gives up."""


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(psutil.Process().memory_info().rss)


def cgroups(root: Path = CGROUP, own: Path = OWN) -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of each control group that this process is in and that has a limit.

    A container's, or that of a batch job, whose processes see the host's tree; and those above it. Their other
    processes count too, which this process's own figures miss; cached files do not count as used.
    """
    places = {(root, *V2): None, (root / "memory", *V1): None}
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory") or "memory" in controllers.split(","):
            base, names = (root / "memory", V1) if controllers else (root, V2)
            parts = path.strip("/").split("/")
            places |= {(base.joinpath(*parts[:n]), *names): None for n in range(1, len(parts) + 1)}
    for folder, limit, used, cache in places:
        try:
            most = int((folder / limit).read_text())
            taken = int((folder / used).read_text())
            lines = (folder / "memory.stat").read_text().splitlines()
        except (OSError, ValueError):  # not there, or "max"
            continue
        yield most, taken - next((int(line.split()[1]) for line in lines if line.startswith(f"{cache} ")), 0)


def allowed() -> int:
    """Bytes that this process may take: the least of host, control groups and rlimit."""
    return min([int(MEMORY_LIMIT), *(most for most, _ in cgroups())])


def room(threshold: float, limit: int | None = None) -> int:
    """Bytes that may be taken before memory in use is `threshold` percent of what this process, or its container,
    may take; negative beyond it. What others leave free on the host bounds it too.

    `limit`: this process's own, as a Dask worker has it; None: all that is allowed.
    """  # noqa: D205
    in_groups = [most * threshold / 100 - used for most, used in cgroups()]
    own = (limit or MEMORY_LIMIT) * threshold / 100 - resident()
    return int(min(own, *in_groups, psutil.virtual_memory().available))


def fits(nbytes: int, threshold: float) -> bool:
    """Whether `nbytes` more keep memory in use below `threshold` percent of the limit."""
    return nbytes <= room(threshold)


def trim() -> None:
    """Give what is free but held back to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class Guard:
    """Lets the blocks of this process start while there is room; what they will take is reserved.

    A block's reservation ends when its first batch is done: from then on it is resident.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._reserved: dict[object, int] = {}
        self._shared: set[object] = set()
        self._left = 0
        """Bytes that were free when it was last measured, less what blocks have been let take since."""
        self._measured: tuple[object, float] = None, 0.0
        """For what threshold and limit, and when."""

    @contextlib.contextmanager
    def admit(
        self, key: object, needs: Needs, batch: int, threshold: float, limit: int | None
    ) -> Iterator[tuple[int, Callable[[int], None]]]:
        """Wait for room, then give the batch that there is room for, and what is to be told of batches done.

        `key`: what needs that are shared by the blocks of a process belong to. Over the threshold, what is
        free is given back; then the block waits for others to end; then its batch is halved, and
        halved again. Raises `MemoryShortage` with the figures when one patch at a time, alone, would take
        the process to 95 percent.
        """
        block = object()
        size = self._wait(block, key, needs, batch, threshold, limit)

        def settled(patches: int) -> None:
            with self._changed:
                self._reserved.pop(block, None)
                self._shared.add(key)
                self._changed.notify_all()

        try:
            yield size, settled
        finally:
            with self._changed:
                self._running -= 1
                self._reserved.pop(block, None)
                self._changed.notify_all()

    def _wait(self, block: object, key: object, needs: Needs, batch: int, threshold: float, limit: int | None) -> int:
        def needed(size: int) -> int:
            once = 0 if key in self._shared else needs.shared
            return once + needs.shared_a_patch * size + needs.of_thread(size)

        def start(size: int) -> int:
            self._running += 1
            self._reserved[block] = needed(size)
            self._left -= needed(size)
            return size

        begun, asked = time.monotonic(), (threshold, limit)
        deadline = begun + WAIT
        trimmed = False
        with self._changed:
            if self._measured[0] == asked and begun - self._measured[1] < FRESH and needed(batch) <= self._left:
                return start(batch)
            while True:
                self._measured = asked, time.monotonic()
                free = self._left = room(threshold, limit) - sum(self._reserved.values())
                size = batch
                while size > 1 and needed(size) > free and not self._running:
                    size = -(-size // 2)
                # Alone, the block starts below the hard limit: what is resident without it is not ours to shrink.
                alone = trimmed and not self._running and needed(size) <= room(HARD, limit)
                if needed(size) <= free or alone:
                    return start(size)
                if not trimmed:
                    trim()
                    trimmed = True
                elif self._running and time.monotonic() < deadline:
                    self._changed.wait(timeout=1)
                    trimmed = False
                else:
                    most = (limit or allowed()) / 2**20
                    raise MemoryShortage(
                        f"no room for a block: {resident() / 2**20:,.0f} MB of {most:,.0f} MB are resident and "
                        f"{max(0, room(HARD, limit)) / 2**20:,.0f} MB are free below {HARD} percent, but "
                        f"batches of {size} take {needed(size) / 2**20:,.0f} MB: give workers more memory or fewer "
                        "threads, or use a smaller batch_size, block_size or encoder."
                    )


GUARD = Guard()
