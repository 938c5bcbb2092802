"""Real schedulers and workers as processes, as a launcher starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import distributed

NOTHING: Mapping[str, str] = {}
TESTS = str(Path(__file__).parent)
PATHS = os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))
"""With this, workers find the networks of tests."""


@contextmanager
def dask(*args: object, env: Mapping[str, str] = NOTHING, log: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """Run `dask scheduler` or `dask worker`, and end it."""
    line = [sys.executable, "-m", "dask", *map(str, args)]
    with (log or Path(os.devnull)).open("a") as out:
        process = subprocess.Popen(
            line, env=os.environ | {"PYTHONPATH": PATHS} | env, stdout=out, stderr=out, text=True
        )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def scheduler(folder: Path, *args: object, port: int = 0, env: Mapping[str, str] = NOTHING) -> Iterator[str]:
    """Run a scheduler on loopback, and give its address."""
    file = folder / "scheduler.json"
    file.unlink(missing_ok=True)
    listening = ("--host", "127.0.0.1", "--port", port, "--dashboard-address", "127.0.0.1:0", "--scheduler-file", file)
    with dask("scheduler", *listening, *args, env=env, log=folder / "scheduler.log"):
        yield distributed.utils.json_load_robust(str(file), timeout=60)["address"]


WORKER = ("--host", "127.0.0.1", "--no-dashboard", "--nthreads", 1)


def until(holds: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
