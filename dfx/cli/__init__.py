"""The command line: a module a command, each with `add` (its arguments) and `run`."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import NoReturn

from dfx.cli import demo, encoders, export, extract, info, report, show, status, worker_retire
from dfx.cli.codes import BAD_CALL, DONE, FAILURES, INTERRUPTED, TRY_AGAIN
from dfx.cli.signals import Terminated, terminable
from dfx.errors import ClusterLost, DfxError, RunError

__all__ = ["BAD_CALL", "DONE", "FAILURES", "INTERRUPTED", "TRY_AGAIN", "entry", "main", "parser"]

COMMANDS = (extract, info, status, report, encoders, show, export, demo, worker_retire)
"""In the order of `dfx --help`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code, see `codes`."""
    args = parser().parse_args(argv)
    try:
        with warnings.catch_warnings(), own_log(), terminable():
            warnings.showwarning = lambda message, *_: print(f"dfx: warning: {message}", file=sys.stderr)
            return int(args.command(args))
    except ClusterLost as e:
        print(f"dfx: {e}", file=sys.stderr)
        return TRY_AGAIN
    except RunError as e:
        for store in (e.result or {}).values():
            print(store)
        print(f"dfx: {e}", file=sys.stderr)
        return FAILURES
    except DfxError as e:
        print(f"dfx: error: {e}", file=sys.stderr)
        return BAD_CALL
    except Terminated:
        print("dfx: terminated; the same command goes on from here.", file=sys.stderr)
        return TRY_AGAIN
    except KeyboardInterrupt:
        print("dfx: interrupted; the same command goes on from here.", file=sys.stderr)
        return INTERRUPTED


@contextmanager
def own_log() -> Iterator[None]:
    """Print the warnings of dfx, a line each, and those of no other package, until the block ends."""
    ours, others = logging.getLogger("dfx"), [logging.getLogger(name) for name in ("tifffile", "distributed")]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("dfx: warning: %(message)s"))
    levels = [logger.level for logger in others]
    ours.addHandler(handler)
    for logger in others:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        for logger, level in zip(others, levels, strict=True):
            logger.setLevel(level)


def entry() -> NoReturn:
    """Run the command of this process and end it.

    After an interruption at once: a thread that is still in torch's code would have the process abort (exit code 134).
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # prints names that are not UTF-8 unchanged
    code = main()
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what its threads say while the process ends
    if code in (INTERRUPTED, TRY_AGAIN):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def parser() -> argparse.ArgumentParser:
    """Describe the commands."""
    top = argparse.ArgumentParser(
        prog="dfx",
        description="Deep features of whole-slide images.",
        epilog="dfx extract *.svs --encoder resnet50 --resolution 0.5 --units mpp --patch 224 --out features",
    )
    top.add_argument("--version", action="version", version=f"dfx {version('dfx')}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return top
