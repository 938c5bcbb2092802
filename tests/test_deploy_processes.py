"""The commands and variables of the manifests, started as real processes: scheduler, two workers, driver."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from certificates import certificates
from clusters import free_port, until
from manifests import DEPLOY, Doc, arguments, environment, of_kind, pods

import dfx
from dfx.slides.synthetic import write_slide

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
WORKER = "dfx-default-worker-0123456789"
WORKERS = ("one", "two")


wait_for = partial(until, seconds=240)


class Node:
    """Runs containers of a rendered overlay as kubelet would, but for the image: addresses and folders are here."""

    def __init__(
        self, docs: list[Doc], folder: Path, stack: ExitStack, secrets: Mapping[str, dict[str, str]] | None = None
    ) -> None:
        self.docs, self.folder, self.stack, self.secrets = docs, folder, stack, secrets or {}
        self.templates = dict(pods(docs))
        self.ports = {"8786": free_port(), "8787": free_port()}
        (folder / "scratch").mkdir()

    def here(self, text: str) -> str:
        text = text.replace("dfx-scheduler:8786", f"127.0.0.1:{self.ports['8786']}")
        return re.sub(r"(?<!\w)/(scratch|etc/dask-tls)\b", lambda m: f"{self.folder}{m[0]}", text)

    def start(self, pod: str, *, init: bool = False, hook: bool = False, **variables: str) -> subprocess.Popen[str]:
        """Start a pod's first container, or its preStop hook. `variables`: what makes a worker another one."""
        spec = self.templates[pod]["spec"]
        container = spec["initContainers" if init else "containers"][0]
        given = environment(self.docs, container, self.secrets) | variables
        given = {name: self.here(text) for name, text in given.items()}
        line = {"args": container["lifecycle"]["preStop"]["exec"]["command"]} if hook else container
        command = [self.here(argument) for argument in arguments(line, given)]
        if pod == "dfx-scheduler":
            command = [re.sub(r"(?<=[=:])878[67]$", lambda m: str(self.ports[m[0]]), part) for part in command]
        else:  # several workers on one host
            command = [re.sub(r"(?<=[=:])878[789]$", "0", part) for part in command]
        command = [sys.executable if part == "python" else part for part in command]
        log = self.stack.enter_context((self.folder / f"{pod}-{time.monotonic_ns()}.log").open("w"))
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            env={
                **given,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PYTHONPATH": str(Path(dfx.__file__).parents[1]),
                "HOME": str(self.folder / "scratch"),
                "TMPDIR": str(self.folder / "scratch"),
            },
        )
        self.stack.callback(process.wait)
        self.stack.callback(process.kill)
        return process

    def logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("*.log")))

    def fetch(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports['8787']}{path}", timeout=10) as answer:
            return str(answer.read().decode())

    def begin(self) -> None:
        """Start the scheduler and two workers, and the init container that makes the slide, if there is one."""
        self.start("dfx-scheduler")
        if "initContainers" in self.templates[WORKER]["spec"]:
            assert self.start(WORKER, init=True).wait(240) == 0, self.logs()
        self.running = {name: self.start(WORKER, DASK_WORKER_NAME=name) for name in WORKERS}
        wait_for(lambda: self.workers() == set(WORKERS))

    def workers(self) -> set[str]:
        try:
            return {worker["name"] for worker in json.loads(self.fetch("/api/v1/get_workers"))["workers"]}
        except OSError:
            return set()


def rendered(folder: Path, *components: str, base: str = "cpu-smoke", patches: Sequence[Doc] = ()) -> list[Doc]:
    if not (kubectl := shutil.which("kubectl")):
        pytest.skip("kubectl, which has kustomize, is not installed")
    shutil.copytree(DEPLOY, folder / "deploy")
    mine = folder / "deploy/overlays/mine"
    mine.mkdir()
    names = [f"../../components/{name}" for name in components]
    (mine / "kustomization.yaml").write_text(
        yaml.safe_dump({"resources": [f"../{base}"], "components": names, "patches": list(patches)})
    )
    done = subprocess.run([kubectl, "kustomize", mine], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_a_driver_that_is_killed_is_started_again_and_goes_on(tmp_path: Path, stack: ExitStack) -> None:
    node = Node(rendered(tmp_path), tmp_path, stack)
    node.begin()
    chunks = tmp_path / "scratch/features/smoke.zarr/features/c"

    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in chunks.glob("*/*") if not path.name.startswith(".")}

    first = node.start("dfx-run")
    wait_for(lambda: written() or first.poll() is not None)
    first.send_signal(signal.SIGKILL)
    assert first.wait(10) == -signal.SIGKILL, node.logs()
    before = written()
    second = node.start("dfx-run")
    assert second.wait(240) == 0, node.logs()
    after = written()
    assert len(before) < len(after)
    assert before.items() <= after.items()  # no block that was written is written again
    found = dfx.open_features(tmp_path / "scratch/features/smoke.zarr")
    assert found.attrs["status"] == "complete"
    assert np.isfinite(found.features.compute()).all()

    # The pages that the operator and Prometheus ask for.
    assert "idle_since" in json.loads(node.fetch("/api/v1/check_idle"))
    assert "workers" in json.loads(node.fetch("/api/v1/adaptive_target"))
    asked = set(re.findall(r"dask_scheduler_\w+", "".join(p.read_text() for p in (DEPLOY / "monitoring").iterdir())))
    assert asked <= set(re.findall(r"\w+", node.fetch("/metrics")))


def test_with_tls_the_run_is_encrypted_and_the_operators_pages_answer(tmp_path: Path, stack: ExitStack) -> None:
    docs = rendered(tmp_path, "tls")
    certificates(tmp_path / "etc/dask-tls")
    node = Node(docs, tmp_path, stack)
    node.begin()
    workers = json.loads(node.fetch("/api/v1/get_workers"))["workers"]
    assert all(worker["address"].startswith("tls://") for worker in workers)
    assert node.start("dfx-run").wait(240) == 0, node.logs()
    assert of_kind(docs, "Certificate")


def test_slides_and_stores_in_a_bucket_outlive_the_driver_and_a_drained_worker(
    tmp_path: Path, stack: ExitStack, moto: str
) -> None:
    import s3fs

    secret = {"AWS_ACCESS_KEY_ID": "AKIADFX", "AWS_SECRET_ACCESS_KEY": "s3cret"}
    secret |= {"AWS_ENDPOINT_URL": f"http://{moto}"}
    fs = s3fs.S3FileSystem(
        key=secret["AWS_ACCESS_KEY_ID"],
        secret=secret["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=secret["AWS_ENDPOINT_URL"],
        use_listings_cache=False,
    )
    fs.mkdir("cohort")
    slide = write_slide(tmp_path / "one.svs", 6144, 4096)
    fs.put_file(str(slide), "cohort/one.svs")
    fs.pipe_file("cohort/slides.csv", b"slide\ns3://cohort/one.svs\n")

    def of(name: str, **values: str) -> Doc:
        ops = [{"op": "replace", "path": f"/data/{key}", "value": value} for key, value in values.items()]
        return {"target": {"kind": "ConfigMap", "name": name}, "patch": yaml.safe_dump(ops)}

    asked = {"DFX_TABLE": "s3://cohort/slides.csv", "DFX_OUT": "s3://cohort/features", "DFX_PATCH": "96"}
    asked |= {"DFX_ENCODER": "test_resnet.r160_in1k", "DFX_DEVICE": "cpu", "DFX_WAIT": "240"}
    args = "/spec/template/spec/containers/0/args/-"
    unlearned = yaml.safe_dump([{"op": "add", "path": args, "value": "--weights=random"}])
    patches = [of("dask-config", WORKER_THREADS="2", WORKER_MEMORY="1.8GiB"), of("dfx-run", **asked)]
    patches += [{"target": {"kind": "Job", "name": "dfx-run"}, "patch": unlearned}]
    node = Node(rendered(tmp_path, base="s3-secret", patches=patches), tmp_path, stack, {"dfx-s3": secret})
    node.begin()

    def written() -> dict[str, object]:
        return {
            path: said["LastModified"]
            for path, said in fs.find("cohort/features", detail=True).items()
            if "/c/" in path
        }

    first = node.start("dfx-run")
    wait_for(lambda: written() or first.poll() is not None)
    first.send_signal(signal.SIGKILL)
    assert first.wait(10) == -signal.SIGKILL, node.logs()
    node.start(WORKER, hook=True, DASK_WORKER_NAME="one")
    assert node.running["one"].wait(60) == 0, node.logs()  # so that the container ends without a signal
    wait_for(lambda: node.workers() == {"two"})
    before = written()
    assert before
    second = node.start("dfx-run")
    assert second.wait(240) == 0, node.logs()
    after = written()
    assert len(before) < len(after)
    assert before.items() <= after.items()  # no block that was written is written again
    options = {"key": secret["AWS_ACCESS_KEY_ID"], "secret": secret["AWS_SECRET_ACCESS_KEY"]}
    options |= {"endpoint_url": secret["AWS_ENDPOINT_URL"]}
    found = dfx.open_features("s3://cohort/features/one.zarr", storage_options=options)
    assert found.attrs["status"] == "complete"
    assert np.isfinite(found.features.compute()).all()
    assert secret["AWS_SECRET_ACCESS_KEY"] not in node.logs()
    assert secret["AWS_SECRET_ACCESS_KEY"].encode() not in fs.cat_file("cohort/features/one.zarr/zarr.json")
