"""The README's commands and examples run as they stand. (`.ci/run` runs the two that install.)"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dfx.slides.synthetic import write_slide

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_slide("slide.svs", 1200, 1000)
    return tmp_path


def test_python_examples_run_from_top_to_bottom(folder: Path) -> None:
    script = folder / "readme.py"
    examples = [b for b in blocks("python") if "tiatoolbox" not in b]
    assert len(examples) >= 3
    script.write_text("\n".join(examples))
    quiet = ("-W", "error", "-W", "ignore:Port")  # Dask warns when another dashboard has its usual port
    done = subprocess.run([sys.executable, *quiet, script], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


def test_shell_commands_run(folder: Path) -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("dfx ")]
    assert len(lines) >= 3
    for line in lines:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", *shlex.split(line)], capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, (line, done.stderr)
    assert (folder / "slide.png").stat().st_size > 10_000


def test_the_commands_that_continuous_integration_runs_are_marked() -> None:
    text = README.read_text()
    for name in ("demo", "test"):
        assert re.search(rf"<!-- command: {name} -->\n```sh\npip install .*\n```\n", text)
