"""The README's commands and examples run as they stand. (`.ci/run` runs the two that install.)"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
from moto.server import ThreadedMotoServer

import dfx
from dfx.slides.synthetic import write_slide

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_slide("slide.svs", 1200, 1000)
    Path("slides.csv").write_text("slide,mpp,label\nslide.svs,0.5,tumour\n")
    ring = [[100, 100], [900, 100], [900, 800], [100, 800], [100, 100]]
    Path("tumour.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    return tmp_path


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SLURM of one machine: jobs are processes here."""
    commands = {
        # The script is gone once this has answered.
        "sbatch": 'job=$(cat "$1"); sh -c "$job" >/dev/null 2>&1 & echo "Submitted batch job $!"',
        "scancel": 'kill "$1" 2>/dev/null || true',
    }
    for name, text in commands.items():
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


@pytest.fixture
def s3(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An S3 with the slide in a bucket and another bucket for what is made of it."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    given = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret"}
    for name, value in given.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    files = s3fs.S3FileSystem(endpoint_url=given["ENDPOINT_URL"], key="key", secret="secret", skip_instance_cache=True)
    for bucket in ("slides", "features"):
        files.mkdir(bucket)
    files.pipe_file("slides/slide.svs", (folder / "slide.svs").read_bytes())
    yield
    server.stop()


def lines_of(*programs: str) -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line.startswith(programs)]


@pytest.mark.slow
@pytest.mark.usefixtures("slurm")
def test_python_examples_run_from_top_to_bottom(folder: Path) -> None:
    script = folder / "readme.py"
    examples = [b for b in blocks("python") if "tiatoolbox" not in b]
    assert len(examples) >= 3
    script.write_text("\n".join(examples))
    quiet = ("-W", "error", "-W", "ignore:Port")  # Dask warns when another dashboard has its usual port
    done = subprocess.run([sys.executable, *quiet, script], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("s3")
def test_shell_commands_run(folder: Path) -> None:
    lines = lines_of("dfx ")
    assert len(lines) >= 12
    for line in lines:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", *shlex.split(line)], capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, (line, done.stderr)
    for name in ("slide", "clusters", "similar", "sheet"):
        assert (folder / f"{name}.png").stat().st_size > 5_000
    assert dfx.open_features(folder / "cohort" / "slide.zarr").attrs["label"] == "tumour"
    assert list((folder / "job").glob("*/slide_features_mean-resnet18/slide.h5"))


def test_manifests_that_are_to_be_applied_are_there() -> None:
    (line,) = lines_of("kubectl ")  # what they render to is tested with deploy/
    assert (README.parent / line.removeprefix("kubectl apply -k ") / "kustomization.yaml").is_file()


def test_ten_recipes_are_numbered() -> None:
    assert re.findall(r"^\*\*(\d+)\. ", README.read_text(), re.MULTILINE) == [str(n) for n in range(1, 11)]


def test_the_commands_that_continuous_integration_runs_are_marked() -> None:
    text = README.read_text()
    for name in ("demo", "test"):
        assert re.search(rf"<!-- command: {name} -->\n```sh\npip install .*\n```\n", text)
