"""`dfx report`: a folder of stores as one HTML page."""

from __future__ import annotations

import argparse
from typing import Any

from dfx.cli import storage
from dfx.cli.codes import DONE


def add(commands: Any) -> None:
    """Describe the command."""
    p = commands.add_parser("report", help="write one HTML page on the stores of a folder: a row and a picture a slide")
    p.set_defaults(command=run)
    p.add_argument("folder", metavar="DIR", help="a folder or its URL")
    p.add_argument("--out", default="report.html", metavar="HTML", help="file to write (default: report.html)")
    p.add_argument("--no-pictures", action="store_true", help="open no slide")
    storage.add(p)


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    from dfx.report import write_report

    options = storage.options(args)
    print(write_report(args.folder, args.out, pictures=not args.no_pictures, storage_options=options))
    return DONE
