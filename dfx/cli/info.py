"""`dfx info`: what slides are."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from dfx.cli import storage
from dfx.cli.codes import DONE, FAILURES
from dfx.errors import DfxError

if TYPE_CHECKING:
    from dfx.slides import Level


def add(commands: Any) -> None:
    """Describe the command."""
    p = commands.add_parser("info", help="say what a slide is: vendor, levels, tiles, codec, mpp, power")
    p.set_defaults(command=run)
    p.add_argument("slides", nargs="+", metavar="SLIDE")
    storage.add(p)


def run(args: argparse.Namespace) -> int:
    """Say what slides are, one after another; a bad one is a line of error."""
    from dfx.slides import open_slide

    bad, storage_options = 0, storage.options(args)
    for n, path in enumerate(args.slides):
        try:
            slide = open_slide(path, storage_options=storage_options)
        except DfxError as e:
            print(f"dfx: error: {e}", file=sys.stderr)
            bad += 1
            continue
        first = slide.levels[0]
        unknown = "unknown"
        same = slide.mpp is not None and slide.mpp[0] == slide.mpp[1]
        mpp = unknown if slide.mpp is None else f"{slide.mpp[0]:g}" if same else f"{slide.mpp[0]:g} x {slide.mpp[1]:g}"
        print(*[""] * (n > 0), slide.url, sep="\n" if n else "")
        rows = {
            "vendor": slide.vendor,
            "backend": slide.backend,
            "dimensions": f"{slide.dimensions[0]} x {slide.dimensions[1]}",
            "levels": ", ".join(f"{level.dimensions[0]} x {level.dimensions[1]}" for level in slide.levels),
            "downsamples": ", ".join(downsample(level) for level in slide.levels),
            "tile size": f"{first.tile_yx[1]} x {first.tile_yx[0]}",
            "codec": first.codec,
            "channels": f"{first.channels} x {first.dtype} ({first.colour})",
            "mpp": mpp,
            "power": unknown if slide.power is None else f"{slide.power:g}",
        }
        for name, value in [*rows.items(), *(("note", note) for note in slide.notes)]:
            print(f"  {name:<12} {value}")
    return FAILURES if bad else DONE


def downsample(level: Level) -> str:
    """Format the factor of a level; the factors of both axes if they differ by more than rounding."""
    x, y = level.downsample_xy or (level.downsample, level.downsample)
    return f"{x:g}" if abs(x - y) < 0.01 * x else f"{x:g} x {y:g}"
