"""The command line, as a person types it."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import DATA, shared

import dfx
from dfx import cli
from dfx.slides.synthetic import write_slide

QUICK = ["--encoder", "resnet18", "--weights", "random", "--quiet"]
QUICK += ["--resolution", "4", "--units", "mpp", "--patch", "64"]


def dfx_command(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "dfx", *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_the_demo_needs_nothing_and_leaves_a_slide_a_store_and_a_picture(tmp_path: Path) -> None:
    done = dfx_command("demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "random weights" in done.stdout
    folder = tmp_path / "dfx-demo"
    assert sorted(p.name for p in folder.iterdir()) == ["demo.png", "demo.svs", "demo.zarr"]
    store = dfx.open_features(folder / "demo.zarr")
    features = store.features.compute()
    assert features.shape[0] > 100
    assert features.shape[1] == 512
    assert np.isfinite(features).all()
    assert store.attrs["encoder"]["weights"] == "random"
    picture = cv2.imread(str(folder / "demo.png"))
    assert picture is not None
    assert picture.std() > 20


def test_extract_gives_the_stated_store_and_resumes(tmp_path: Path) -> None:
    slide = shared("slides/TCGA-CR-7395-01A-01-TS1.svs")
    line = [
        *("extract", slide, "--slide-mpp", 0.25, "--encoder", "resnet18", "--weights", "random"),
        *("--resolution", 0.5, "--units", "mpp", "--patch", 224, "--mask", "none", "--out", "features"),
    ]
    done = dfx_command(*line, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "features" / "TCGA-CR-7395-01A-01-TS1.zarr"
    assert done.stdout.split() == [str(path)]
    store = dfx.open_features(path)
    features, coordinates = store.features.compute(), store.coordinates.compute()
    assert features.shape == (80, 512)
    assert coordinates.shape == (80, 4)
    assert np.isfinite(features).all()
    assert features.std() > 0
    before = (path / "features/c/0/0").stat().st_mtime_ns
    assert dfx_command(*line, cwd=tmp_path).returncode == 0
    assert (path / "features/c/0/0").stat().st_mtime_ns == before


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


def test_info_says_what_a_slide_is(made_slide: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "info", made_slide)
    assert (code, err) == (0, "")
    facts = dict(line.strip().split(None, 1) for line in out.splitlines()[1:] if "tile size" not in line)
    assert facts["vendor"] == "aperio"
    assert facts["dimensions"] == "1600 x 1300"
    assert facts["levels"] == "1600 x 1300, 400 x 325, 100 x 81"
    assert "tile size    256 x 256" in out
    assert (facts["codec"], facts["mpp"], facts["power"]) == ("JPEG", "0.5", "20")


@pytest.mark.skipif(not (DATA / "slides").exists(), reason="no shared test data")
def test_info_of_every_file_is_facts_or_one_line_of_error(capsys: pytest.CaptureFixture[str]) -> None:
    paths = [p for p in (DATA / "slides").rglob("*") if p.is_file() and p.suffix not in (".md", ".json")]
    assert len(paths) > 50
    for path in paths:
        code, out, err = run(capsys, "info", path)
        if code == 0:
            assert "vendor" in out
            assert err == ""
        else:
            assert out == ""
            assert err.startswith("dfx: error: ")
            assert err.count("\n") == 1
            assert path.name in err


def test_encoders_lists_the_cards(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "encoders")
    assert code == 0
    assert all(card.name in out for card in dfx.list_encoders())


def test_show_draws_the_store(made_slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = ("--encoder", "resnet18", "--weights", "random", "--quiet")
    where = ("--resolution", 1, "--units", "baseline", "--patch", 100, "--stride", 120)
    code, _, err = run(capsys, "extract", made_slide, *encoder, *where, "--mask", "none", "--out", tmp_path)
    assert (code, err) == (0, "")
    code, out, err = run(capsys, "show", tmp_path / "made.zarr", "--out", tmp_path / "a" / "made.png")
    assert (code, err) == (0, "")
    picture = cv2.cvtColor(cv2.imread(out.strip()), cv2.COLOR_BGR2RGB)
    store = dfx.open_features(tmp_path / "made.zarr")
    thumbnail = dfx.open_slide(made_slide).thumbnail(900)
    height, width = thumbnail.shape[:2]
    assert np.array_equal(picture[-height:, :width], thumbnail)  # the right way up, unmirrored
    grid = picture[-height:, width + 16 : 2 * width + 16]
    scale = np.tile([width / 1600, height / 1300], 2)
    x0, y0, x1, y1 = np.rint(store.to_baseline()[5] * scale).astype(int)
    green = np.array([20, 110, 60])
    assert (grid[y0, x0 : x1 + 1] == green).all()
    assert (grid[y0 : y1 + 1, x0] == green).all()
    colours = picture[-height:, 2 * (width + 16) :]
    patch = colours[y0:y1, x0:x1].reshape(-1, 3)
    assert (patch == patch[0]).all()


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["info", "nowhere.svs"], 1, "nowhere.svs does not exist"),
        (["show", "nowhere.zarr", "--out", "a.png"], 2, "nowhere.zarr is no store of dfx"),
        (["extract", "x.svs", "--encoder", "resnet81"], 2, "did you mean resnet18"),
        (["extract", "x.svs", "--encoder", "resnet18", "--weights", "w.pt"], 2, "w.pt are not a file"),
        (["extract", "x.svs", "--encoder", "resnet18", "--weights", "random"], 1, "x.svs does not exist"),
        (["extract", "x.svs", "--encoder", "resnet18", "--weights", "random", "--slide-mpp", "-1"], 2, "mpp must be"),
        (["extract", "x.svs", "--encoder", "resnet18", "--weights", "random", "--mask", "m.png"], 2, "mask m.png"),
        (
            ["extract", "x.svs", "--encoder", "resnet18", "--weights", "random", "--storage-options", "[1]"],
            2,
            "JSON object",
        ),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_a_failure_is_a_line_and_an_exit_code(
    args: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if args[0] == "extract":
        args = [*args, "--resolution", "0.5", "--units", "mpp", "--patch", "224", "--out", "out", "--quiet"]
    got, out, err = run(capsys, *args)
    assert got == code
    assert said in err
    assert "Traceback" not in err
    assert out == ""


def test_a_picture_is_not_drawn_over_another_slide(
    made_slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, moved = write_slide(tmp_path / "other.svs", 1600, 1300, seed=5), tmp_path / "moved.svs"
    shutil.copy(made_slide, moved)
    assert run(capsys, "extract", moved, *QUICK, "--out", tmp_path)[0] == 0
    store, png = tmp_path / "moved.zarr", tmp_path / "x.png"
    code, _, err = run(capsys, "show", store, "--slide", other, "--out", png)
    assert code == 2
    assert "was not made from" in err
    moved.unlink()
    code, _, err = run(capsys, "show", store, "--out", png)
    assert code == 2
    assert "--slide" in err
    assert run(capsys, "show", store, "--slide", made_slide, "--out", png)[0] == 0


def test_one_mask_file_is_not_stretched_over_many_slides(
    made_slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "extract", made_slide, "b.svs", *QUICK, "--mask", "m.png", "--out", tmp_path)
    assert code == 2
    assert "one slide's mask" in err


def test_a_partial_failure_prints_what_was_done(
    made_slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "extract", made_slide, tmp_path / "gone.svs", *QUICK, "--out", tmp_path)
    assert code == 1
    assert out.split() == [str(tmp_path / "made.zarr")]
    assert "1 of 2 slides failed, the others are done" in err
    assert err.count("gone.svs") == 1


def test_only_commands_that_are_there_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    for command in ("extract", "info", "status", "report", "encoders", "show", "export", "demo"):
        assert f"    {command} " in out


def test_warnings_of_dfx_reach_the_user_of_a_command_and_the_log_is_as_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loggers = [logging.getLogger(name) for name in ("dfx", "distributed", "tifffile")]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]

    def statuses(*_: object) -> list[object]:
        logging.getLogger("dfx.store").warning("%s is old", "a store")
        logging.getLogger("tifffile").warning("a tag is odd")
        return []

    monkeypatch.setattr("dfx.store.statuses", statuses)
    assert run(capsys, "status", "folder") == (0, "nothing here\n", "dfx: warning: a store is old\n")
    assert [(logger.level, list(logger.handlers)) for logger in loggers] == before
