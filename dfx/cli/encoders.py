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

    rows = [("name", "dim", "input", "mpp", "pooling", "precision", "license", "gated", "source")]
    for c in list_encoders():
        size = f"{c.input_size[0]} x {c.input_size[1]}"
        mpp = (
            "any"
            if c.mpp is None
            else f"{c.mpp:g}"
            if c.mpp_range is None
            else "-".join(map("{:g}".format, c.mpp_range))
        )
        gated = "yes" if c.gated else "no"
        rows.append((c.name, str(c.dim), size, mpp, c.pooling, c.precision, c.license, gated, c.source))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("Names are found whatever their case, '-' and '_'. Every other timm model name works too,")
    print("and any torch.nn.Module from Python.")
    return DONE
