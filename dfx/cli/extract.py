"""`dfx extract`: the features of slides into zarr stores; resumes by itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from dfx.cli import storage
from dfx.cli.codes import DONE
from dfx.errors import CallError, ClusterLost
from dfx.remote import shown

if TYPE_CHECKING:
    from dfx.run import Event


def add(commands: Any) -> None:
    """Describe the command."""
    p = commands.add_parser("extract", help="extract the features of slides into zarr stores; resumes by itself")
    p.set_defaults(command=run)
    p.add_argument(
        "slides", nargs="*", metavar="SLIDE", help="a slide's file or URL, or a quoted pattern: 'slides/*.svs'"
    )
    p.add_argument(
        "--table",
        metavar="FILE",
        help="slides of a table: .csv with columns slide, mpp, power, mask, label (slide is needed), or .txt",
    )
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
        metavar="tissue|hsv|none|PATH",
        help="which patches are kept (default: tissue, by Otsu's threshold); hsv leaves pen marks out; "
        "MODULE:FUNCTION finds tissue on a thumbnail; a file, an image or GeoJSON, is one slide's",
    )
    p.add_argument(
        "--mask-origin",
        choices=["slide", "bounds"],
        help="corner at which masks of slides with bounds (Leica SCN, MIRAX) begin: bounds for masks of QuPath, which "
        "crops these slides; slide for masks of the whole slide (default: an error if that is not certain)",
    )
    p.add_argument("--slide-mpp", type=float, metavar="X", help="µm per pixel of the slides, before what they say")
    p.add_argument("--slide-power", type=float, metavar="X", help="objective power of the slides, before what they say")
    p.add_argument("--out", required=True, metavar="DIR", help="folder of the stores, or its URL")
    p.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="a running Dask cluster (default: one inside this process; with several GPUs, a process for each)",
    )
    p.add_argument(
        "--wait",
        type=float,
        default=60,
        metavar="S",
        help="seconds to wait for the scheduler and a first worker, also when a cluster is lost on the way (60)",
    )
    for name, what in (("ca", "authority's certificate"), ("cert", "client certificate"), ("key", "client's key")):
        p.add_argument(f"--tls-{name}", metavar="PEM", help=f"{what} for tls:// schedulers (default: Dask's config)")
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
        help="fast: shrink JPEG tiles while decoding, where patches are shrunk by an even factor; on slides with "
        "subsampled chroma (4:2:0), tissue at 2x then differs by 1.3 grey levels on average and by up to 33",
    )
    p.add_argument(
        "--memory-threshold", type=float, default=80, metavar="P", help="percent of memory to stay below (default: 80)"
    )
    storage.add(p)
    p.add_argument(
        "--on-bad-tile",
        choices=["fail", "fill"],
        default="fail",
        help="fill: a tile that can't be decoded is white, and named in the store (default: its slide fails)",
    )
    p.add_argument(
        "--allow-nondeterministic",
        action="store_true",
        help="also resume half-done stores of an encoder whose features differ from run to run",
    )
    p.add_argument(
        "--block-timeout", type=float, default=3600, metavar="S", help="seconds until what hangs is given up (3600)"
    )
    p.add_argument("--metrics-port", type=int, metavar="N", help="serve counters to Prometheus at this port")
    p.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Extract the features of slides."""
    from dfx import cluster
    from dfx.counters import Counters, serve
    from dfx.extractor import DeepFeatureExtractor
    from dfx.masks import is_method
    from dfx.table import read_table, rows_of

    options = storage.options(args)
    if bool(args.slides) == bool(args.table):
        raise CallError("give slides, or --table with a file that names them.")
    if args.table:
        read_table(args.table, options)
    slides = args.table or [row.given for row in rows_of(args.slides, options)]
    method = "otsu" if args.mask in ("tissue", "none") else args.mask if is_method(args.mask) else None
    if method is None and (args.table or len(slides) > 1):
        count = "those of a table" if args.table else f"{len(slides)}"
        raise CallError(
            f"--mask {args.mask} is one slide's mask, but the slides are {count}: run each alone, "
            "or give masks in a column of --table."
        )
    model: Any = args.encoder if len(args.encoder) > 1 else args.encoder[0]
    weights: Any = args.weights[0] if args.weights and len(args.weights) == 1 else args.weights
    resolution = int(args.resolution) if args.units == "level" and args.resolution.is_integer() else args.resolution
    given = {"mpp": args.slide_mpp, "power": args.slide_power}
    tls = [args.tls_ca, args.tls_cert, args.tls_key]
    if any(tls) and not (all(tls) and str(args.scheduler).startswith("tls://")):
        raise CallError("--tls-ca, --tls-cert and --tls-key go together, and with --scheduler tls://HOST:PORT.")
    security = cluster.security_of(*tls) if any(tls) else None
    extractor = DeepFeatureExtractor(
        model, args.batch_size, weights=weights, device=args.device, verbose=not args.quiet
    )
    attempt = partial(
        extractor.run,
        slides,
        masks=None if method else [args.mask],
        patch_mode=False,
        input_resolutions=[{"resolution": resolution, "units": args.units}],
        patch_input_shape=args.patch,
        stride_shape=args.stride,
        save_dir=args.out,
        overwrite=args.overwrite,
        output_type="zarr",
        auto_get_mask=args.mask != "none",
        tissue=method or "otsu",
        mask_origin=args.mask_origin,
        reading=args.reading,
        on_bad_tile=args.on_bad_tile,
        allow_nondeterministic=args.allow_nondeterministic,
        block_timeout=args.block_timeout,
        memory_threshold=args.memory_threshold,
        wsireader_kwargs={name: value for name, value in given.items() if value is not None},
        storage_options=options,
        on_error=args.on_error,
    )
    counters = Counters()
    with nullcontext() if args.metrics_port is None else serve(counters, args.metrics_port):
        if args.scheduler is None:
            with cluster.on_this_machine(args.device) as client:
                result = attempt(client=client, notify=counters)
        else:
            connect = partial(cluster.connect, args.scheduler, security=security, wait=args.wait, workers=True)
            result = persist(connect, attempt, counters)
    assert isinstance(result, dict)
    for store in result.values():
        print(store)
    for slide, error in getattr(result, "failures", {}).items():
        print(f"dfx: {shown(str(slide))} failed: {error}", file=sys.stderr)
    return DONE


def persist(connect: Callable[[], Any], attempt: Callable[..., Any], notify: Callable[[Event], None]) -> Any:
    """Run on a cluster, and when it is lost on the next that answers, where it resumes; give up without progress."""
    from dfx.run import BlockDone, SlideDone

    moved = False

    def told(event: Event) -> None:
        nonlocal moved
        moved = moved or isinstance(event, BlockDone | SlideDone)
        notify(event)

    while True:
        moved = False
        try:
            with connect() as client:
                return attempt(client=client, notify=told)
        except ClusterLost as e:
            if not moved:
                raise
            print(f"dfx: {e} Waiting for the cluster to come back.", file=sys.stderr)
