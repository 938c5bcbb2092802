"""`dfx status`: how far the stores of a folder are."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from dfx.cli import storage
from dfx.cli.codes import DONE, FAILURES


def add(commands: Any) -> None:
    """Describe the command."""
    p = commands.add_parser("status", help="say how far the stores of a folder are")
    p.set_defaults(command=run)
    p.add_argument("folder", metavar="DIR", help="a folder or its URL")
    storage.add(p)


def run(args: argparse.Namespace) -> int:
    """Say how far the stores of a folder are; gives 1 unless all of dfx's are complete."""
    from dfx.store import statuses

    found = statuses(args.folder, storage.options(args))
    for one in found:
        share = f"{one.done / one.blocks:.0%} of {one.blocks} blocks" if one.blocks else ""
        told = "; ".join(part for part in (share if one.state in ("partial", "failed") else "", one.reason) if part)
        print(f"{one.state:<9} {one.name}{f'  ({told})' if told else ''}")
    counts = Counter(one.state for one in found)
    print(", ".join(f"{n} {state}" for state, n in counts.items()) or "nothing here")
    return FAILURES if counts["partial"] or counts["failed"] else DONE
