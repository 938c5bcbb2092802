"""`dfx show`: a picture of a store."""

from __future__ import annotations

import argparse
from typing import Any

from dfx.cli import storage
from dfx.cli.codes import DONE


def add(commands: Any) -> None:
    """Describe the command."""
    p = commands.add_parser("show", help="draw a store: slide, patch grid, features as colours")
    p.set_defaults(command=run)
    p.add_argument("store", metavar="STORE")
    p.add_argument("--out", required=True, metavar="PNG")
    p.add_argument("--slide", metavar="PATH", help="where the slide lies now, if it moved")
    storage.add(p)
    p.add_argument("--encoder", metavar="NAME", help="whose features are drawn, where there are several")


def run(args: argparse.Namespace) -> int:
    """Draw a store."""
    from dfx.pictures import overview, write_png
    from dfx.slides import open_slide
    from dfx.store import open_features

    options = storage.options(args)
    features = open_features(args.store, args.encoder, options)
    slide = open_slide(args.slide, storage_options=options) if args.slide else None
    print(write_png(overview(features, slide, storage_options=options), args.out))
    return DONE
