"""The guard: how much memory this process may still take."""

from __future__ import annotations

import psutil
from distributed.system import MEMORY_LIMIT


def available() -> int:
    """Bytes that this process may still take now: what is free on the host, and below its cgroup's limit.

    `psutil` alone reports the host inside a container; Dask's limit is the least of host, cgroup and rlimit.
    """
    return int(max(0, min(psutil.virtual_memory().available, MEMORY_LIMIT - psutil.Process().memory_info().rss)))


def fits(nbytes: int, threshold: float) -> bool:
    """Whether `nbytes` more keep memory in use below `threshold` percent of the limit."""
    return bool(nbytes <= available() - (1 - threshold / 100) * MEMORY_LIMIT)
