"""Dask clusters: the embedded one, and what tasks need of the worker that they run on."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import dask
import distributed
from dask.system import CPU_COUNT
from distributed.metrics import context_meter

from dfx.encoders import EncoderSpec
from dfx.encoders.spec import SHARED
from dfx.errors import CallError, CallTypeError


def current_client() -> distributed.Client | None:
    """Give the current Dask client, None where there is none."""
    try:
        return distributed.Client.current()
    except ValueError:
        return None


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
    # Without bokeh, a scheduler appends to this list in place, and so to the caller's configuration.
    routes = list(dask.config.get("distributed.scheduler.http.routes"))
    with (
        dask.config.set({"distributed.scheduler.http.routes": routes}),
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


def check_client(client: object) -> distributed.Client | None:
    """Refuse what is no synchronous Dask client, and one without workers to come."""
    if client is None:
        return None
    if not isinstance(client, distributed.Client):
        raise CallTypeError(f"client must be a distributed.Client or None, not {type(client).__name__}.")
    if client.asynchronous:
        raise CallError("client is asynchronous: give one made without asynchronous=True.")
    if client.status != "running":
        raise CallError(f"client {client.id} is {client.status}: connect it first.")
    return client


_handed: weakref.WeakKeyDictionary[distributed.Client, set[str]] = weakref.WeakKeyDictionary()
"""What each client's scheduler has, so that a large module is pickled once."""


class Handed(distributed.WorkerPlugin):  # type: ignore[misc]
    """Brings a pickled module to every worker, also to those that join later.

    The scheduler keeps it, so that no worker's death loses it, and no task carries it. It is
    unpickled by the first task that needs it, not here: this runs on the worker's event loop.
    """

    idempotent = True

    def __init__(self, key: str, data: bytes) -> None:
        self.name = f"dfx-{key}"
        self.key = key
        self.data = data

    def setup(self, worker: distributed.Worker) -> None:
        """Keep the module for this process's tasks."""
        SHARED.put(self.key, self.data)


def share(encoder: EncoderSpec, client: distributed.Client | None = None) -> None:
    """Hand a given module to the workers of a client (None: the current one).

    Needless for named encoders, which workers build themselves, and for workers in this process.
    """
    client = client or current_client()
    if client is None or encoder.named or client.scheduler is None:
        return
    handed = _handed.setdefault(client, set())
    if client.scheduler.address.startswith("inproc://") or encoder.key in handed:
        return
    from dfx.encoders.modules import pickle_module

    client.register_plugin(Handed(encoder.key, pickle_module(encoder)))
    handed.add(encoder.key)


def task_threads() -> int | None:
    """How many threads torch may use in this task: as many as its worker has.

    Dask gives each worker its share of the machine's cores, and only one task runs forward at a time.
    """
    try:
        return int(distributed.get_worker().state.nthreads)
    except ValueError:
        return None


def memory_limit() -> int | None:
    """Bytes that this task's worker may take; None where Dask sets it no limit of its own."""
    try:
        return distributed.get_worker().memory_manager.memory_limit or None
    except ValueError:
        return None


def meter(stage: str) -> AbstractContextManager[Any]:
    """Time a stage of a task for Dask's dashboard; does nothing outside a task."""
    timer: AbstractContextManager[Any] = context_meter.meter(stage)
    return timer


PROTOCOLS = ("tcp", "tls", "ws", "wss")


def connect(address: str) -> distributed.Client:
    """Connect to a running scheduler; raises `CallError` when it does not answer in 30 seconds."""
    protocol, found, _ = address.partition("://")
    if found and protocol not in PROTOCOLS:  # a Client that fails on it would keep the process from ending
        raise CallError(f"{address} is no scheduler's address: use {', '.join(f'{p}://' for p in PROTOCOLS)}.")
    try:
        return distributed.Client(address, timeout=30, set_as_default=False)
    except (OSError, ValueError) as e:
        raise CallError(f"no Dask scheduler answers at {address} ({e}): check the address, and that it runs.") from e
