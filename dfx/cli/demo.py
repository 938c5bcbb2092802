"""`dfx demo`: a slide made here, its features, a picture."""

from __future__ import annotations

import argparse
from typing import Any

from dfx.cli.codes import DONE


def add(commands: Any) -> None:
    """Describe the command."""
    p = commands.add_parser("demo", help="make a slide, extract features, draw them: no network, no data")
    p.set_defaults(command=run)
    p.add_argument("--out", default="dfx-demo", metavar="DIR", help="folder to write to (default: dfx-demo)")


def run(args: argparse.Namespace) -> int:
    """Run the demonstration."""
    from dfx.demo import demo
    from dfx.store import open_features

    slide, store, picture = demo(args.out)
    features = open_features(store).features
    print(f"slide     {slide}")
    print(f"features  {store}  {features.shape[0]} patches x {features.shape[1]} (untrained resnet18: random weights)")
    print(f"picture   {picture}")
    return DONE
