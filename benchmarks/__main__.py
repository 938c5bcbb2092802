"""`python -m benchmarks reading`: print a table and write it as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

from benchmarks import reading
from benchmarks.slide import write_large_slide


def main() -> None:
    """Run a benchmark."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(required=True, dest="command", metavar="BENCHMARK")
    p = commands.add_parser("reading", help="patches a second against decoding alone and OpenSlide")
    p.add_argument("--slide", type=Path, help="a slide of 0.25 mpp (default: one is made)")
    p.add_argument("--size", type=int, default=16_000, help="pixels a side of the slide that is made")
    p.add_argument("--codec", choices=["jpeg", "jpeg2000"], default="jpeg", help="its compression")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--out", type=Path, help="where the table goes as JSON")
    args = top.parse_args()
    made = Path(tempfile.gettempdir()) / f"dfx-benchmark-{args.codec}-{args.size}.svs"
    rows = reading.measure(
        args.slide or write_large_slide(made, args.size, args.codec), rounds=args.rounds, threads=args.threads
    )
    columns = list(rows[0])
    table = [columns, *([str(row[c]) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if args.out:
        packages = ("dfx", "dask", "numpy", "imagecodecs", "tifffile", "opencv-python-headless")
        said = {"python": platform.python_version(), "cores": os.cpu_count(), "threads": args.threads}
        args.out.write_text(json.dumps({**said, **{name: version(name) for name in packages}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
