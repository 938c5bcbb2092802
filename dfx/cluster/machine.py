"""Clusters on this machine: one inside this process, and one of worker processes, each with a GPU of its own."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import dask
import distributed
from dask.system import CPU_COUNT
from dask.utils import parse_bytes
from distributed.system import MEMORY_LIMIT

from dfx.cluster.connecting import current_client
from dfx.errors import CallError, CallTypeError
from dfx.pin import VARIABLE, visible

DECODERS = 8
"""Threads of a worker at most, unless told otherwise: they decode while one of them runs the network, and beyond
about as many their Python code waits for itself."""
SHARE = 0.9
"""Of the memory that this process may take, or its container, for workers; the rest is the scheduler's and client's."""


@contextmanager
def client_or_embedded(client: distributed.Client | None, threads: int) -> Iterator[distributed.Client]:
    """Give `client`, else the current one, else that of an embedded cluster which ends with the block."""
    client = client or current_client()
    if client is not None:
        yield client
        return
    with embedded(threads) as own:
        yield own


@contextmanager
def embedded(threads: int = 0) -> Iterator[distributed.Client]:
    """Run a cluster inside this process: one worker with `threads` threads (0: one a core).

    Only its status pages listen, on loopback. It starts in under a second, needs no
    `if __name__ == "__main__"`, and its tasks share this process's encoders. Dask's own memory
    limit is off: it would pause the worker for what else the process holds, and never wake it
    (distributed#5999).
    """
    with (
        _own_routes(),
        distributed.LocalCluster(
            n_workers=1,
            threads_per_worker=threads or CPU_COUNT,
            processes=False,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",
            worker_dashboard_address="127.0.0.1:0",
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


def local(
    *,
    gpus: Literal["auto"] | int | Sequence[int | str] = "auto",
    threads_per_gpu: int | None = None,
    n_workers: int | None = None,
    threads: int | None = None,
    memory_limit: Literal["auto"] | int | str = "auto",
    security: distributed.Security | None = None,
) -> distributed.SpecCluster:
    """Start worker processes on this machine, one a GPU, and give their cluster, which a `Client` takes.

    `gpus`: "auto" for all that this process may use, how many of them, or which, as CUDA_VISIBLE_DEVICES has them
    (indices, UUIDs, MIG names). Each process sees its own GPU alone, also after a restart. `threads_per_gpu`: that
    decode (None: the machine's cores shared, at most 8). Without GPUs, or with `gpus=0`: `n_workers` processes of
    `threads` threads each (None: the cores shared by processes of at most 8 threads); torch runs on as many threads as
    its worker has. `memory_limit`: bytes a worker, or a text such as "8 GiB" ("auto": an equal share of what
    this process may take, its container's limit if there is one).

    It listens on loopback only; other users of the machine are kept out by `security`, such as
    `distributed.Security.temporary()`. Use it under `if __name__ == "__main__"`, as all that starts processes. Raises
    `CallError` for more GPUs than there are, or a GPU given twice.
    """
    given = _gpus(gpus)
    for name, value in (("threads_per_gpu", threads_per_gpu), ("n_workers", n_workers), ("threads", threads)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise CallError(f"{name} must be a whole number above 0, not {value!r}.")
    if given and (n_workers is not None or threads is not None):
        raise CallError(
            f"n_workers and threads are for machines without GPUs, and here are {len(given)}: use gpus= and "
            "threads_per_gpu=, or gpus=0."
        )
    if given:
        count, each = len(given), threads_per_gpu or max(1, min(DECODERS, CPU_COUNT // len(given)))
    else:
        count = n_workers or max(1, CPU_COUNT // threads if threads else math.ceil(CPU_COUNT / DECODERS))
        each = threads or max(1, CPU_COUNT // count)
    limit = int(MEMORY_LIMIT * SHARE) // count if memory_limit == "auto" else parse_bytes(memory_limit)
    listening = {
        "host": "127.0.0.1",
        "dashboard_address": "127.0.0.1:0",
        "protocol": "tls://" if security else "tcp://",
        "security": security,
    }
    worker = {"nthreads": each, "memory_limit": limit, "silence_logs": logging.WARNING, **listening}
    pins: Sequence[dict[str, str]] = [{VARIABLE: gpu} for gpu in given] or [{}] * count
    with _own_routes():
        return _Nannied(
            workers={n: {"cls": distributed.Nanny, "options": worker | {"env": pin}} for n, pin in enumerate(pins)},
            scheduler={"cls": distributed.Scheduler, "options": {"port": 0, **listening}},
            security=security,
            silence_logs=logging.WARNING,
            name="dfx",
        )


class _Nannied(distributed.SpecCluster):  # type: ignore[misc]
    """A cluster whose nannies start their workers again, however long that takes."""

    def _update_worker_status(self, op: str, msg: Any) -> None:
        # Dask's closes a nanny whose worker is not back within "distributed.deploy.lost-worker-timeout", 15 seconds,
        # which importing torch may take on a busy machine, and never replaces it.
        super(distributed.SpecCluster, self)._update_worker_status(op, msg)


@contextmanager
def on_this_machine(device: str) -> Iterator[distributed.Client | None]:
    """Give the client of a worker process a GPU where there are several and the device is no certain one, else None."""
    gpus = visible() if device in ("auto", "cuda") else []
    if len(gpus) < 2:
        yield None
        return
    with local(gpus=gpus) as cluster, distributed.Client(cluster, set_as_default=False) as client:
        yield client


def _gpus(gpus: object) -> list[str]:
    """Name the GPUs that were asked for; raises `CallError` for what can't be had."""
    if gpus == "auto":
        return visible()
    if isinstance(gpus, int) and not isinstance(gpus, bool):
        found = visible() if gpus else []
        if not 0 <= gpus <= len(found):
            raise CallError(f"gpus={gpus}, but this process may use {len(found)} ({', '.join(found) or 'none'}).")
        return found[:gpus]
    if isinstance(gpus, str) or not isinstance(gpus, Sequence):
        raise CallTypeError(f"gpus must be 'auto', a number, or a list of GPUs, not {gpus!r}.")
    names = [str(gpu) for gpu in gpus]
    if len(set(names)) < len(names) or not all(names):
        raise CallError(f"gpus={names} names a GPU twice, or none: one process a GPU.")
    return names


@contextmanager
def _own_routes() -> Iterator[None]:
    """Without bokeh, a scheduler appends to this list in place, and so to the caller's configuration."""
    routes = list(dask.config.get("distributed.scheduler.http.routes"))
    with dask.config.set({"distributed.scheduler.http.routes": routes}):
        yield
