"""Memory that is reused, since fresh pages cost more than half of the reading speed; and its poisoning in tests."""

from __future__ import annotations

import math
import os
from collections import deque
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

POISON = os.environ.get("DFX_POISON", "") not in ("", "0")
"""Whether buffers are poisoned; read once per process."""

Array = TypeVar("Array", bound=NDArray[Any])


def unwritten(array: Array) -> Array:
    """Return an array whose contents nobody may rely on: it was just allocated, or used before.

    Every pixel buffer that is reused or uninitialised passes through here when it is handed out. With
    ``DFX_POISON=1`` in the environment its bytes are overwritten by 0xA5 and 0x5A in turn, a pattern that
    no slide has. A pixel that is neither copied from a tile nor filled is then wrong in every run, and any
    test that compares pixels fails; without poison it would show earlier pixels, which are often right.
    """
    if POISON:
        flat = array.reshape(-1).view(np.uint8)  # contiguous, so these are views
        flat[0::2], flat[1::2] = 0xA5, 0x5A
    return array


class BufferPool:
    """Reuses the memory of uint8 arrays that were given away, once the last view of an array is gone.

    The memory that was used last is taken first: it may still be in the processor's cache.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._free: deque[NDArray[np.uint8]] = deque()

    def empty(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Return an uninitialised uint8 array."""
        size = math.prod(shape)
        for _ in range(len(self._free)):
            with suppress(IndexError):  # another thread was quicker
                memory = self._free.pop()
                if memory.size == size:
                    break
                self._free.appendleft(memory)
        else:
            memory = np.empty(size, np.uint8)
        return np.asarray(_PooledMemory(unwritten(memory), self)).reshape(shape)

    def give_back(self, memory: NDArray[np.uint8]) -> None:
        """Keep memory for the next array; the oldest beyond the bound is freed."""
        self._free.append(memory)
        while sum(m.size for m in list(self._free)) > self._most:
            with suppress(IndexError):
                self._free.popleft()

    def clear(self) -> None:
        """Free all memory that is not in use."""
        self._free.clear()


class _PooledMemory:
    """The base of an array and of all its views, so it is deleted when the last of them is gone."""

    def __init__(self, memory: NDArray[np.uint8], pool: BufferPool) -> None:
        self._memory, self._pool = memory, pool
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        self._pool.give_back(self._memory)
