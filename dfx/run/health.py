"""What a cluster says of itself: its workers, who is paused, what died with whom, and where time went."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import distributed
from dask.typing import Key

from dfx import cluster
from dfx.errors import ClusterLost

RESUMES = "running again resumes"
NO_WORKER = f"the cluster has had no worker for {{}} seconds: start workers; {RESUMES}."

PATIENCE = 60
"""Seconds that a run waits for a cluster to have any worker."""
PAUSED = 30
"""Seconds that a run waits while every worker is paused; Dask does not wake them by itself (distributed#5999)."""
UNFIT = 16
"""Workers that are turned away, with nothing done between them, before a run gives up."""
NOBODY: Mapping[str, str] = {}


@dataclass(frozen=True)
class Worker:
    """A worker of a cluster."""

    threads: int
    """Tasks that it runs at a time."""
    paused: bool
    """Whether Dask has stopped giving it tasks, for want of memory."""
    resident: int
    """Bytes that its process takes."""
    limit: int
    """Bytes that it may take; 0: no limit."""
    nanny: bool
    """Whether something restarts it."""


@contextmanager
def reached(client: distributed.Client) -> Iterator[None]:
    """Say so when what is asked of a scheduler finds none."""
    try:
        yield
    except OSError as e:
        raise ClusterLost(f"the scheduler of client {client.id} does not answer ({e}): {RESUMES}.") from e


def await_workers(client: distributed.Client) -> None:
    """Wait for a cluster's first worker; raises `ClusterLost` when there is none for too long."""
    with reached(client):
        there = cluster.has_worker(client, PATIENCE)
    if not there:
        raise ClusterLost(NO_WORKER.format(PATIENCE))


def look(client: distributed.Client) -> tuple[str, dict[str, Worker]]:
    """Ask a cluster for its scheduler's identity, and its workers by address."""
    said = client.scheduler_info(n_workers=-1)
    return said["id"], {
        address: Worker(
            threads=said["nthreads"],
            paused=said.get("status") == "paused",
            resident=int(said.get("metrics", {}).get("memory", 0)),
            limit=int(said.get("memory_limit") or 0),
            nanny=bool(said.get("nanny")),
        )
        for address, said in said["workers"].items()
    }


class Watch:
    """Tells when a cluster can't go on."""

    def __init__(self, now: float) -> None:
        self._alone = self._awake = now

    def check(self, workers: Mapping[str, Worker], now: float, unfit: Mapping[str, str] = NOBODY) -> None:
        """Take what the workers are now; raises `ClusterLost` when there was none, or none awake, for too long.

        `unfit`: workers that were turned away since something was done last, and why.
        """
        if len(unfit) >= UNFIT and len(unfit) > len(workers):  # a launcher may start them again for ever
            raise ClusterLost(no_fit(unfit))
        if workers:
            self._alone = now
        elif now - self._alone > PATIENCE:
            raise ClusterLost(no_fit(unfit) if unfit else NO_WORKER.format(PATIENCE))
        if not workers or not all(worker.paused for worker in workers.values()):
            self._awake = now
        elif now - self._awake > PAUSED:
            figures = ", ".join(
                f"{address}: {worker.resident / 2**20:,.0f} of {worker.limit / 2**20:,.0f} MB"
                for address, worker in list(workers.items())[:8]
            )
            raise ClusterLost(
                f"all {len(workers)} workers have been paused by Dask for {PAUSED} seconds, for want of memory "
                f"({figures}): restart them with more, with fewer threads, or use a smaller batch_size; {RESUMES}."
            )


def no_fit(unfit: Mapping[str, str]) -> str:
    """Say that no worker is left that gives the features of the run's plan."""
    named = "; ".join(f"{address}: {why}" for address, why in list(unfit.items())[:4])
    more = f"; and {len(unfit) - 4} more" if len(unfit) > 4 else ""
    return (
        f"no worker of the cluster fits, {len(unfit)} gave other features than the process that planned "
        f"({named}{more}): use one environment or image, and sound devices, for all; {RESUMES}."
    )


def blamed(client: distributed.Client, keys: Sequence[Key]) -> dict[Key, int]:
    """Ask with how many dying workers each task was; Dask blames every task that was assigned, running or not."""
    found: dict[Key, int] = client.run_on_scheduler(_blamed, keys=list(keys))
    return found


def _blamed(keys: Sequence[Key], dask_scheduler: Any = None) -> dict[Key, int]:
    tasks = dask_scheduler.tasks
    return {key: tasks[key].suspicious for key in keys if key in tasks}


class Stages:
    """Where a cluster's time goes from now on."""

    def __init__(self, client: distributed.Client) -> None:
        self._client = client
        self._seconds = seconds_by_stage(client)
        self._asked = time.monotonic()

    @property
    def age(self) -> float:
        """Seconds since it was last asked."""
        return time.monotonic() - self._asked

    def since(self) -> dict[str, float]:
        """Ask for the seconds by stage since it was last asked."""
        before, self._seconds, self._asked = self._seconds, seconds_by_stage(self._client), time.monotonic()
        return {stage: round(seconds - before.get(stage, 0), 3) for stage, seconds in self._seconds.items()}


def seconds_by_stage(client: distributed.Client) -> dict[str, float]:
    """Ask how long the cluster's threads have read, encoded and written, in all: seconds by stage.

    Writing is what is left of the tasks. Workers tell their figures about once a second.
    """
    found: dict[str, float] = client.run_on_scheduler(_seconds_by_stage)
    return found


def _seconds_by_stage(dask_scheduler: Any = None) -> dict[str, float]:
    metrics = {key: s for key, s in dask_scheduler.cumulative_worker_metrics.items() if key[0] == "execute"}
    ours = {key[1] for key in metrics if str(key[2]).startswith("dfx-")}
    found: dict[str, float] = {}
    for (_, prefix, label, _), seconds in metrics.items():
        stage = "write" if label in ("thread-cpu", "thread-noncpu") else str(label).removeprefix("dfx-")
        if prefix in ours and (stage == "write" or stage != label):
            found[stage] = found.get(stage, 0) + seconds
    return found
