"""Whether a cluster fits a run: the same versions everywhere, the device that was asked for, and the same features."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import distributed
from distributed.core import Status
from distributed.versions import get_versions

from dfx.cluster.tasks import register
from dfx.encoders import Behaviour, behaviour_difference, device_here, measure
from dfx.errors import CallError, EncoderError, WorkerMismatch
from dfx.plan import Head

log = logging.getLogger(__name__)

PACKAGES = ("dfx", "cloudpickle", "dask", "distributed", "imagecodecs", "numpy", "timm", "torch", "zarr")
"""That decide what pickles and protocols mean, or what features are."""
SCHEDULER = ("python", "dfx", "cloudpickle", "dask", "distributed")
"""Of these, what a scheduler needs."""
NAMED = 8
"""Workers that an error names at most."""

Versions = Mapping[str, str | None]


@contextmanager
def admitted(client: distributed.Client, device: str) -> Iterator[str]:
    """Refuse a cluster that doesn't fit, and until the block ends keep workers out that join late and don't.

    Gives the device of every worker: what "auto" means must be the same on all, since features differ between kinds of
    device, and since one CPU among GPUs would hold a run up unseen. Raises `CallError` that names workers and
    what differs, or lacks the device.
    """
    if client.scheduler.address.startswith("inproc://"):
        yield _common(device, {"this process": _device(device)})
        return
    found = client.get_versions(packages=PACKAGES)
    here = versions(found["client"]["packages"])
    scheduler = versions(found["scheduler"]["packages"])
    differing = {address: difference(here, versions(said["packages"])) for address, said in found["workers"].items()}
    differing["the scheduler"] = difference({name: here[name] for name in SCHEDULER}, scheduler)
    _refuse("differ from this process", differing, "use one environment or image for all")
    device = _common(device, client.run(_device_of_worker, device, on_error="return"))
    plugin = Admission(here, device)
    register(client, plugin)
    try:
        yield device
    finally:
        if client.status == "running":
            with suppress(OSError):  # the scheduler went away, and the plugin with it
                client.unregister_worker_plugin(plugin.name)


def check_encoders(heads: Sequence[Head], device: str, threads: int | None = None, channels: int = 3) -> None:
    """Compare what the encoders of a plan give in this process with what they gave where it was planned.

    A process measures once per encoder, device and shape. Raises `WorkerMismatch`.
    """
    for head in heads:
        expected = head.behaviour
        if expected is not None and expected.deterministic:
            found = measure(head.encoder, device, expected.shape_yx, channels, threads=threads)
            check_same(head.name, expected, found)


def check_same(encoder: str, expected: Behaviour, found: Behaviour) -> None:
    """Raise `WorkerMismatch` where this process's behaviour is not the expected one; random ones are not compared."""
    if not (expected.deterministic and found.deterministic):
        return
    how = behaviour_difference(expected, found)
    if how:
        raise WorkerMismatch(_address(), f"{encoder}: {how}")


def _address() -> str:
    try:
        return str(distributed.get_worker().address)
    except ValueError:
        return "this process"


def turn_away(client: distributed.Client, worker: str) -> None:
    """Have a worker leave a cluster; the tasks that it has go to others, and none is blamed."""
    if worker in client.retire_workers([worker], close_workers=True):
        return
    client.run(_close, workers=[worker], on_error="ignore")  # nobody takes what it holds, so that is made again


async def _close(dask_worker: distributed.Worker) -> None:
    dask_worker.status = Status.closing_gracefully
    dask_worker.loop.add_callback(dask_worker.close, reason="dfx-worker-mismatch")


def versions(packages: Mapping[str, Any]) -> Versions:
    """Give versions as they are compared: Python's first two numbers, torch without its build (+cpu, +cu130)."""
    found: dict[str, str | None] = {name: packages.get(name) for name in PACKAGES}
    return {name: said and said.partition("+")[0] for name, said in found.items()} | {
        "python": ".".join(str(packages["python"]).split(".")[:2])
    }


def difference(here: Versions, there: Versions) -> str:
    """Name what has another version there than here; empty when nothing has."""
    other = {name: there.get(name) for name, version in here.items() if there.get(name) != version}
    return ", ".join(f"{name} {version or 'missing'} (here {here[name]})" for name, version in other.items())


class Admission(distributed.WorkerPlugin):  # type: ignore[misc]
    """Has a worker that doesn't fit leave as it joins, with an error in its log, before it runs any task.

    A launcher may start it again, to the same end. Raising would not do: Dask logs that, and uses the worker.
    """

    def __init__(self, expected: Versions, device: str) -> None:
        self.name = f"dfx-admission-{uuid.uuid4().hex}"  # one a run
        self.expected = expected
        self.device = device

    async def setup(self, worker: distributed.Worker) -> None:
        """Look at the worker's process."""
        try:
            differing = difference(self.expected, versions(get_versions(PACKAGES)["packages"]))
            _refuse("differ from the run's client", {worker.address: differing}, "use one environment or image for all")
            if self.device not in ("auto", "cpu"):  # else torch need not be imported yet
                _common(self.device, {worker.address: await _device_of_worker(self.device)})
        except CallError as e:
            log.error("%s", e)
            worker.status = Status.closing_gracefully  # the scheduler sends no more, and what it sent does not start
            worker.loop.add_callback(self._leave, worker, str(e))

    @staticmethod
    async def _leave(worker: distributed.Worker, reason: str) -> None:
        await worker  # before both have started, worker and nanny would wait for each other
        await worker.close(reason=reason)


def _device(device: str) -> str | EncoderError:
    try:
        return device_here(device)
    except EncoderError as e:
        return e


async def _device_of_worker(device: str) -> str | EncoderError:
    return await asyncio.to_thread(_device, device)  # importing torch takes seconds, which the event loop has not


def _common(device: str, found: Mapping[str, object]) -> str:
    """Give the device that all workers have; raises `CallError`."""
    lacking = {
        address: str(said)
        for address, said in found.items()
        if isinstance(said, Exception) and not isinstance(said, OSError)  # it died meanwhile
    }
    _refuse("lack what was asked for", lacking, "start them with it, or ask for another device")
    kinds = {address: said for address, said in found.items() if isinstance(said, str)}
    if len(set(kinds.values())) > 1:
        _refuse("have no device in common", kinds, "end those without a GPU, or ask for device='cpu'")
    return next(iter(kinds.values()), device)


def _refuse(what: str, said: Mapping[str, str], remedy: str) -> None:
    told = [f"{address}: {text}" for address, text in said.items() if text]
    if told:
        more = f"; and {len(told) - NAMED} more" if len(told) > NAMED else ""
        raise CallError(f"workers {what} ({'; '.join(told[:NAMED])}{more}): {remedy}.")
