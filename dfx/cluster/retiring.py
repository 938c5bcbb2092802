"""Retiring a worker: what it holds goes to others, then it ends. For what runs before a machine goes away."""

from __future__ import annotations

import asyncio
import re

import distributed
from distributed.core import rpc

from dfx.cluster.connecting import check_certificates
from dfx.errors import ClusterLost


def retire(
    scheduler: str, name: str, *, security: distributed.Security | None = None, timeout: float = 60
) -> list[str]:
    """Retire the worker of a name, or those that `dask worker --nworkers` made of it, and give their addresses.

    It asks the scheduler as a worker does, with a worker's certificates, and needs no HTTP route. When it returns,
    what they held is with others and the scheduler has let them go; none of that name is none to retire.
    Raises `ClusterLost` when the scheduler does not do it in `timeout` seconds, or nobody takes what they hold.
    """
    security = check_certificates(scheduler, security)

    async def run() -> list[str]:
        async with asyncio.timeout(timeout):
            async with rpc(
                scheduler, connection_args=security.get_connection_args("worker"), timeout=timeout
            ) as remote:
                workers = {a: str(said["name"]) for a, said in (await remote.identity(n_workers=-1))["workers"].items()}
                addresses = [a for a, said in workers.items() if said == name]
                addresses = addresses or [
                    a for a, said in workers.items() if re.fullmatch(rf"{re.escape(name)}-\d+", said)
                ]
                retired = await remote.retire_workers(workers=addresses, close_workers=True) if addresses else {}
        if kept := [address for address in addresses if address not in retired]:
            raise ClusterLost(f"{name} ({', '.join(kept)}) is not retired: no other worker takes what it holds.")
        return addresses

    try:
        return asyncio.run(run())
    except OSError as e:  # also the timeout
        raise ClusterLost(
            f"{name} is not retired by the scheduler at {scheduler} in {timeout:g} seconds ({e or 'no answer'})."
        ) from e
