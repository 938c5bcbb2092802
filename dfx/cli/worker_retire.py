"""`dfx worker-retire`: what a pod or job runs before its worker is ended."""

from __future__ import annotations

import argparse
import os
from typing import Any

from dfx.cli.codes import DONE
from dfx.errors import CallError


def add(commands: Any) -> None:
    """Describe the command."""
    p = commands.add_parser("worker-retire", help="hand over what this worker holds, and end it (a preStop hook)")
    p.set_defaults(command=run)
    p.add_argument("--scheduler", metavar="ADDRESS", help="of its cluster (default: DASK_SCHEDULER_ADDRESS)")
    p.add_argument("--name", help="of the worker (default: DASK_WORKER_NAME)")
    p.add_argument("--timeout", type=float, default=20, metavar="S", help="seconds that it may take (default: 20)")


def run(args: argparse.Namespace) -> int:
    """Retire a worker; gives 0 when it is gone."""
    from dfx.cluster import retire

    scheduler = args.scheduler or os.environ.get("DASK_SCHEDULER_ADDRESS")
    name = args.name or os.environ.get("DASK_WORKER_NAME")
    if not scheduler or not name:
        raise CallError(
            "the worker is not known: set DASK_SCHEDULER_ADDRESS and DASK_WORKER_NAME, or give --scheduler and --name."
        )
    for address in retire(scheduler, name, timeout=args.timeout):
        print(address)
    return DONE
