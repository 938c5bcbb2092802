"""`dfx export`: stores as other tools' files."""

from __future__ import annotations

import argparse
from typing import Any

from dfx.cli.codes import DONE


def add(commands: Any) -> None:
    """Describe the command."""
    from dfx.export import FORMATS, POOLS

    p = commands.add_parser("export", help="write stores as the files of TRIDENT, CLAM, STAMP, AnnData or SpatialData")
    p.set_defaults(command=run)
    p.add_argument("stores", nargs="+", metavar="STORE", help="a store, or a folder of stores")
    p.add_argument("--to", required=True, choices=FORMATS, help="whose files")
    p.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    p.add_argument("--encoder", metavar="NAME", help="whose features (default: all, where the format has a place)")
    p.add_argument("--pool", choices=POOLS, help="trident: a slide's mean or maximum beside its patches' features")
    p.add_argument("--overwrite", action="store_true", help="replace files that are there")


def run(args: argparse.Namespace) -> int:
    """Export stores; prints what they became."""
    from dfx.export import export

    written = export(args.stores, args.to, args.out, encoder=args.encoder, pool=args.pool, overwrite=args.overwrite)
    for path in written:
        print(path)
    return DONE
