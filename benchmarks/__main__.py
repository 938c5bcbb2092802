"""`python -m benchmarks reading | overlap`: print a table and write it as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

from benchmarks import overlap, reading
from benchmarks.slide import write_large_slide


def main() -> None:
    """Run a benchmark."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--slide", type=Path, help="a slide of 0.25 mpp (default: one is made)")
    common.add_argument("--size", type=int, default=16_000, help="pixels a side of the slide that is made")
    common.add_argument("--codec", choices=["jpeg", "jpeg2000"], default="jpeg", help="its compression")
    common.add_argument("--threads", type=int, default=2)
    common.add_argument("--rounds", type=int, default=5)
    common.add_argument("--out", type=Path, help="where the table goes as JSON")
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(required=True, dest="command", metavar="BENCHMARK")
    commands.add_parser("reading", parents=[common], help="patches a second against decoding alone and OpenSlide")
    p = commands.add_parser("overlap", parents=[common], help="how busy the engine keeps an emulated device")
    p.add_argument("--rates", type=int, nargs="+", default=[1500, 3000], help="patches a second of the device")
    args = top.parse_args()
    made = Path(tempfile.gettempdir()) / f"dfx-benchmark-{args.codec}-{args.size}.svs"
    slide = args.slide or write_large_slide(made, args.size, args.codec)
    if args.command == "reading":
        rows = reading.measure(slide, rounds=args.rounds, threads=args.threads)
    else:
        rows = overlap.measure(slide, rates=args.rates, rounds=args.rounds, threads=args.threads)
    columns = list(rows[0])
    table = [columns, *([str(row[c]) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if args.out:
        packages = ("dfx", "dask", "numpy", "imagecodecs", "tifffile", "opencv-python-headless", "torch")
        said = {"python": platform.python_version(), "cores": os.cpu_count(), "threads": args.threads}
        args.out.write_text(json.dumps({**said, **{name: version(name) for name in packages}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
