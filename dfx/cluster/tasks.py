"""What tasks ask of the worker that they run on, and the modules that are handed to it."""

from __future__ import annotations

import time
import weakref
from contextlib import AbstractContextManager
from typing import Any

import distributed
from distributed.metrics import context_meter

from dfx.cluster.connecting import current_client
from dfx.encoders import EncoderSpec
from dfx.encoders.spec import SHARED
from dfx.errors import ClusterLost

TRIES = 5
"""Times that workers are given a plugin, while some of them die."""

_handed: weakref.WeakKeyDictionary[distributed.Client, set[tuple[str, str]]] = weakref.WeakKeyDictionary()
"""Which of each client's schedulers has what, so that a large module is pickled once."""


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
    if client.scheduler.address.startswith("inproc://"):
        return
    handed = _handed.setdefault(client, set())
    this = (client.scheduler_info(n_workers=0)["id"], encoder.key)  # a client may have found another scheduler
    if this in handed:
        return
    from dfx.encoders.modules import pickle_module

    register(client, Handed(encoder.key, pickle_module(encoder)))
    handed.add(this)


def register(client: distributed.Client, plugin: distributed.WorkerPlugin) -> None:
    """Give a plugin to the workers of a client, also to those that join later; raises `ClusterLost`.

    A worker that dies meanwhile fails the call, though the scheduler has the plugin and the others got it.
    """
    for left in reversed(range(TRIES)):
        try:
            client.register_plugin(plugin)
            return
        except OSError as e:
            if not left:
                raise ClusterLost(f"the workers of client {client.id} can't be reached ({e}): run again.") from e
            time.sleep(1)


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
