"""The command line: `dfx extract | info | status | encoders | show | demo`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

from dfx.errors import CallError, DfxError, RunError

DONE, FAILURES, BAD_CALL, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; gives the exit code: 0 done, 1 some slides failed, 2 can't be done as asked."""
    # What matters of a header, a task or a slide is said once, by the command itself.
    for name in ("tifffile", "distributed", "dfx"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    args = parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"dfx: warning: {message}", file=sys.stderr)
            return int(args.command(args))
    except RunError as e:
        for store in (e.result or {}).values():
            print(store)
        print(f"dfx: {e}", file=sys.stderr)
        return FAILURES
    except DfxError as e:
        print(f"dfx: error: {e}", file=sys.stderr)
        return BAD_CALL
    except KeyboardInterrupt:
        print("dfx: interrupted; the same command goes on from here.", file=sys.stderr)
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """Describe the commands."""
    top = argparse.ArgumentParser(
        prog="dfx",
        description="Deep features of whole-slide images.",
        epilog="dfx extract *.svs --encoder resnet50 --resolution 0.5 --units mpp --patch 224 --out features",
    )
    top.add_argument("--version", action="version", version=f"dfx {version('dfx')}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    p = commands.add_parser("extract", help="extract the features of slides into zarr stores; resumes by itself")
    p.set_defaults(command=extract)
    p.add_argument("slides", nargs="+", metavar="SLIDE", help="a slide's file")
    p.add_argument(
        "--encoder",
        required=True,
        action="append",
        metavar="NAME",
        help="see `dfx encoders`; may be repeated",
    )
    p.add_argument(
        "--weights",
        action="append",
        metavar="PATH|random",
        help="a weights file instead of the published ones; one for each encoder, in order, or 'random' for all",
    )
    p.add_argument("--resolution", required=True, type=float, metavar="R", help="at which patches are made")
    p.add_argument("--units", required=True, choices=["mpp", "power", "level", "baseline"], help="of the resolution")
    p.add_argument("--patch", required=True, type=int, metavar="N", help="rows and columns of a patch")
    p.add_argument("--stride", type=int, metavar="N", help="from one patch to the next (default: the patch)")
    p.add_argument(
        "--mask",
        default="tissue",
        metavar="tissue|none|PATH",
        help="which patches are kept (default: tissue); a file is one slide's",
    )
    p.add_argument("--slide-mpp", type=float, metavar="X", help="µm per pixel of the slides, before what they say")
    p.add_argument("--slide-power", type=float, metavar="X", help="objective power of the slides, before what they say")
    p.add_argument("--out", required=True, metavar="DIR", help="folder of the stores")
    p.add_argument("--scheduler", metavar="ADDRESS", help="a running Dask cluster (default: one inside this process)")
    p.add_argument("--overwrite", action="store_true", help="replace stores of another plan")
    p.add_argument(
        "--on-error",
        choices=["raise", "skip"],
        default="raise",
        help="exit with 1 (raise) or 0 (skip) when slides failed",
    )
    p.add_argument("--device", default="auto", metavar="D", help="torch device of the workers (default: auto)")
    p.add_argument("--batch-size", type=int, default=64, metavar="N", help="patches a forward pass (default: 64)")
    p.add_argument(
        "--reading",
        choices=["exact", "fast"],
        default="exact",
        help="fast: shrink JPEG tiles while decoding, where patches are shrunk by an even factor; not quite the same",
    )
    p.add_argument(
        "--memory-threshold", type=float, default=80, metavar="P", help="percent of memory to stay below (default: 80)"
    )
    p.add_argument("--storage-options", type=json.loads, metavar="JSON", help="options of the file systems")
    p.add_argument(
        "--on-bad-tile",
        choices=["fail", "fill"],
        default="fail",
        help="fill: a tile that can't be decoded is white, and named in the store (default: its slide fails)",
    )
    p.add_argument(
        "--block-timeout", type=float, default=3600, metavar="S", help="seconds until what hangs is given up (3600)"
    )
    p.add_argument("--quiet", action="store_true", help="no progress bar")

    p = commands.add_parser("info", help="say what a slide is: vendor, levels, tiles, codec, mpp, power")
    p.set_defaults(command=info)
    p.add_argument("slides", nargs="+", metavar="SLIDE")

    p = commands.add_parser("status", help="say how far the stores of a folder are")
    p.set_defaults(command=status)
    p.add_argument("folder", metavar="DIR")

    p = commands.add_parser("encoders", help="list the named encoders")
    p.set_defaults(command=encoders)

    p = commands.add_parser("show", help="draw a store: slide, patch grid, features as colours")
    p.set_defaults(command=show)
    p.add_argument("store", metavar="STORE")
    p.add_argument("--out", required=True, metavar="PNG")
    p.add_argument("--slide", metavar="PATH", help="where the slide lies now, if it moved")
    p.add_argument("--encoder", metavar="NAME", help="whose features are drawn, where there are several")

    p = commands.add_parser("demo", help="make a slide, extract features, draw them: no network, no data")
    p.set_defaults(command=run_demo)
    p.add_argument("--out", default="dfx-demo", metavar="DIR", help="folder to write to (default: dfx-demo)")
    return top


def extract(args: argparse.Namespace) -> int:
    """Extract the features of slides."""
    from dfx import cluster
    from dfx.extractor import DeepFeatureExtractor

    if args.storage_options is not None and not isinstance(args.storage_options, dict):
        raise CallError("--storage-options must be a JSON object.")
    if args.mask not in ("tissue", "none") and len(args.slides) > 1:
        raise CallError(
            f"--mask {args.mask} is one slide's mask, but there are {len(args.slides)} slides: run each alone."
        )
    model: Any = args.encoder if len(args.encoder) > 1 else args.encoder[0]
    weights: Any = args.weights[0] if args.weights and len(args.weights) == 1 else args.weights
    resolution = int(args.resolution) if args.units == "level" and args.resolution.is_integer() else args.resolution
    masks: list[Any] | None = None if args.mask in ("tissue", "none") else [args.mask] * len(args.slides)
    given = {"mpp": args.slide_mpp, "power": args.slide_power}
    with cluster.connect(args.scheduler) if args.scheduler else nullcontext() as client:
        extractor = DeepFeatureExtractor(
            model, args.batch_size, weights=weights, device=args.device, verbose=not args.quiet
        )
        result = extractor.run(
            args.slides,
            masks=masks,
            patch_mode=False,
            input_resolutions=[{"resolution": resolution, "units": args.units}],
            patch_input_shape=args.patch,
            stride_shape=args.stride,
            save_dir=args.out,
            overwrite=args.overwrite,
            output_type="zarr",
            auto_get_mask=args.mask == "tissue",
            reading=args.reading,
            on_bad_tile=args.on_bad_tile,
            block_timeout=args.block_timeout,
            memory_threshold=args.memory_threshold,
            wsireader_kwargs={name: value for name, value in given.items() if value is not None},
            storage_options=args.storage_options,
            client=client,
            on_error=args.on_error,
        )
    assert isinstance(result, dict)
    for store in result.values():
        print(store)
    for slide, error in getattr(result, "failures", {}).items():
        print(f"dfx: {slide} failed: {error}", file=sys.stderr)
    return DONE


def info(args: argparse.Namespace) -> int:
    """Say what slides are, one after another; a bad one is a line of error."""
    from dfx.slides import open_slide

    bad = 0
    for n, path in enumerate(args.slides):
        try:
            slide = open_slide(path)
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
            "dimensions": f"{slide.dimensions[0]} x {slide.dimensions[1]}",
            "levels": ", ".join(f"{level.dimensions[0]} x {level.dimensions[1]}" for level in slide.levels),
            "downsamples": ", ".join(f"{level.downsample:g}" for level in slide.levels),
            "tile size": f"{first.tile_yx[1]} x {first.tile_yx[0]}",
            "codec": first.codec,
            "channels": f"{first.channels} x {first.dtype} ({first.colour})",
            "mpp": mpp,
            "power": unknown if slide.power is None else f"{slide.power:g}",
        }
        for name, value in [*rows.items(), *(("note", note) for note in slide.notes)]:
            print(f"  {name:<12} {value}")
    return FAILURES if bad else DONE


def status(args: argparse.Namespace) -> int:
    """Say how far the stores of a folder are; gives 1 unless all of dfx's are complete."""
    from dfx.store import statuses

    found = statuses(args.folder)
    for one in found:
        share = f"{one.done / one.blocks:.0%} of {one.blocks} blocks" if one.blocks else ""
        told = "; ".join(part for part in (share if one.state in ("partial", "failed") else "", one.reason) if part)
        print(f"{one.state:<9} {one.path.name}{f'  ({told})' if told else ''}")
    counts = Counter(one.state for one in found)
    print(", ".join(f"{n} {state}" for state, n in counts.items()) or "nothing here")
    return FAILURES if counts["partial"] or counts["failed"] else DONE


def encoders(args: argparse.Namespace) -> int:
    """List the named encoders."""
    from dfx.encoders import list_encoders

    print(f"{'name':<30} {'dim':>5} {'input':>9} {'mpp':>5}  {'pooling':<9} {'precision':<10} {'license':<13} source")
    for c in list_encoders():
        size = f"{c.input_size[0]} x {c.input_size[1]}"
        print(
            f"{c.name:<30} {c.dim:>5} {size:>9} {'any' if c.mpp is None else c.mpp:>5}  "
            f"{c.pooling:<9} {c.precision:<10} {c.license:<13} {c.source}{' (gated)' if c.gated else ''}"
        )
    print("Every other timm model name works too, and any torch.nn.Module from Python.")
    return DONE


def show(args: argparse.Namespace) -> int:
    """Draw a store."""
    from dfx.pictures import overview, write_png
    from dfx.slides import open_slide
    from dfx.store import open_features

    features = open_features(args.store, args.encoder)
    print(write_png(overview(features, open_slide(args.slide) if args.slide else None), args.out))
    return DONE


def run_demo(args: argparse.Namespace) -> int:
    """Run the demonstration."""
    from dfx.demo import demo
    from dfx.store import open_features

    slide, store, picture = demo(args.out)
    features = open_features(store).features
    print(f"slide     {slide}")
    print(f"features  {store}  {features.shape[0]} patches x {features.shape[1]} (untrained resnet18: random weights)")
    print(f"picture   {picture}")
    return DONE
