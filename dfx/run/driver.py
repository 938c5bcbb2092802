"""The driver: blocks of many slides through one window of the cluster."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Iterable, Iterator

import distributed
from dask.highlevelgraph import HighLevelGraph

from dfx.errors import DfxError, RunError, SlideError, StoreError
from dfx.run.job import BlockDone, Event, Job, Planned, SlideDone, SlideFailed

log = logging.getLogger(__name__)

PATIENCE = 60
"""Seconds that a run waits for a cluster to have any worker."""
WINDOW = 3
"""Blocks submitted and unfinished, for each thread of the cluster."""
LEAST = 16
"""Blocks submitted and unfinished on a small cluster: a message to the scheduler costs as much as some of them."""


def drive(client: distributed.Client, jobs: Iterable[Job | SlideFailed]) -> Iterator[Event]:
    """Send the blocks of many slides through one window of the cluster, and tell what happens.

    Slides are planned as the window has room, so no worker waits between two slides and neither
    this process nor the scheduler grows with the run.
    """
    waiting = iter(jobs)
    current: Job | None = None
    flying: dict[distributed.Future, tuple[Job, int]] = {}
    finished = distributed.as_completed(with_results=False, raise_errors=False, loop=client.loop)
    exhausted = False
    window, asked = 0, -math.inf
    while True:
        if time.monotonic() - asked > 1:  # workers come and go; asking is a round trip
            window, asked = max(LEAST, WINDOW * sum(client.nthreads().values())), time.monotonic()
        filling = len(flying) <= window // 2  # many blocks a message
        while filling and not exhausted and len(flying) < window:
            if current is None or not current.todo or current.failed:
                following = next(waiting, None)
                if following is None:
                    exhausted = True
                elif isinstance(following, SlideFailed):
                    yield following
                else:
                    current = following
                    yield Planned(current.item, current.plan, len(current.plan.grid) - remaining(current))
                    if not current.todo:
                        yield close(current)
                continue
            started = submit(client, current, current.take(window - len(flying)))
            finished.update(future for _, future in started)
            flying |= {future: (current, block) for block, future in started}
        if not flying:
            return
        for future in next_finished(client, finished):
            job, block = flying.pop(future)
            if job.failed:
                continue
            error = failure(future, job, block)
            if error is not None:
                job.failed = True
                for other in [f for f, (owner, _) in flying.items() if owner is job]:
                    other.cancel()
                yield give_up(job, error)
                continue
            rows = job.plan.rows(block)
            if job.kept is not None:
                job.kept[rows] = future.result()
            job.unfinished -= 1
            yield BlockDone(job.item, rows.stop - rows.start)
            if not job.unfinished:
                yield close(job)


def next_finished(client: distributed.Client, finished: distributed.as_completed) -> list[distributed.Future]:
    """Wait for blocks; raises `RunError` when the cluster has had no worker for `PATIENCE` seconds."""
    alone = time.monotonic()
    while not finished.has_ready():
        with finished.thread_condition:
            if finished.has_ready() or finished.thread_condition.wait(timeout=1):
                continue
        if client.status != "running":
            raise RunError(f"client {client.id} is {client.status}: connect again; running again resumes.")
        if client.nthreads():
            alone = time.monotonic()
        if time.monotonic() - alone > PATIENCE:
            raise RunError(
                f"the cluster at {client.scheduler.address} has had no worker for {PATIENCE} seconds: "
                "start workers; running again resumes."
            )
    batch: list[distributed.Future] = finished.next_batch(block=False)
    return batch


def remaining(job: Job) -> int:
    """Patches of a job that are still to be made."""
    rows = (job.plan.rows(block) for block in job.todo)
    return sum(r.stop - r.start for r in rows)


def submit(client: distributed.Client, job: Job, blocks: list[int]) -> list[tuple[int, distributed.Future]]:
    """Start some blocks; gives (block, future)."""
    keys = [job.tasks.keys[block] for block in blocks]
    # As a high level graph: the client would hash a low level one anew, which costs as much as scheduling it.
    graph = HighLevelGraph.from_collections(f"blocks-{uuid.uuid4().hex}", job.tasks.part(blocks))
    futures = client.get(graph, keys, sync=False)
    return list(zip(blocks, futures, strict=True))


def failure(future: distributed.Future, job: Job, block: int) -> DfxError | None:
    """What went wrong with a block, None when it is done."""
    if future.status == "finished":
        return None
    where = f"block {block} of {job.plan.slide.url}"
    if future.status != "error":
        return SlideError(f"{where} was {future.status} by the cluster: run again to resume.")
    error = future.exception()
    if isinstance(error, DfxError):
        return error
    if isinstance(error, OSError):
        return StoreError(f"{where} can't be written ({error}): check the disk and run again to resume.")
    return SlideError(f"{where} failed ({type(error).__name__}: {error}); run again to resume.")


def close(job: Job) -> SlideDone | SlideFailed:
    """Close what is done; what goes wrong with it is that slide's failure."""
    try:
        return job.finish()
    except OSError as e:
        path = job.store.path if job.store else job.item.address
        return give_up(job, StoreError(f"{path} can't be closed ({e}): check the disk and run again to resume."))


def give_up(job: Job, error: DfxError) -> SlideFailed:
    """Note a failure where the slide's output is."""
    if job.store is not None:
        try:
            job.store.fail(str(error))
        except OSError as e:  # the disk that failed the block
            log.warning("%s can't note its failure: %s", job.store.path, e)
    return SlideFailed(job.item, error)
