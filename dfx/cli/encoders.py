"""`dfx encoders`: the named ones."""

from __future__ import annotations

import argparse
from typing import Any

from dfx.cli.codes import DONE


def add(commands: Any) -> None:
    """Describe the command."""
    p = commands.add_parser("encoders", help="list the named encoders")
    p.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
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
