"""Clients: the current one, one that was given, and connecting to a scheduler by its address."""

from __future__ import annotations

import time
from pathlib import Path

import distributed

from dfx.errors import CallError, CallTypeError, ClusterLost

PROTOCOLS = ("tcp", "tls", "ws", "wss")


def current_client() -> distributed.Client | None:
    """Give the current Dask client, None where there is none."""
    try:
        return distributed.Client.current()
    except ValueError:
        return None


def check_client(client: object) -> distributed.Client | None:
    """Refuse what is no synchronous Dask client, and one that is not connected."""
    if client is None:
        return None
    if not isinstance(client, distributed.Client):
        raise CallTypeError(f"client must be a distributed.Client or None, not {type(client).__name__}.")
    if client.asynchronous:
        raise CallError("client is asynchronous: give one made without asynchronous=True.")
    if client.status != "running":
        raise CallError(f"client {client.id} is {client.status}: connect it first.")
    return client


def connect(
    address: str, *, security: distributed.Security | None = None, wait: float = 30, workers: bool = False
) -> distributed.Client:
    """Connect to a scheduler; `wait`: seconds for it to answer and (`workers`) to have a first worker.

    `security`: certificates for tls:// (None: those of Dask's configuration or DASK_DISTRIBUTED__COMM__TLS__…).
    Raises `CallError` for an address or certificates that can't be used, `ClusterLost` when nothing answers.
    """
    security = check_certificates(address, security)
    deadline = time.monotonic() + wait
    try:
        client = distributed.Client(address, timeout=wait, security=security, set_as_default=False)
    except ValueError as e:
        raise CallError(f"{address} is no scheduler's address ({e}): use tcp://HOST:PORT or tls://HOST:PORT.") from e
    except OSError as e:
        raise ClusterLost(
            f"no Dask scheduler answers at {address} in {wait:g} seconds ({e}): check the address, and that it runs."
        ) from e
    try:
        there = not workers or has_worker(client, deadline - time.monotonic())
    except OSError:  # the scheduler went away meanwhile
        there = False
    if not there:
        client.close(timeout=5)
        raise ClusterLost(f"the cluster at {address} has no worker after {wait:g} seconds: start workers.")
    return client


def has_worker(client: distributed.Client, wait: float) -> bool:
    """Wait some seconds for a cluster's first worker, and say whether there is one; raises `OSError`.

    A paused one counts, which `Client.wait_for_workers` takes for none.
    """
    deadline = time.monotonic() + wait
    while not client.scheduler_info(n_workers=1)["workers"]:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def check_certificates(address: str, security: distributed.Security | None) -> distributed.Security:
    """Refuse what is no scheduler's address, and tls:// without certificates; give those given, else configured."""
    protocol, found, _ = address.partition("://")
    if found and protocol not in PROTOCOLS:  # a Client that fails on it would keep the process from ending
        raise CallError(f"{address} is no scheduler's address: use {', '.join(f'{p}://' for p in PROTOCOLS)}.")
    security = distributed.Security() if security is None else security
    if protocol == "tls" and not security.tls_ca_file:
        raise CallError(
            f"{address} needs certificates: give --tls-ca, --tls-cert and --tls-key, a Security, or set "
            "DASK_DISTRIBUTED__COMM__TLS__CA_FILE and …__CLIENT__CERT and __KEY (a worker's: …__WORKER__…)."
        )
    return security


def security_of(ca: str | Path, cert: str | Path, key: str | Path) -> distributed.Security:
    """Give TLS by certificate files (PEM), with nothing unencrypted; raises `CallError` when one is missing."""
    for name, path in (("ca", ca), ("cert", cert), ("key", key)):
        if not Path(path).is_file():
            raise CallError(f"--tls-{name} {path} is not a file: give a PEM file.")
    return distributed.Security(
        tls_ca_file=str(ca), tls_client_cert=str(cert), tls_client_key=str(key), require_encryption=True
    )
