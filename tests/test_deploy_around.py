"""What stands around the manifests of `deploy/`: overlays of users, monitoring, the operator's values, the image."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import textwrap
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jsonschema
import pytest
import yaml
from manifests import CHART, DEPLOY, ROOT, Doc, containers, crd_schema, environment, of_kind, pods, settings

from dfx.counters import HELP


@pytest.fixture
def mine(tmp_path: Path) -> Callable[[str], list[Doc]]:
    """Render an overlay that a user would write beside ours."""
    if not (kubectl := shutil.which("kubectl")):
        pytest.skip("kubectl, which has kustomize, is not installed")
    shutil.copytree(DEPLOY, tmp_path / "deploy")

    def render(text: str) -> list[Doc]:
        folder = tmp_path / "deploy/overlays/mine"
        folder.mkdir(exist_ok=True)
        (folder / "kustomization.yaml").write_text(text)
        done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return list(yaml.safe_load_all(done.stdout))

    return render


def test_components_go_together(mine: Callable[[str], list[Doc]]) -> None:
    names = [folder.name for folder in sorted((DEPLOY / "components").iterdir())]
    assert {"gpu-spot", "tls", "eks", "gke", "s3-secret"} == set(names)
    names.remove("gke")  # a platform is one of two
    text = {"resources": ["../gpu-autoscale"], "components": [f"../../components/{name}" for name in names]}
    docs = mine(yaml.safe_dump(text))
    assert {doc["metadata"].get("namespace") for doc in docs if doc["kind"] != "Namespace"} == {"dfx"}
    for _, template in pods(docs):
        [main] = template["spec"]["containers"]
        assert environment(docs, main)["DASK_SCHEDULER_ADDRESS"] == "tls://dfx-scheduler:8786"
        assert {"name": "tls", "mountPath": "/etc/dask-tls", "readOnly": True} in main["volumeMounts"]
    for doc in of_kind(docs, "DaskCluster", "DaskAutoscaler"):
        jsonschema.Draft4Validator(crd_schema(doc["kind"])).validate(doc)


def test_overlays_of_the_readme_say_what_they_change(mine: Callable[[str], list[Doc]]) -> None:
    blocks = re.findall(r"^( *)```yaml\n(.*?)^\1```", (DEPLOY / "README.md").read_text(), re.S | re.M)
    assert len(blocks) == 2
    for _, block in blocks:
        docs = mine(textwrap.dedent(block))
        for _, template in pods(docs):
            images = {container["image"] for container in containers(template)}
            assert images == {f"registry.example.org/dfx:{version('dfx')}"}
    assert settings(docs, "dfx-run")["DFX_OUT"] == "s3://features/breast"


def test_alerts_and_dashboard_ask_for_metrics_that_dfx_has() -> None:
    rules = (DEPLOY / "monitoring/rules.yaml").read_text()
    dashboard = json.loads((DEPLOY / "monitoring/dashboard.json").read_text())
    asked = set(re.findall(r"dfx_\w+_total", rules + json.dumps(dashboard)))
    assert asked
    assert asked <= set(HELP)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_operators_values_are_ones_of_its_chart() -> None:
    chart = yaml.safe_load((CHART / "values.yaml").read_text())

    def unknown(ours: Doc, theirs: Doc) -> list[str]:
        found = []
        for key, value in ours.items():
            if key not in theirs:
                found.append(key)
            elif isinstance(value, dict) and theirs[key]:
                found += unknown(value, theirs[key])
        return found

    assert unknown(yaml.safe_load((DEPLOY / "operator-values.yaml").read_text()), chart) == []
    [pinned] = re.findall(r"--version (\S+)", (DEPLOY / "operator-values.yaml").read_text())
    assert f"--version {pinned}" in (DEPLOY / "README.md").read_text()


def test_the_image_is_built_in_two_stages_for_a_user_with_a_name_and_no_rights() -> None:
    path = DEPLOY / "Containerfile"
    subprocess.run(["hadolint", path], check=True)
    text = path.read_text()
    lines = text.splitlines()
    assert sum(line.startswith("FROM ${BASE_IMAGE}") for line in lines) == 2
    assert re.search(r"^ARG BASE_IMAGE=\S+:\d+\.\d+\.\d+-[a-z-]+$", text, re.M)
    assert {"ARG TORCH_INDEX=https://pypi.org/simple", "ARG PIP_CERT=", "USER 10001:10001"} <= set(lines)
    for name in ("USER=dfx", "LOGNAME=dfx", "HOME=/scratch"):
        assert name in text
    assert lines[-2].startswith('ENTRYPOINT ["tini"')
    kept = {line[1:] for line in (DEPLOY / ".containerignore").read_text().splitlines() if line.startswith("!")}
    assert {"dfx", "pyproject.toml", "README.md", "LICENSE"} == kept
    assert all((ROOT / name).exists() for name in kept)
