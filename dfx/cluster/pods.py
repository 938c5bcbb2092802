"""A cluster on Kubernetes, through the Dask operator: the resource that asks for it, and a client-side handle on it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import dask
from dask.utils import parse_bytes

from dfx.errors import CallError

API = "distributed.http.scheduler.api"
"""What the operator retires workers and asks for idleness by; it is not among Dask's own routes, and without it the
operator deletes workers that hold results."""
GRACE = 60
"""Seconds that a worker's pod has to hand over what it holds."""


def cluster_spec(
    name: str,
    image: str,
    n_workers: int,
    *,
    gpus_per_worker: int = 1,
    threads_per_gpu: int = 8,
    cpus: str = "8",
    memory: str = "32Gi",
    idle_timeout: int = 1800,
    env: Mapping[str, str] | None = None,
    service_account: str | None = None,
) -> dict[str, Any]:
    """Build a DaskCluster (kubernetes.dask.org/v1) of one group of equal worker pods.

    One group, because the operator picks the workers to end from all groups alike (dask-kubernetes#914). `cpus` and
    `memory`: of a worker pod, as Kubernetes quantities, its limit and request; Dask gets 90 percent of the memory, in
    equal shares for the pod's GPUs, each with a process and `threads_per_gpu` threads of its own (of a pod without
    GPUs, one). `idle_timeout`: seconds after which an idle cluster is deleted, also one that was never used: more
    than nodes and images take to come. `env`: for all containers. Raises `CallError` for what can't be.
    """
    for what, value, least in (("n_workers", n_workers, 1), ("gpus_per_worker", gpus_per_worker, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise CallError(f"{what} must be a whole number of at least {least}, not {value!r}.")
    if not re.fullmatch(r"\d+([KMGT]i?)?", memory):  # the operator would take it, and fail at the pod
        raise CallError(f"memory {memory!r} is no Kubernetes quantity: use one such as '32Gi'.")
    processes = max(1, gpus_per_worker)
    variables = [{"name": key, "value": value} for key, value in (env or {}).items()]
    amounts = {"cpu": cpus, "memory": memory} | ({"nvidia.com/gpu": str(gpus_per_worker)} if gpus_per_worker else {})
    worker = ["dask", "worker", "--name", "$(DASK_WORKER_NAME)", "--nthreads", str(threads_per_gpu)]
    worker += ["--memory-limit", str(int(parse_bytes(memory) * 0.9) // processes), "--local-directory", "/tmp"]
    worker += ["--dashboard-address", ":8788", "--death-timeout", "120"]
    if processes > 1:
        worker += ["--nworkers", str(processes), "--preload-nanny", "dfx.pin"]
    routes = [*dask.config.get("distributed.scheduler.http.routes"), API]
    scheduler = _container("scheduler", image, ["dask", "scheduler", "--host", "0.0.0.0"], variables) | {
        "ports": [_port("tcp-comm", 8786), _port("http-dashboard", 8787)],
        "readinessProbe": {"httpGet": {"port": "http-dashboard", "path": "/health"}, "periodSeconds": 5},
        "livenessProbe": {"httpGet": {"port": "http-dashboard", "path": "/health"}, "periodSeconds": 20},
    }
    scheduler["env"] = [*variables, {"name": "DASK_DISTRIBUTED__SCHEDULER__HTTP__ROUTES", "value": str(routes)}]
    selector = {"dask.org/cluster-name": name, "dask.org/component": "scheduler"}
    return {
        "apiVersion": "kubernetes.dask.org/v1",
        "kind": "DaskCluster",
        "metadata": {"name": name},
        "spec": {
            "idleTimeout": idle_timeout,
            "worker": {
                "replicas": n_workers,
                "spec": _pod(
                    _container("worker", image, worker, variables)
                    | {
                        "ports": [_port("http-dashboard", 8788)],
                        "resources": {"limits": amounts, "requests": amounts},
                        "lifecycle": {"preStop": {"exec": {"command": ["dfx", "worker-retire"]}}},
                    },
                    service_account,
                ),
            },
            "scheduler": {
                "spec": _pod(scheduler, service_account),
                "service": {
                    "type": "ClusterIP",
                    "selector": selector,
                    "ports": [
                        {"name": port, "port": number, "targetPort": port, "protocol": "TCP"}
                        for port, number in (("tcp-comm", 8786), ("http-dashboard", 8787))
                    ],
                },
            },
        },
    }


def kubernetes(spec: Mapping[str, Any], *, namespace: str | None = None, timeout: int = 600) -> Any:
    """Create the cluster of a `cluster_spec`, or connect to it, and give it: a `Client` takes it.

    It needs a Kubernetes configuration with rights on daskclusters, and the Dask operator there. One that was created
    ends with its `with` block. `timeout`: seconds that its scheduler may take to come. Raises `CallError` without
    `dfx[kubernetes]`.
    """
    try:
        from dask_kubernetes.operator import KubeCluster
    except ImportError as e:
        raise CallError(f"Kubernetes needs dask-kubernetes ({e}): pip install 'dfx[kubernetes]'.") from e
    return KubeCluster(custom_cluster_spec=dict(spec), namespace=namespace, resource_timeout=timeout, quiet=True)


def _port(name: str, number: int) -> dict[str, Any]:
    return {"name": name, "containerPort": number, "protocol": "TCP"}


def _container(name: str, image: str, args: list[str], env: list[dict[str, str]]) -> dict[str, Any]:
    return {
        "name": name,
        "image": image,
        "args": args,
        "env": list(env),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "scratch", "mountPath": "/tmp"}],
    }


def _pod(container: dict[str, Any], service_account: str | None) -> dict[str, Any]:
    """Pods that are admitted under the restricted pod security standard."""
    return {
        "containers": [container],
        "volumes": [{"name": "scratch", "emptyDir": {}}],
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "terminationGracePeriodSeconds": GRACE,
        "automountServiceAccountToken": False,
    } | ({"serviceAccountName": service_account} if service_account else {})
