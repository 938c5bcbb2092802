"""Mutate slides and put each through opening, reading and patches: `python fuzz.py SEED COUNT SLIDE...`.

Run in a process of its own, so that a crash is seen, with limited memory and a limit on time.
Prints what broke a rule, a line each; exits with 1 then.
"""

from __future__ import annotations

import logging
import random
import resource
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import tifffile

import dfx

SECONDS, GIB = 10, 6


def table_ranges(path: Path) -> list[tuple[int, int]]:
    """Where headers and tile tables lie."""
    ranges = [(0, 16)]
    with tifffile.TiffFile(path) as tif:
        for page in list(tif.pages)[:8]:
            ranges.append((page.offset, 2 + 12 * len(page.tags)))
            ranges += [(tag.valueoffset, min(tag.valuebytecount, 4096)) for tag in page.tags.values()]
    return ranges


def mutate(data: bytearray, ranges: list[tuple[int, int]], rng: random.Random) -> bytearray:
    """Damage a copy: bytes of headers, a cut, or a hole."""
    data = bytearray(data)
    kind = rng.random()
    if kind < 0.75:
        for _ in range(rng.choice([1, 1, 2, 4, 16])):
            start, size = rng.choice(ranges)
            at = min(len(data) - 1, start + rng.randrange(max(1, size)))
            data[at] = rng.choice([0, 1, 255, 127, rng.randrange(256)])
    elif kind < 0.9:
        del data[rng.randrange(8, len(data)) :]
    else:
        at = rng.randrange(len(data))
        size = rng.choice([16, 512, 8192])
        data[at : at + size] = bytes(min(size, len(data) - at))
    return data


def look(path: Path) -> None:
    """Use a slide as a run would, but only a little of it."""
    slide = dfx.open_slide(path)
    for n, level in enumerate(slide.levels[:4]):
        height, width = level.shape_yx
        slide.region(n, (0, 0, min(300, height), min(300, width)), rgb=False)
    if max(slide.dimensions) < 20_000:
        slide.thumbnail(64)
    grid = dfx.PatchGrid.over(slide, shape=64, stride=(2000, 2000), resolution=1, units="baseline", mask=None)
    dfx.patches(slide, grid)[:8].compute(scheduler="sync")


def alarm(*_: Any) -> None:
    raise TimeoutError(f"took more than {SECONDS} s")


def main() -> int:
    seed, count, *paths = sys.argv[1:]
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (GIB * 2**30, GIB * 2**30))
    signal.signal(signal.SIGALRM, alarm)
    sources = [(Path(p), bytearray(Path(p).read_bytes()), table_ranges(Path(p))) for p in paths]
    broken = refused = 0
    with tempfile.TemporaryDirectory() as folder:
        for i in range(int(count)):
            rng = random.Random(f"{seed}-{i}")
            path, data, ranges = rng.choice(sources)
            target = Path(folder) / f"{i}{path.suffix}"
            target.write_bytes(mutate(data, ranges, rng))
            signal.alarm(SECONDS)
            try:
                look(target)
            except dfx.DfxError as e:
                refused += 1
                if target.name not in str(e):
                    broken += 1
                    print(f"mutation {i} of {path.name}: the error does not name the file: {e}")
            except BaseException as e:
                broken += 1
                print(f"mutation {i} of {path.name}: {type(e).__name__}: {e}")
            finally:
                signal.alarm(0)
                target.unlink()
    print(f"{count} mutations, {refused} refused, {broken} broke a rule")
    return broken > 0


if __name__ == "__main__":
    sys.exit(main())
