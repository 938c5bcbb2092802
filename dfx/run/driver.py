"""The driver: many slides through one window of a cluster whose workers come, go and die."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import cast

import dask
import distributed
from dask._task_spec import GraphNode, Task
from dask.highlevelgraph import HighLevelGraph
from dask.typing import Key
from distributed.scheduler import KilledWorker

from dfx import cluster, store
from dfx.errors import ClusterLost, DfxError, MemoryShortage, SlideError, WorkerMismatch
from dfx.run import health
from dfx.run.events import BlockDone, Event, SlideDone, SlideFailed, Stopping, Throttled, Timed
from dfx.run.flights import TRIES, Block, Closing, Finish, Flight, Planning, described
from dfx.run.item import Item
from dfx.run.job import Job
from dfx.run.planning import Expected, Planned, Request

log = logging.getLogger(__name__)

LOOK = 1
"""Seconds between two looks at the cluster."""
WINDOW = 3
"""Blocks submitted and unfinished, for each thread of the cluster."""
LEAST = 16
"""Blocks submitted and unfinished on a small cluster: a message to the scheduler costs as much as some of them."""
TELL = 15
"""Seconds between two tellings of where the workers' time went."""
KILLS = 2
"""Workers that a block may kill while they run nothing else, before its slide is given up."""


class Driver:
    """Slides are planned as the window has room, so no worker waits between two of them, and neither
    this process nor the scheduler grows with the run.

    A block that was assigned to two workers that died is run again alone on a worker, so that what kills
    workers is told from what was beside it.
    """  # noqa: D205

    def __init__(
        self,
        client: distributed.Client,
        requests: Iterable[tuple[Item, Request]],
        *,
        keeps: Callable[[Planned], bool],
        cache: Callable[[Item], store.Place],
        timeout: float,
        expected: Expected,
    ) -> None:
        """Take the slides to be made.

        `keeps`: whether what comes back of a slide that was planned without a store has room here; `cache`:
        its store else. `timeout`: seconds after which a task is given up. `expected`: what is known already of what
        the encoders must give on each worker.
        """
        self.client = client
        self.timeout = timeout
        self._requests = iter(requests)
        self._keeps, self._cache = keeps, cache
        self._again: deque[Planning] = deque()
        self._ready: deque[Job] = deque()
        self._suspects: deque[Block] = deque()
        self._flying: dict[distributed.Future, Flight] = {}
        self._finished = distributed.as_completed(with_results=False, raise_errors=False, loop=client.loop)
        self._tries: Counter[object] = Counter()
        self._kills: Counter[tuple[Job, int]] = Counter()
        self._attempts: Counter[tuple[Job, int]] = Counter()
        self._workers: dict[str, health.Worker] = {}
        self._looked = time.monotonic()
        self._watch = health.Watch(self._looked)
        self._begun: dict[Key, float] = {}
        self._expected = dict(expected)
        self._unfit: dict[str, str] = {}

    def events(self) -> Iterator[Event]:
        """Make all slides, and tell what happens."""
        with health.reached(self.client):
            self._scheduler, self._workers = health.look(self.client)
            stages = health.Stages(self.client)
        held = self._hold_names()
        try:
            while True:
                yield from self._fill()
                if not self._flying and not self._suspects:
                    with health.reached(self.client):
                        yield Timed(stages.since())
                    return
                for future in self._next_finished():
                    flight = self._flying.pop(future, None)
                    if flight is not None:
                        yield from self._settle(future, flight)
                with health.reached(self.client):
                    yield from self._look()
                    if stages.age >= TELL:
                        yield Timed(stages.since())
        except KeyboardInterrupt:
            yield Stopping(sum(isinstance(flight, Block) for flight in self._flying.values()))
            raise
        finally:
            held.clear()
            if self._flying and self.client.status == "running":
                with contextlib.suppress(OSError):  # a scheduler that is gone has nothing to cancel
                    self.client.cancel(list(self._flying))

    # Submitting

    def _hold_names(self) -> list[distributed.Future]:
        """Have a task under each name for as long as the run lasts.

        Dask sums tasks up by name. When the last one of a name goes it begins anew with the next, and the scheduler's
        spans keep what was summed up for ever: some kB a slide.
        """
        keys = [f"dfx-{name}-{uuid.uuid4().hex}" for name in ("plan", "block", "close")]
        return self._send({key: Task(key, int) for key in keys}, keys)

    def _send(
        self, tasks: dict[Key, GraphNode], keys: Sequence[Key], *, priority: int = 0, worker: str | None = None
    ) -> list[distributed.Future]:
        # As a high level graph: the client would hash a low level one anew, which costs as much as scheduling it.
        graph = HighLevelGraph.from_collections(f"dfx-{uuid.uuid4().hex}", tasks)
        futures: list[distributed.Future] = self.client.get(
            graph, list(keys), sync=False, priority=priority, workers=worker
        )
        return futures

    def _fill(self) -> Iterator[Event]:
        threads = sum(worker.threads for worker in self._workers.values() if not worker.paused)
        window = max(LEAST, WINDOW * threads)
        blocks = sum(isinstance(flight, Block) for flight in self._flying.values())
        self._plan_ahead(max(2, threads))
        if self._suspects:  # nothing else runs then
            yield from self._isolate()
        elif blocks <= window // 2:  # many blocks a message
            while self._ready and blocks < window:
                job = self._ready[0]
                numbers = [] if job.failed else job.take(window - blocks)
                if not job.todo or job.failed:
                    self._ready.popleft()
                if numbers:
                    self._submit([Block(job, number, self._attempts[job, number]) for number in numbers])
                blocks += len(numbers)

    def _plan_ahead(self, most: int) -> None:
        planning = sum(isinstance(flight, Planning) for flight in self._flying.values())
        if not any(None not in behaviours for behaviours in self._expected.values()):
            most = 1  # the first plan says what all other workers must give
        while planning + len(self._ready) < most:
            if self._again:
                flight = self._again.popleft()
            else:
                following = next(self._requests, None)
                if following is None:
                    return
                item, request = following
                flight = Planning(replace(request, item=replace(item, given=())), item)
            request = replace(flight.request, expected=self._expected)
            self._start(f"dfx-plan-{uuid.uuid4().hex}", request, flight)
            planning += 1

    def _start(self, key: Key, work: Callable[[], object], flight: Flight) -> None:
        # A mask that the caller holds in memory can reach a worker through the graph only.
        with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TB"}):
            (future,) = self._send({key: Task(key, work)}, [key], priority=1)
        self._fly(future, flight)

    def _submit(self, blocks: list[Block], worker: str | None = None) -> None:
        tasks = blocks[0].job.planned.tasks
        keys = [block.key for block in blocks]
        part = tasks.part(dict(zip((block.number for block in blocks), keys, strict=True)))
        for block, future in zip(blocks, self._send(part, keys, worker=worker), strict=True):
            self._fly(future, block)

    def _fly(self, future: distributed.Future, flight: Flight) -> None:
        self._flying[future] = flight
        self._finished.add(future)

    def _isolate(self) -> Iterator[Event]:
        """Run suspects alone, one a worker, once nothing else runs."""
        if any(not isinstance(flight, Block) or not flight.alone_on for flight in self._flying.values()):
            return
        taken = {flight.alone_on for flight in self._flying.values() if isinstance(flight, Block)}
        for address in [a for a, worker in self._workers.items() if a not in taken and not worker.paused]:
            if not self._suspects:
                return
            block = replace(self._suspects.popleft(), alone_on=address)
            if not block.job.failed:
                yield Throttled(f"{block} was with {KILLS} workers or more that died, so it runs alone on {address}")
                self._submit([block], worker=address)

    # What comes back

    def _next_finished(self) -> list[distributed.Future]:
        """Wait for tasks, at most until the next look at the cluster."""
        with self._finished.thread_condition:
            if not self._finished.has_ready():
                self._finished.thread_condition.wait(timeout=LOOK)
        if self.client.status != "running":
            raise ClusterLost(f"client {self.client.id} is {self.client.status}: connect again; {health.RESUMES}.")
        batch: list[distributed.Future] = self._finished.next_batch(block=False)
        return batch

    def _settle(self, future: distributed.Future, flight: Flight) -> Iterator[Event]:
        status = future.status
        error = future.exception() if status == "error" else None
        # A block that was written gives None: asking for it is a round trip, to a worker that may be dead.
        wanted = isinstance(flight, Planning) or (isinstance(flight, Block) and flight.job.kept is not None)
        value: object = None
        if status == "finished" and wanted:
            try:
                value = future.result()
            except Exception as e:  # its worker died with it, and so did those that made it again
                log.info("%s is lost (%s: %s)", flight, type(e).__name__, e)
                status = "lost"
        job = None if isinstance(flight, Planning) else flight.job
        if job is not None and job.failed:
            return
        if status == "finished":
            if isinstance(flight, Planning):
                yield from self._planned(flight, cast(Planned, value))
            elif isinstance(flight, Block):
                yield from self._made(flight, value)
            else:
                yield SlideDone(flight.job.item, flight.job.result())
        elif isinstance(error, WorkerMismatch):
            yield from self._turn_away(error)
            yield from self._try_again(flight, None)
        elif isinstance(error, KilledWorker) and isinstance(flight, Block):
            self._suspect(flight)
        elif self._may_try_again(flight, error):
            yield from self._try_again(flight, error)
        else:
            yield from self._give_up(flight, described(flight, status, error))

    def _planned(self, flight: Planning, planned: Planned) -> Iterator[Event]:
        planned = replace(planned, item=flight.item)
        if any(planned.behaviours):
            known = self._expected.get(planned.pixels_yx, (None,) * len(planned.behaviours))
            both = zip(known, planned.behaviours, strict=True)
            self._expected[planned.pixels_yx] = tuple(first or behaviour for first, behaviour in both)
        if planned.place is None and not self._keeps(planned):
            self._again.append(Planning(replace(flight.request, place=self._cache(flight.item)), flight.item))
            return
        yield planned
        job = Job(planned)
        if job.todo:
            self._ready.append(job)
        else:
            yield from self._close(job)

    def _made(self, block: Block, value: object) -> Iterator[Event]:
        job, rows = block.job, block.job.planned.rows(block.number)
        if job.kept is not None:
            job.kept[rows] = value
        job.unfinished -= 1
        self._unfit.clear()
        yield BlockDone(job.item, rows.stop - rows.start)
        if not job.unfinished:
            yield from self._close(job)

    def _close(self, job: Job) -> Iterator[Event]:
        place = job.planned.place
        if place is None:
            yield SlideDone(job.item, job.result())
        else:
            self._start(f"dfx-close-{uuid.uuid4().hex}", Finish(place), Closing(job))

    def _may_try_again(self, flight: Flight, error: BaseException | None) -> bool:
        name: object = (flight.job, flight.number) if isinstance(flight, Block) else flight
        if error is None or (isinstance(error, MemoryShortage) and isinstance(flight, Block)):
            self._tries[name] += 1
            return self._tries[name] < TRIES
        return False

    def _try_again(self, flight: Flight, error: BaseException | None) -> Iterator[Event]:
        if isinstance(flight, Planning):
            self._again.append(flight)
        elif isinstance(flight, Closing):
            yield from self._close(flight.job)
        else:
            if not flight.job.todo:
                self._ready.append(flight.job)
            flight.job.todo.append(flight.number)
            self._attempts[flight.job, flight.number] += 1
        if error is not None:
            yield Throttled(f"{flight}: {error}")

    def _give_up(self, flight: Flight, error: DfxError) -> Iterator[Event]:
        """Fail a slide: drop its blocks, and note the reason where its output is."""
        if isinstance(flight, Planning):
            yield SlideFailed(flight.item, error)
            return
        job = flight.job
        job.failed = True
        others = [f for f, o in self._flying.items() if isinstance(o, Block) and o.job is job]
        for other in others:
            del self._flying[other]
        if others:
            self.client.cancel(others)
        if job.planned.place is not None:
            try:
                store.fail(job.planned.place, str(error))
            except (OSError, ValueError, KeyError) as e:  # the disk that failed the block; a store that was removed
                log.warning("%s can't note its failure: %s", job.planned.place, e)
        yield SlideFailed(job.item, error)

    # What becomes of workers

    def _look(self) -> Iterator[Event]:
        """See who came, went, is paused or hangs; raises `ClusterLost` when the cluster can't go on."""
        now = time.monotonic()
        if now - self._looked < LOOK:
            return
        self._looked = now
        known, (scheduler, self._workers) = self._workers, health.look(self.client)
        if scheduler != self._scheduler:  # it has none of what the last one was given
            raise ClusterLost(f"another scheduler answers now, the last one and its tasks are lost: {health.RESUMES}.")
        if gone := known.keys() - self._workers.keys():
            yield from self._bury(gone)
        self._watch.check(self._workers, now, self._unfit)
        yield from self._give_up_what_hangs(now)

    def _bury(self, addresses: set[str]) -> Iterator[Event]:
        """Find the blocks that may have killed workers."""
        flying = {f: b for f, b in self._flying.items() if isinstance(b, Block)}
        counts = health.blamed(self.client, [block.key for block in flying.values()])
        for future, block in flying.items():
            if future not in self._flying:
                continue
            if block.alone_on in addresses:
                self._kills[block.job, block.number] += 1
                if self._kills[block.job, block.number] >= KILLS:
                    self._drop(future)
                    what = (
                        f"{block} killed {KILLS} workers that ran nothing else: it takes more memory than they have, "
                    )
                    yield from self._give_up(block, SlideError(what + "or its encoder or a tile of it crashes them."))
                    continue
            if block.alone_on in addresses or (block.alone_on is None and counts.get(block.key, 0) >= KILLS):
                self._drop(future)
                self._suspect(block)

    def _turn_away(self, error: WorkerMismatch) -> Iterator[Event]:
        """Have a worker leave whose encoder gives other features; what it was given goes to others."""
        if error.worker in self._unfit:
            return
        self._unfit[error.worker] = error.difference
        log.warning("%s It is turned away.", error)
        with health.reached(self.client):
            cluster.turn_away(self.client, error.worker)
        yield Throttled(f"{error} It is turned away.")

    def _suspect(self, block: Block) -> None:
        """Let a block run alone when nothing else runs."""
        self._attempts[block.job, block.number] += 1
        attempt = self._attempts[block.job, block.number]
        self._suspects.append(replace(block, attempt=attempt, alone_on=None))

    def _drop(self, future: distributed.Future) -> None:
        del self._flying[future]
        self.client.cancel([future])

    def _give_up_what_hangs(self, now: float) -> Iterator[Event]:
        processing = {key: a for a, keys in self.client.processing().items() for key in keys} if self._flying else {}
        self._begun = {key: self._begun.get(key, now) for key in processing}
        for future, flight in list(self._flying.items()):
            if future not in self._flying or now - self._begun.get(future.key, now) < self.timeout:
                continue  # the first is its slide's failure, and the others went with it
            address = processing[future.key]
            what = str(flight) if isinstance(flight, Block) else "planning or closing it"
            del self._flying[future]
            self.client.cancel([future], force=True)
            error = SlideError(
                f"{what} has not ended in {self.timeout:g} seconds on {address}: given up; "
                "raise block_timeout (--block-timeout), or look at what hangs."
            )
            if address in self._workers and self._workers[address].nanny:
                self.client.restart_workers([address], timeout=60, raise_for_error=False)
            else:
                log.warning("a thread of %s is lost to what hangs: no nanny restarts it", address)
            yield from self._give_up(flight, error)
