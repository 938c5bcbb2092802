"""`deploy/base/keep_cluster.py`, as the driver's pod starts it, against a server that answers as an API server does."""

from __future__ import annotations

import copy
import json
import os
import ssl
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from certificates import certificates
from manifests import BASE, DEPLOY, Doc, of_kind, render

NAMESPACED = "/namespaces/dfx/"
DASK = "apis/kubernetes.dask.org/v1"
CHILDREN = (
    f"{DASK}/daskworkergroups/dfx-default",
    "apis/apps/v1/deployments/dfx-scheduler",
    "api/v1/services/dfx-scheduler",
)


class Cluster(ThreadingHTTPServer):
    """Objects by group, kind and name; GET, POST and merge-PATCH of them, for the holder of the token."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, Doc] = {}
        self.seen: list[str] = []
        self.goes: list[str] = []
        """Objects that the garbage collector takes at the second look at them."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
        self.socket = context.wrap_socket(self.socket, server_side=True)

    def put(self, path: str, doc: Doc) -> Doc:
        doc = copy.deepcopy(doc)
        doc["metadata"] |= {"uid": str(uuid.uuid4()), "resourceVersion": "1", "creationTimestamp": "now"}
        self.objects[path] = doc
        return doc


class Handler(BaseHTTPRequestHandler):
    server: Cluster

    def do_GET(self) -> None:
        self.reply()

    def do_POST(self) -> None:
        self.reply()

    def do_PATCH(self) -> None:
        self.reply()

    def reply(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(size)) if size else None
        path = self.path.replace(NAMESPACED, "/").removeprefix("/")
        self.server.seen.append(f"{self.command} {path}")
        if NAMESPACED not in self.path or self.headers["Authorization"] != "Bearer let-me-in":
            return self.send(403, {"message": "forbidden"})
        if self.command == "POST":
            path = f"{path}/{body['metadata']['name']}"
            if path in self.server.objects:
                return self.send(409, {})
            assert not set(body["metadata"]) - {"name", "labels", "annotations"}
            return self.send(201, self.server.put(path, body))
        found = self.server.objects.get(path)
        if found is None:
            return self.send(404, {})
        if self.command == "PATCH":
            assert self.headers["Content-Type"] == "application/merge-patch+json"
            found["data"] = found.get("data", {}) | body["data"]
        if path in self.server.goes and self.server.seen.count(f"GET {path}") > 1:
            del self.server.objects[path]
        return self.send(200, found)

    def send(self, code: int, body: Doc) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    certificates(tmp_path)
    (tmp_path / "token").write_text("let-me-in")
    (tmp_path / "namespace").write_text("dfx")
    with Cluster(tmp_path) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        server.put("api/v1/configmaps/dfx-cluster", {"metadata": {"name": "dfx-cluster"}})
        yield server
        server.shutdown()
        thread.join()


def keep(cluster: Cluster, folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    address, port = cluster.server_address[:2]
    where = {"KUBERNETES_SERVICE_HOST": str(address), "KUBERNETES_SERVICE_PORT": str(port)}
    return subprocess.run(
        [sys.executable, BASE / "keep_cluster.py", *names],
        env={**os.environ, **where, "DFX_SERVICE_ACCOUNT": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def applied(kind: str, folder: Path = BASE) -> Doc:
    [doc] = of_kind(render(folder), kind)
    return doc


def what_counts(doc: Doc) -> Any:
    return doc["kind"], doc["spec"], doc["metadata"]["name"], doc["metadata"]["annotations"]


def test_a_cluster_that_has_gone_is_put_back_as_it_was_applied(cluster: Cluster, tmp_path: Path) -> None:
    path, doc = f"{DASK}/daskclusters/dfx", applied("DaskCluster")
    live = cluster.put(path, doc)
    live["status"] = {"phase": "Running"}
    live["metadata"]["annotations"] |= {"kopf.zalando.org/last-handled-configuration": "{}"}
    done = keep(cluster, tmp_path, "daskclusters/dfx")
    assert (done.returncode, done.stdout) == (0, "daskclusters/dfx is there\n"), done.stderr
    assert not any(request.startswith("POST") for request in cluster.seen)

    del cluster.objects[path]
    done = keep(cluster, tmp_path, "daskclusters/dfx")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "daskclusters/dfx had gone: put back\n"
    assert what_counts(cluster.objects[path]) == what_counts(doc)
    assert "status" not in cluster.objects[path]


def test_nothing_is_put_back_beside_what_is_left_of_the_last_one(cluster: Cluster, tmp_path: Path) -> None:
    path = f"{DASK}/daskclusters/dfx"
    cluster.put(path, applied("DaskCluster"))
    assert keep(cluster, tmp_path, "daskclusters/dfx").returncode == 0
    cluster.objects[path]["metadata"]["deletionTimestamp"] = "now"
    for child in CHILDREN:
        cluster.put(child, {"metadata": {"name": "child"}})
    cluster.goes = [path, *CHILDREN]
    done = keep(cluster, tmp_path, "daskclusters/dfx")
    assert done.returncode == 0, done.stderr
    assert "waiting for it to go" in done.stdout
    assert "waiting for daskworkergroups/dfx-default, deployments/dfx-scheduler, services/dfx-scheduler" in done.stdout
    assert set(cluster.objects) == {path, "api/v1/configmaps/dfx-cluster"}
    assert cluster.seen[-1] == f"POST {DASK}/daskclusters"


def test_an_autoscaler_that_belongs_to_the_last_cluster_is_replaced(cluster: Cluster, tmp_path: Path) -> None:
    path, scaler = f"{DASK}/daskclusters/dfx", f"{DASK}/daskautoscalers/dfx"
    doc = applied("DaskAutoscaler", DEPLOY / "overlays/gpu-autoscale")
    doc = {**doc, "metadata": {**doc["metadata"], "annotations": {}}}
    old = cluster.put(path, applied("DaskCluster"))["metadata"]["uid"]
    cluster.put(scaler, doc)
    assert keep(cluster, tmp_path, "daskclusters/dfx", "daskautoscalers/dfx").returncode == 0
    del cluster.objects[path]
    cluster.objects[scaler]["metadata"]["ownerReferences"] = [{"uid": old}]
    cluster.goes, cluster.seen = [scaler], [f"GET {scaler}"]
    done = keep(cluster, tmp_path, "daskclusters/dfx", "daskautoscalers/dfx")
    assert done.returncode == 0, done.stderr
    assert "ownerReferences" not in cluster.objects[scaler]["metadata"]
    assert what_counts(cluster.objects[scaler]) == what_counts(doc)


def test_what_it_may_not_do_is_said_and_tried_again_by_the_job(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("expired")
    done = keep(cluster, tmp_path, "daskclusters/dfx")
    assert done.returncode == 3
    assert "403" in done.stderr
    assert "forbidden" in done.stderr
