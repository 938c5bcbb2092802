"""The benchmarks run, and what they report is of the work that they say. (No time is judged here.)"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main


def run(tmp_path: Path, *command: str) -> list[dict[str, Any]]:
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *command, "--size", "2048", "--rounds", "1", "--out", str(out)],
        cwd=Path(__file__).parents[1],
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(out.read_text())
    assert said["cores"] >= 1
    rows: list[dict[str, Any]] = said["rows"]
    cells = [*rows[0], *(str(v) for row in rows for v in row.values())]
    assert done.stdout.split() == " ".join(cells).split()
    return rows


def test_each_benchmark_says_what_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    said = capsys.readouterr().out
    assert all(name in said for name in ["reading", "overlap", "inference", "memory", "scale", "65 %"])


@pytest.mark.slow
def test_reading_reports_tiles_patches_and_the_other_tool(tmp_path: Path) -> None:
    rows = run(tmp_path, "reading", "--peer", "openslide")
    assert [row["tiles"] for row in rows] == [64, 64, 64]
    assert [row["patches"] for row in rows] == [100, 25, 361]
    assert rows[0]["times_openslide"] > 0


@pytest.mark.slow
def test_fast_reading_is_compared_at_each_shrinking(tmp_path: Path) -> None:
    rows = run(tmp_path, "fast", "--weights", "random")
    assert [(row["slide"], row["shrunk"]) for row in rows] == [(c, n) for c in ("4:2:0", "4:4:4") for n in (2, 4, 8)]
    assert all(row["cosine_least"] > 0.9 for row in rows)
    assert rows[0]["grey_levels_mean"] > rows[3]["grey_levels_mean"]


@pytest.mark.slow
def test_scale_counts_as_many_blocks_of_dask_as_of_dfx(tmp_path: Path) -> None:
    rows = run(tmp_path, "scale")
    assert [row["slides"] for row in rows] == [1, 4, 40]
    assert all(row["dfx_ms_a_block"] > 0 for row in rows)


@pytest.mark.slow
def test_a_long_run_holds_no_more_tasks_at_its_end_than_at_its_beginning(tmp_path: Path) -> None:
    rows = run(tmp_path, "long", "--slides", "40", "--executed", "2")
    assert [row["slides"] for row in rows] == list(range(4, 41, 4))
    assert rows[-1]["scheduler_tasks"] <= rows[0]["scheduler_tasks"]


@pytest.mark.slow
def test_slides_on_servers_are_read_by_few_requests_and_hardly_more_bytes_than_needed(tmp_path: Path) -> None:
    rows = run(tmp_path, "remote")
    assert [row["from"] for row in rows] == ["disk", "HTTP", "HTTP, 30 ms", "S3"]
    for row in rows[1:]:
        assert row["open_requests"] <= 10
        assert 0.99 <= row["times_needed_bytes"] <= 1.15


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["overlap"],
        ["inference", "--patches", "64"],
        ["devices", "--counts", "2", "--seconds", "2"],
        ["memory", "--sizes", "1024", "2048"],
    ],
    ids=lambda command: command[0],
)
def test_a_benchmark_prints_a_table_and_writes_it(command: list[str], tmp_path: Path) -> None:
    assert run(tmp_path, *command)
