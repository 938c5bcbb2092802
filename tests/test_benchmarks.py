"""The benchmarks run, and what they report is of the work that they say. (No time is judged here.)"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("command", [["reading"], ["overlap", "--rates", "4000"]], ids=lambda c: c[0])
def test_a_benchmark_prints_a_table_and_writes_it(command: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    line = ["-m", "benchmarks", *command, "--size", "2048", "--rounds", "1", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, *line],
        cwd=Path(__file__).parents[1],
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(out.read_text())
    assert said["cores"] >= 1
    cells = [*said["rows"][0], *(str(v) for row in said["rows"] for v in row.values())]
    assert done.stdout.split() == " ".join(cells).split()
    if command == ["reading"]:
        assert [row["tiles"] for row in said["rows"]] == [64, 64, 64]
        assert [row["patches"] for row in said["rows"]] == [100, 25, 361]
