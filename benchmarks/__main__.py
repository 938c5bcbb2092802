"""`python -m benchmarks BENCHMARK`: print a table and write it as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dfx
from benchmarks import devices, inference, memory, overlap, reading, remote, scale
from benchmarks.peers import ENCODERS, Peer
from benchmarks.slide import write_large_slide

Rows = list[dict[str, Any]]
SIZE = 32_000
"""Pixels per side of the slide that is made."""


def slide_of(args: argparse.Namespace) -> Path:
    """Give the slide that was asked for, or one that is made."""
    size = args.size or SIZE
    made = Path(tempfile.gettempdir()) / f"dfx-benchmark-{args.codec}-{size}.svs"
    return args.slide or write_large_slide(made, size, args.codec)


def run_reading(args: argparse.Namespace) -> Rows:
    """Reading through `dfx.patches`, against decoding alone and other tools."""
    return reading.measure(slide_of(args), rounds=args.rounds, threads=args.threads, peers=args.peer)


def run_fast(args: argparse.Namespace) -> Rows:
    """`reading="fast"` against exact reading, on slides with subsampled chroma and without: speed, pixels, features."""
    encoder = dfx.load_encoder(args.encoder, weights=args.weights)
    with tempfile.TemporaryDirectory() as folder:
        return reading.measure_fast(
            args.slide, Path(folder), size=args.size or 6144, rounds=args.rounds, threads=args.threads, encoder=encoder
        )


def run_overlap(args: argparse.Namespace) -> Rows:
    """The engine to zarr with a device that sleeps, at 65 % of the reading rate; and two encoders in one pass."""
    return overlap.measure(slide_of(args), rounds=args.rounds, threads=args.threads)


def run_inference(args: argparse.Namespace) -> Rows:
    """resnet18 on the CPU end to end, against a bare loop over tensors and against other tools."""
    peers = [peer for peer in args.peer if peer.name in ENCODERS]
    return inference.measure(slide_of(args), rounds=args.rounds, threads=args.threads, part=args.patches, peers=peers)


def run_memory(args: argparse.Namespace) -> Rows:
    """Peak memory on slides of two sizes, against the plan's projection (Linux)."""
    return memory.measure(Path(tempfile.gettempdir()), threads=args.threads, encoder=args.encoder, sizes=args.sizes)


def run_scale(args: argparse.Namespace) -> Rows:
    """Blocks that do nothing, against as many by bare Dask."""
    return scale.measure(slide_of(args), rounds=args.rounds, threads=args.threads)


def run_long(args: argparse.Namespace) -> Rows:
    """Many slides of 100 blocks that do nothing: time and memory as the run grows."""
    return scale.measure_long(slide_of(args), slides=args.slides, executed=args.executed, threads=args.threads)


def run_remote(args: argparse.Namespace) -> Rows:
    """A slide on servers: requests, bytes and speed beside the disk."""
    return remote.measure(slide_of(args), rounds=args.rounds, threads=args.threads)


def run_devices(args: argparse.Namespace) -> Rows:
    """1 to 16 devices that sleep, a worker process each."""
    return devices.measure(slide_of(args), counts=args.counts, seconds=args.seconds, rate=args.rate)


def main() -> None:
    """Run a benchmark."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--slide", type=Path, help="a slide of 0.25 mpp (default: one is made)")
    common.add_argument(
        "--size", type=int, help="pixels per side of the slide that is made (default: 32000; fast: 6144)"
    )
    common.add_argument("--codec", choices=["jpeg", "jpeg2000"], default="jpeg", help="its compression")
    common.add_argument("--threads", type=int, default=2)
    common.add_argument("--rounds", type=int, default=5)
    common.add_argument("--out", type=Path, help="where the table goes as JSON")
    common.add_argument(
        "--peer", type=Peer.parse, action="append", default=[], help="another tool, NAME or NAME=ITS_PYTHON; repeatable"
    )
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="BENCHMARK")

    def add(name: str, work: Callable[[argparse.Namespace], Rows]) -> argparse.ArgumentParser:
        parser = commands.add_parser(name, parents=[common], help=str(work.__doc__).replace("%", "%%"))
        parser.set_defaults(work=work)
        return parser

    add("reading", run_reading)
    p = add("fast", run_fast)
    p.add_argument("--encoder", default="resnet18")
    p.add_argument("--weights", help="a file, or random (default: the published ones)")
    add("overlap", run_overlap)
    add("inference", run_inference).add_argument("--patches", type=int, default=1024)
    p = add("memory", run_memory)
    p.add_argument("--encoder", default="resnet18", help="runs with random weights")
    p.add_argument("--sizes", type=int, nargs="+", default=memory.SIZES)
    add("scale", run_scale)
    p = add("long", run_long)
    p.add_argument("--slides", type=int, default=1000)
    p.add_argument("--executed", type=int, default=5, help="blocks of each slide that are executed, the rest planned")
    add("remote", run_remote)
    p = add("devices", run_devices)
    p.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    p.add_argument("--seconds", type=float, default=20, help="for which each device has work, at least")
    p.add_argument("--rate", type=float, default=1000, help="patches/s of a device: a large network has 250")
    args = top.parse_args()
    if args.out and (args.out.is_dir() or not args.out.parent.is_dir()):
        top.error(f"--out {args.out} can't be written: give a file in a folder that is there")
    rows = args.work(args)
    columns = list(rows[0])
    table = [columns, *([str(row[c]) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if args.out:
        packages = ("dfx", "dask", "zarr", "numpy", "imagecodecs", "tifffile", "opencv-python-headless", "torch")
        versions = {name: version(name) for name in packages} | {peer.package: peer.version() for peer in args.peer}
        said = {"python": platform.python_version(), "cores": os.cpu_count(), "threads": args.threads, **versions}
        args.out.write_text(json.dumps({**said, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
