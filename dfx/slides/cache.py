"""What a process keeps of slides between tasks: the opened ones, and the tiles that it decoded last."""

from __future__ import annotations

import threading
from typing import Any

from numpy.typing import NDArray


class Opened:
    """The slides that this process has open: bounded, locked, clearable.

    A task carries a slide's address only, so each process parses a header once for many tasks.
    """

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._locks: dict[Any, threading.Lock] = {}
        self._slides: dict[Any, Any] = {}

    def get(self, key: Any, build: Any) -> Any:
        """Give the slide under `key`, building it once however many threads ask."""
        with self._lock:
            if key in self._slides:
                return self._slides[key]
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            with self._lock:
                if key in self._slides:
                    return self._slides[key]
            slide = build()
            with self._lock:
                self._slides[key] = slide
                self._locks.pop(key, None)
                while len(self._slides) > self._most:
                    self._slides.pop(next(iter(self._slides)))
            return slide

    def clear(self) -> None:
        """Forget every slide; their files close when the last user is done."""
        with self._lock:
            self._slides.clear()
            self._locks.clear()


class Tiles:
    """The tiles that this process decoded last: bounded in bytes, locked, clearable.

    Neighbouring sub-blocks and blocks share the tiles on their border, and so do patches that
    overlap; threads that work on neighbouring blocks find each other's.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        """Bytes that it may hold."""
        self._held = 0
        self._lock = threading.Lock()
        self._tiles: dict[Any, NDArray[Any]] = {}

    def __contains__(self, key: Any) -> bool:
        return key in self._tiles

    def get(self, key: Any) -> NDArray[Any] | None:
        """Give a tile, or None."""
        return self._tiles.get(key)

    def put(self, key: Any, tile: NDArray[Any]) -> None:
        """Keep a copy of a tile; the oldest beyond the bound go."""
        size = tile.nbytes
        if size > self.most // 4:
            return
        tile = tile.copy()
        with self._lock:
            if key in self._tiles:
                return
            self._tiles[key] = tile
            self._held += size
            while self._held > self.most:
                self._held -= self._tiles.pop(next(iter(self._tiles))).nbytes

    def clear(self) -> None:
        """Forget every tile."""
        with self._lock:
            self._tiles.clear()
            self._held = 0


OPENED = Opened()
TILES = Tiles(64 * 2**20)
