"""What `deploy/` becomes: rendered by kustomize, expanded as the Dask operator does, started as kubelet does."""

from __future__ import annotations

import copy
import functools
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dask_kubernetes
import kopf
import pytest
import yaml
from dask_kubernetes.operator.controller import controller

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
BASE = DEPLOY / "base"
OVERLAYS = sorted(path.parent for path in DEPLOY.glob("overlays/*/kustomization.yaml"))
CHART = Path(dask_kubernetes.__file__).parent / "operator/deployment/helm/dask-kubernetes-operator"

Doc = dict[str, Any]


def _rendered(folder: Path) -> str:
    if not (kubectl := shutil.which("kubectl")):
        if folder == BASE:  # its files are whole without kustomize, but for the namespace and one label
            return "---\n".join(path.read_text() for path in sorted(folder.glob("*.yaml")))
        pytest.skip("kubectl, which has kustomize, is not installed")
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def render(folder: Path) -> list[Doc]:
    """Give the objects of a kustomization, not to be changed; the test is skipped where it can't be rendered."""
    docs = yaml.load_all(_rendered(folder), Loader=yaml.CSafeLoader)
    return [doc for doc in docs if doc and doc["kind"] != "Kustomization"]


def of_kind(docs: list[Doc], *kinds: str) -> list[Doc]:
    return [doc for doc in docs if doc["kind"] in kinds]


def expand(cluster: Doc) -> list[Doc]:
    """Give what the operator creates for a DaskCluster: its handlers' steps, with its own pure functions."""
    cluster = copy.deepcopy(cluster)
    name, spec = cluster["metadata"]["name"], cluster["spec"]
    namespace = cluster["metadata"].get("namespace", "dfx")
    meta = kopf.Body(cluster).metadata
    annotations, labels = controller._get_annotations(meta), controller._get_labels(meta)
    scheduler = controller.build_scheduler_deployment_spec(name, spec["scheduler"]["spec"], annotations, labels)
    service = controller.build_scheduler_service_spec(name, spec["scheduler"]["service"], annotations, labels)
    group = controller.build_default_worker_group_spec(name, spec["worker"], annotations, labels)
    meta = kopf.Body(group).metadata
    worker = controller.build_worker_deployment_spec(
        worker_group_name=group["metadata"]["name"],
        namespace=namespace,
        cluster_name=name,
        uuid="0123456789",
        pod_spec=spec["worker"]["spec"],
        annotations=controller._get_annotations(meta),
        labels=controller._get_labels(meta),
    )
    return [scheduler, service, worker]


def pods(docs: list[Doc]) -> Iterator[tuple[str, Doc]]:
    """Give (name, pod template) of all that runs: the operator's deployments and the Job."""
    made = [doc for cluster in of_kind(docs, "DaskCluster") for doc in expand(cluster)]
    for doc in of_kind(docs + made, "Deployment", "Job"):
        yield doc["metadata"]["name"], doc["spec"]["template"]


def containers(template: Doc) -> list[Doc]:
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


def settings(docs: list[Doc], name: str) -> dict[str, str]:
    [found] = [doc for doc in of_kind(docs, "ConfigMap") if doc["metadata"]["name"] == name]
    return dict(found.get("data") or {})


def environment(
    docs: list[Doc], container: Doc, secrets: Mapping[str, Mapping[str, str]] | None = None
) -> dict[str, str]:
    """Give a container's variables as kubelet does: envFrom, then env; of Secrets those that are given."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            found |= settings(docs, source["configMapRef"]["name"])
        else:
            found |= (secrets or {}).get(source["secretRef"]["name"], {})
    for item in container.get("env", []):
        if "value" in item:
            found[item["name"]] = item["value"]
        elif "configMapKeyRef" in item["valueFrom"]:
            ref = item["valueFrom"]["configMapKeyRef"]
            found[item["name"]] = settings(docs, ref["name"])[ref["key"]]
    return found


def arguments(container: Doc, variables: Mapping[str, str]) -> list[str]:
    """Expand $(NAME) as kubelet does; a name that is not there is an error here, and stays as it is there."""
    return [re.sub(r"\$\((\w+)\)", lambda m: variables[m[1]], argument) for argument in container["args"]]


def option(arguments: list[str], name: str) -> str:
    [value] = [a.partition("=")[2] for a in arguments if a.startswith(f"{name}=")]
    return value


def closed(schema: Any) -> Any:
    """Refuse what the API server would refuse or prune: fields that a structural schema does not name."""
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    out = {key: value for key, value in schema.items() if key != "format"}
    out["properties"] = {name: closed(value) for name, value in schema.get("properties", {}).items()}
    if "items" in schema:
        out["items"] = closed(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        out["additionalProperties"] = closed(schema["additionalProperties"])
    elif schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out["additionalProperties"] = False
    return out


@functools.cache
def crd_schema(kind: str) -> Doc:
    """Give the closed schema of a Dask kind, out of the operator's chart."""
    definition = yaml.load((CHART / f"crds/{kind.lower()}.yaml").read_text(), Loader=yaml.CSafeLoader)
    [version] = definition["spec"]["versions"]
    schema: Doc = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"] |= {"metadata": {}, "apiVersion": {"const": "kubernetes.dask.org/v1"}, "kind": {"const": kind}}
    return schema
