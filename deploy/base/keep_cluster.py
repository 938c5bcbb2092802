"""Put the driver's Dask cluster back when it has gone; remember it while it is there.

    python keep_cluster.py daskclusters/NAME [daskautoscalers/NAME]

The operator deletes a cluster that was idle for its idleTimeout, as it must, also while a driver waits for a node.
This runs before each start of the driver. What is there is kept in the ConfigMap dfx-cluster, as it was applied, so a
cluster that comes back is the one that the overlay describes. The standard library is enough for six kinds of requests.
"""

from __future__ import annotations

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ACCOUNT = Path(os.environ.get("DFX_SERVICE_ACCOUNT", "/var/run/secrets/kubernetes.io/serviceaccount"))
PATIENCE = 600
"""Seconds to wait for what comes (the rest of a `kubectl apply`) or goes (the children of a deleted cluster)."""
TRY_AGAIN = 3
NOT_OURS = ("kopf.zalando.org/", "kubernetes.dask.org/")
"""Annotations that the operator writes about an object's past."""


class Api:
    """The Kubernetes API, as this pod's service account may use it."""

    def __init__(self) -> None:
        host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
        self.server = f"https://{f'[{host}]' if ':' in host else host}:{port}"
        self.namespace = (ACCOUNT / "namespace").read_text()
        self.context = ssl.create_default_context(cafile=ACCOUNT / "ca.crt")

    def call(self, method: str, group: str, kind: str, name: str = "", body: Any = None) -> dict[str, Any] | None:
        """Give the answer; None where there is no such object, or (POST) where there is one already."""
        request = urllib.request.Request(
            f"{self.server}/{group}/namespaces/{self.namespace}/{kind}" + (f"/{name}" if name else ""),
            data=None if body is None else json.dumps(body).encode(),
            method=method,
            headers={
                "Authorization": f"Bearer {(ACCOUNT / 'token').read_text()}",  # read anew: kubelet renews it
                "Content-Type": "application/merge-patch+json" if method == "PATCH" else "application/json",
            },
        )
        try:
            with urllib.request.urlopen(request, context=self.context, timeout=30) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as e:
            if e.code == (409 if method == "POST" else 404):
                return None
            raise OSError(f"{method} {e.url}: {e.code} {e.read().decode(errors='replace')}") from e


def as_applied(found: dict[str, Any]) -> dict[str, Any]:
    """Give an object without what the cluster has added to it."""
    meta = found["metadata"]
    annotations = {k: v for k, v in meta.get("annotations", {}).items() if not k.startswith(NOT_OURS)}
    kept = {"name": meta["name"], "labels": meta.get("labels", {}), "annotations": annotations}
    return {"apiVersion": found["apiVersion"], "kind": found["kind"], "metadata": kept, "spec": found["spec"]}


def leftovers(api: Api, cluster: str) -> list[str]:
    """Name what is left of a deleted cluster: the operator takes it for the new one's, and then it is collected."""
    children = [
        ("apis/kubernetes.dask.org/v1", "daskworkergroups", f"{cluster}-default"),
        ("apis/apps/v1", "deployments", f"{cluster}-scheduler"),
        ("api/v1", "services", f"{cluster}-scheduler"),
    ]
    return [f"{kind}/{name}" for group, kind, name in children if api.call("GET", group, kind, name)]


def keep(api: Api, kind: str, name: str, owners: set[str], deadline: float) -> str:
    """Remember an object or put it back; gives its uid. `owners`: uids of the objects that it may belong to."""
    group = "apis/kubernetes.dask.org/v1"
    while time.monotonic() < deadline:
        found = api.call("GET", group, kind, name)
        if found is None:
            memory = api.call("GET", "api/v1", "configmaps", "dfx-cluster") or {}
            remembered = (memory.get("data") or {}).get(kind)
            if remembered is None:
                waits = "it to be applied"
            elif kind == "daskclusters" and (left := leftovers(api, name)):
                waits = f"{', '.join(left)} to go"
            elif made := api.call("POST", group, kind, body=json.loads(remembered)):
                print(f"{kind}/{name} had gone: put back", flush=True)
                return str(made["metadata"]["uid"])
            else:
                continue  # somebody else was faster
        else:
            meta = found["metadata"]
            parents = {owner["uid"] for owner in meta.get("ownerReferences", [])}
            if "deletionTimestamp" not in meta and not (owners and parents - owners):
                api.call(
                    "PATCH", "api/v1", "configmaps", "dfx-cluster", {"data": {kind: json.dumps(as_applied(found))}}
                )
                print(f"{kind}/{name} is there", flush=True)
                return str(meta["uid"])
            waits = "it to go"
        print(f"{kind}/{name}: waiting for {waits}", flush=True)
        time.sleep(2)
    raise TimeoutError(
        f"{kind}/{name} did not come in {PATIENCE} seconds: apply the overlay, and look at the operator."
    )


def main(arguments: list[str]) -> int:
    """Keep the named objects, a cluster before what belongs to it."""
    api, owners = Api(), set[str]()
    deadline = time.monotonic() + PATIENCE
    try:
        for argument in arguments:
            kind, _, name = argument.partition("/")
            owners.add(keep(api, kind, name, owners, deadline))
    except OSError as e:  # URLError and TimeoutError are kinds of it
        print(f"keep_cluster: {e}", file=sys.stderr)
        return TRY_AGAIN
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
