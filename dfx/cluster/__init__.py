"""Dask clusters: the ones that dfx makes or connects to, whether they fit a run, and what tasks ask of their worker."""

from __future__ import annotations

from dfx.cluster.admission import admitted, check_encoders, check_same, turn_away
from dfx.cluster.connecting import check_client, connect, current_client, has_worker, security_of
from dfx.cluster.machine import client_or_embedded, embedded, local, on_this_machine
from dfx.cluster.pods import cluster_spec, kubernetes
from dfx.cluster.retiring import retire
from dfx.cluster.tasks import memory_limit, meter, share, task_threads

__all__ = [
    "admitted",
    "check_client",
    "check_encoders",
    "check_same",
    "client_or_embedded",
    "cluster_spec",
    "connect",
    "current_client",
    "embedded",
    "has_worker",
    "kubernetes",
    "local",
    "memory_limit",
    "meter",
    "on_this_machine",
    "retire",
    "security_of",
    "share",
    "task_threads",
    "turn_away",
]
