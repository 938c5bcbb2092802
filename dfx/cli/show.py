"""`dfx show`: a picture of a store."""

from __future__ import annotations

import argparse
from typing import Any

from dfx.cli.codes import DONE


def add(commands: Any) -> None:
    """Describe the command."""
    p = commands.add_parser("show", help="draw a store: slide, patch grid, features as colours")
    p.set_defaults(command=run)
    p.add_argument("store", metavar="STORE")
    p.add_argument("--out", required=True, metavar="PNG")
    p.add_argument("--slide", metavar="PATH", help="where the slide lies now, if it moved")
    p.add_argument("--encoder", metavar="NAME", help="whose features are drawn, where there are several")


def run(args: argparse.Namespace) -> int:
    """Draw a store."""
    from dfx.pictures import overview, write_png
    from dfx.slides import open_slide
    from dfx.store import open_features

    features = open_features(args.store, args.encoder)
    print(write_png(overview(features, open_slide(args.slide) if args.slide else None), args.out))
    return DONE
