"""The option of every command that reads or writes where a URL leads."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from dfx.errors import CallError

VARIABLE = "DFX_STORAGE_OPTIONS"


def add(parser: argparse.ArgumentParser) -> None:
    """Describe the option."""
    parser.add_argument(
        "--storage-options",
        metavar="JSON",
        help=f"options of fsspec's file systems, or a mapping of protocols or URL prefixes to such; "
        f"default: {VARIABLE} of the environment, which no list of processes shows",
    )


def options(args: argparse.Namespace) -> dict[str, Any] | None:
    """Give what was said, or what the environment has; raises `CallError` for what is no JSON object."""
    text = args.storage_options or os.environ.get(VARIABLE)
    if not text:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CallError("--storage-options must be a JSON object.")
    return found
