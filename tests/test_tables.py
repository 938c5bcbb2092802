"""Slides by table and by pattern: what a cohort's list says of each reaches its store."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from conftest import WSI

import dfx
from dfx import cli
from dfx.errors import CallError, CallTypeError
from dfx.table import Row, rows_of


@pytest.fixture
def cohort(made_slide: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "cohort"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.svs", "a.svs", "deep/c.svs"):
        shutil.copy(made_slide, folder / name)
    np.save(folder / "left.npy", np.eye(1, 2, dtype=bool))
    return folder


def table(folder: Path, text: str, name: str = "slides.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_each_row_says_its_own_of_its_slide(cohort: Path, tmp_path: Path, extractor: dfx.DeepFeatureExtractor) -> None:
    path = table(
        cohort,
        "\ufeffSlide, mpp,power,mask,label\n"  # as Excel writes it
        "b.svs,0.25,,none,tumour\n"
        "\n"
        f"{cohort / 'a.svs'},,40,left.npy,007\n"
        'deep/c.svs,,,,"with, comma"\n',
    )
    result = extractor.run(path, save_dir=tmp_path / "out", **WSI)
    assert isinstance(result, dict)
    assert list(result) == ["b.svs", str(cohort / "a.svs"), "deep/c.svs"]
    b, a, c = (dfx.open_features(store) for store in result.values())
    assert b.attrs["slide"]["mpp"] == [0.25, 0.25]
    assert len(b.coordinates) == 13 * 11  # every patch of 800 x 650 pixels
    assert a.attrs["slide"]["power"] == 40
    assert a.coordinates.compute()[:, 0].max() < 800
    assert c.attrs["slide"]["mpp"] == [0.5, 0.5]
    assert 0 < len(c.coordinates) < 25 * 21  # tissue
    assert [found.attrs["label"] for found in (b, a, c)] == ["tumour", "007", "with, comma"]


def test_a_row_may_name_what_finds_its_tissue(
    cohort: Path, tmp_path: Path, extractor: dfx.DeepFeatureExtractor
) -> None:
    path = table(cohort, "slide,mask\na.svs,hsv\nb.svs,tissue\ndeep/c.svs,\n")
    result = extractor.run(path, tissue="hsv", save_dir=tmp_path / "out", **WSI)
    assert isinstance(result, dict)
    masks = [dfx.open_features(store).mask for store in result.values()]
    assert [mask and mask.method for mask in masks] == ["hsv", "otsu", "hsv"]


def test_what_the_call_says_of_all_slides_yields_to_a_row(cohort: Path, extractor: dfx.DeepFeatureExtractor) -> None:
    path = table(cohort, "slide,mpp\na.svs,0.25\nb.svs,\n")
    options = WSI | {"output_type": "dict", "wsireader_kwargs": {"mpp": 1.0}, "auto_get_mask": False}
    result = extractor.run(str(path), **options)
    assert isinstance(result, dict)
    assert [len(result[name]["coordinates"]) for name in ("a.svs", "b.svs")] == [13 * 11, 50 * 41]


def test_a_list_of_lines_is_a_table_too(cohort: Path) -> None:
    path = table(cohort, "# the first ones\n\n b.svs \ndeep/c.svs\n/abs/d.svs\ns3://bucket/e.svs\n", "slides.TXT")
    assert [(row.given, row.slide) for row in rows_of(path)] == [
        ("b.svs", str(cohort / "b.svs")),
        ("deep/c.svs", str(cohort / "deep/c.svs")),
        ("/abs/d.svs", "/abs/d.svs"),
        ("s3://bucket/e.svs", "s3://bucket/e.svs"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide,mpp\na.svs,0.5\nb.svs,half\n", r"slides\.csv, line 3: mpp 'half' is not a number"),
        ("slide,mpp\na.svs,-1\n", r"line 2: mpp must be a positive number"),
        ("slide,power\na.svs,nan\n", r"line 2: power must be a positive number"),
        ("slide,mpp\na.svs,0,5\n", r"line 2: 3 cells for 2 columns"),
        ("slide,mpp\n,0.5\n", r"line 2: no slide"),
        ("mpp,label\n0.5,1\n", r"line 1: columns mpp, label"),
        ("slide,mp\na.svs,0.5\n", r"line 1: unknown columns 'mp'.*slide, mpp, power, mask, label"),
        ("slide;mpp\na.svs;0.5\n", r"line 1: unknown columns 'slide;mpp'.*separated by commas"),
        ("slide,slide\na.svs,b.svs\n", r"line 1: columns slide, slide"),
        ('slide\n"a.svs\n', r"line 2: no CSV"),
        ("slide\n", "names no slide"),
        ("", "line 1"),
        ("slide,mask\na.svs,nowhere.png\n", r"nowhere\.png is not a file"),
        ("slide,label\na.svs,1\na.svs,2\n", "given twice with different masks or labels"),
    ],
)
def test_a_bad_row_is_refused_before_work_starts(
    cohort: Path, tmp_path: Path, extractor: dfx.DeepFeatureExtractor, text: str, message: str
) -> None:
    with pytest.raises(CallError, match=message):
        extractor.run(table(cohort, text), save_dir=tmp_path / "out", **WSI)
    assert not (tmp_path / "out").exists()


def test_a_table_that_cannot_be_read_is_refused(tmp_path: Path, extractor: dfx.DeepFeatureExtractor) -> None:
    with pytest.raises(CallError, match=r"nowhere\.csv can't be read"):
        rows_of("nowhere.csv")
    (tmp_path / "latin.csv").write_bytes("slide\nM\xe4rz.svs\n".encode("latin-1"))
    with pytest.raises(CallError, match="is not UTF-8"):
        rows_of(tmp_path / "latin.csv")
    labelled = table(tmp_path, "slide,label\na.svs,1\n")
    with pytest.raises(CallError, match="has a column label, and labels are given too"):
        extractor.run(labelled, labels=[1], save_dir=tmp_path / "out", **WSI)
    with pytest.raises(CallError, match="2 masks for 1 images"):
        extractor.run(labelled, masks=[None, None], save_dir=tmp_path / "out", **WSI)


def test_patterns_give_what_they_match_sorted(cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cohort)
    assert [row.given for row in rows_of("*.svs")] == ["a.svs", "b.svs"]
    assert [row.given for row in rows_of(["deep/c.svs", "[ab].svs"])] == ["deep/c.svs", "a.svs", "b.svs"]
    assert [row.given for row in rows_of(cohort / "**" / "*.svs")] == [
        str(cohort / name) for name in ("a.svs", "b.svs", "deep/c.svs")
    ]
    with pytest.raises(CallError, match=r"\*\.ndpi matches no file"):
        rows_of(["*.ndpi"])


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(cohort: Path, tmp_path: Path) -> None:
    odd = cohort / "a[b]*.svs"
    shutil.copy(cohort / "a.svs", odd)
    assert rows_of([odd, str(odd)]) == [Row(odd, odd), Row(str(odd), str(odd))]
    assert rows_of(table(cohort, f"slide\n{odd.name}\n"))[0].slide == str(odd)


def test_one_slide_is_still_given_in_a_list(cohort: Path, extractor: dfx.DeepFeatureExtractor) -> None:
    with pytest.raises(CallTypeError, match="for one slide give a list of it"):
        extractor.run(str(cohort / "a.svs"), save_dir=cohort / "out", **WSI)


def test_the_command_line_takes_tables_and_patterns(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(cohort, "slide,label\na.svs,x\n")
    quick = ["--encoder", "resnet18", "--weights", "random", "--quiet", "--out", str(tmp_path / "out")]
    quick += ["--resolution", "4", "--units", "mpp", "--patch", "64"]
    assert cli.main(["extract", "--table", str(path), *quick]) == cli.DONE
    assert dfx.open_features(capsys.readouterr().out.strip()).attrs["label"] == "x"
    assert cli.main(["extract", str(cohort / "*.svs"), *quick]) == cli.DONE
    assert [Path(line).name for line in capsys.readouterr().out.split()] == ["a.zarr", "b.zarr"]
    for line, message in (
        ([], "give slides, or --table"),
        (["a.svs", "--table", str(path)], "give slides, or --table"),
        ([str(cohort / "*.svs"), "--mask", "m.png"], "one slide's mask, but the slides are 2"),
        (["--table", str(path), "--mask", "m.png"], "one slide's mask, but the slides are those of a table"),
        (["--table", str(cohort / "a.svs")], "is no table: its name must end with .csv or .txt"),
    ):
        assert cli.main(["extract", *line, *quick]) == cli.BAD_CALL
        assert message in capsys.readouterr().err


def test_remote_tables_and_patterns_go_through_fsspec(made_slide: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for name in ("/cohort/b.svs", "/cohort/a.svs", "/cohort/x[1].svs"):
        memory.pipe_file(name, b"")
    memory.pipe_file("/cohort/slides.csv", b"slide,mpp\na.svs,0.5\nmemory://other/z.svs,\n/mnt/y.svs,\n")
    try:
        assert [row.slide for row in rows_of("memory://cohort/[ab].svs")] == [
            "memory:///cohort/a.svs",
            "memory:///cohort/b.svs",
        ]
        assert [row.slide for row in rows_of(["memory://cohort/x[1].svs"])] == ["memory://cohort/x[1].svs"]
        rows = rows_of("memory://cohort/slides.csv")
        assert [row.slide for row in rows] == ["memory://cohort/a.svs", "memory://other/z.svs", "/mnt/y.svs"]
        assert rows[0].mpp == 0.5
        with pytest.raises(CallError, match="matches no file"):
            rows_of(["memory://cohort/*.ndpi"])
    finally:
        memory.store.clear()


@pytest.fixture
def served(cohort: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(cohort)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_signed_url_is_no_pattern(served: str, cohort: Path) -> None:
    table(cohort, "slide\na.svs\n")
    signed = f"{served}/slides.csv?signature=[a]*"
    assert [row.slide for row in rows_of([f"{served}/a.svs?sig=*"])] == [f"{served}/a.svs?sig=*"]
    assert [row.slide for row in rows_of(signed)] == [f"{served}/a.svs"]
