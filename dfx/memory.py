"""The guard: how much memory this process may take, has taken, and whether a block has room."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from distributed.system import MEMORY_LIMIT

from dfx.errors import MemoryShortage
from dfx.plan import Needs

__all__ = ["GUARD", "HARD", "MEMORY_LIMIT", "Guard", "fits", "resident", "room", "trim"]

CGROUP = Path("/sys/fs/cgroup")
HARD = 95
"""Percent of the limit that is never planned to be passed; Dask kills workers there."""
WAIT = 30
"""Seconds that a block waits for others of its process to end before it gives up."""


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(psutil.Process().memory_info().rss)


def free_in_cgroup(threshold: float = 100, root: Path = CGROUP) -> float:
    """Bytes that may be taken before this container holds `threshold` percent of its limit; infinite without one.

    Its other processes count too, which this process's own figures miss; cached files do not count.
    """
    for limit, used, stat, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        try:
            most = int((root / limit).read_text())
            taken = int((root / used).read_text())
            lines = (root / stat).read_text().splitlines()
        except (OSError, ValueError):  # not there, or "max"
            continue
        reclaimable = next((int(line.split()[1]) for line in lines if line.startswith(f"{cache} ")), 0)
        return most * threshold / 100 - taken + reclaimable
    return math.inf


def room(threshold: float, limit: int | None = None) -> int:
    """Bytes that may be taken before memory in use is `threshold` percent of what this process, or its container,
    may take; negative beyond it. What others leave free on the host bounds it too.

    `limit`: this process's own, as a Dask worker has it; None: the least of host, cgroup and rlimit.
    """  # noqa: D205
    own = (limit or MEMORY_LIMIT) * threshold / 100 - resident()
    return int(min(own, free_in_cgroup(threshold), psutil.virtual_memory().available))


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

        deadline = time.monotonic() + WAIT
        trimmed = False
        with self._changed:
            while True:
                free = room(threshold, limit) - sum(self._reserved.values())
                size = batch
                while size > 1 and needed(size) > free and not self._running:
                    size = -(-size // 2)
                # Alone, the block starts below the hard limit: what is resident without it is not ours to shrink.
                alone = trimmed and not self._running and needed(size) <= room(HARD, limit)
                if needed(size) <= free or alone:
                    self._running += 1
                    self._reserved[block] = needed(size)
                    return size
                if not trimmed:
                    trim()
                    trimmed = True
                elif self._running and time.monotonic() < deadline:
                    self._changed.wait(timeout=1)
                    trimmed = False
                else:
                    most = (limit or MEMORY_LIMIT) / 2**20
                    raise MemoryShortage(
                        f"no room for a block: {resident() / 2**20:,.0f} MB of {most:,.0f} MB are resident and "
                        f"{max(0, room(HARD, limit)) / 2**20:,.0f} MB are free below {HARD} percent, but "
                        f"batches of {size} take {needed(size) / 2**20:,.0f} MB: give workers more memory or fewer "
                        "threads, or use a smaller batch_size, block_size or encoder."
                    )


GUARD = Guard()
