"""Telling a source which bytes are wanted next, so that it fetches them while tiles are decoded."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Set
from typing import TypeAlias

from dfx.slides.level import TileGrid
from dfx.slides.source import ByteSource

At: TypeAlias = tuple[int, int]
"""(row, column) of a tile."""
AHEAD = 4 * 2**20
"""Bytes that are told of at a time: what is fetched while as many are decoded."""


def announced(
    source: ByteSource, part: TileGrid, tiles: Collection[At], later: Collection[At], held: Set[At]
) -> Iterator[At]:
    """Give tiles one by one, while the source is told of them in runs of `AHEAD` bytes, each a run before its turn.

    `later`: tiles of the next call, of which a run is told of with the last ones. `held`: those that are not read.
    """

    def pieces(at: At) -> list[tuple[int, int]]:
        found = [] if at in held else part.pieces(*at)
        return [one for one in found if one[0] >= 0 and 0 < one[1] <= source.size - one[0]]  # others are refused

    def runs(tiles: Collection[At]) -> Iterator[tuple[list[At], list[tuple[int, int]]]]:
        run, ranges, size = list[At](), list[tuple[int, int]](), 0
        for at in tiles:
            found = pieces(at)
            if size and size + sum(count for _, count in found) > AHEAD:
                yield run, ranges
                run, ranges, size = [], [], 0
            run.append(at)
            ranges += found
            size += sum(count for _, count in found)
        yield run, ranges

    _, last = next(runs(later))
    try:
        turns = list(runs(tiles))
        for n, (run, ranges) in enumerate(turns):
            source.expect(ranges, turns[n + 1][1] if n + 1 < len(turns) else last)
            yield from run
    finally:
        source.expect(last)
