"""`dfx show`: a picture of a store."""

from __future__ import annotations

import argparse
from typing import Any

from dfx.cli import storage
from dfx.cli.codes import DONE


def add(commands: Any) -> None:
    """Describe the command."""
    p = commands.add_parser("show", help="draw a store: slide, patch grid, features as colours, a value, clusters")
    p.set_defaults(command=run)
    p.add_argument("store", metavar="STORE")
    p.add_argument("--out", required=True, metavar="PNG")
    p.add_argument("--slide", metavar="PATH", help="where the slide lies now, if it moved")
    storage.add(p)
    p.add_argument("--encoder", metavar="NAME", help="whose features are drawn, where there are several")
    what = p.add_mutually_exclusive_group()
    what.add_argument(
        "--values",
        metavar="WHAT",
        help="one value a patch instead: similarity:ROW (cosine), cluster:K (k-means), or a .npy file",
    )
    what.add_argument("--contact-sheet", type=int, metavar="K", help="the patches of K clusters instead, a row each")
    p.add_argument("--columns", type=int, default=10, metavar="N", help="patches in a row of a contact sheet (10)")
    p.add_argument("--size", type=int, default=900, metavar="N", help="pixels of the slide's longer side (900)")


def run(args: argparse.Namespace) -> int:
    """Draw a store."""
    import numpy as np

    from dfx.pictures import write_png
    from dfx.slides import open_slide
    from dfx.store import open_features

    options = storage.options(args)
    features = open_features(args.store, args.encoder, options)
    slide = open_slide(args.slide, storage_options=options) if args.slide else None
    if args.contact_sheet is not None:
        picture = features.contact_sheet(args.contact_sheet, columns=args.columns, slide=slide)
    else:
        picture = features.plot(args.values, slide=slide, max_size=args.size)
    print(write_png(np.asarray(picture), args.out))
    return DONE
