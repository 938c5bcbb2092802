"""`dfx report`: one page that says what there is, whatever slides are called, and needs nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import distributed
import pytest
import zarr
from conftest import WSI

import dfx
from dfx import cli, store
from dfx.slides.synthetic import write_slide
from dfx.store import disk, layout

EVIL = '<img src=x onerror=alert(1)> & "q" \'s'
CHROMIUM = shutil.which("chromium")


class Page(HTMLParser):
    """What a browser would make of it: cells of the body's rows, and everything that it would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.heads: list[str] = []
        self.loaded: list[str] = []
        self.scripts = 0
        self.handlers: list[str] = []
        self.policy = ""
        self._stack: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loaded += [str(given[name]) for name in ("src", "href", "data", "action") if name in given]
        self.handlers += [name for name in given if name.startswith("on")]
        self.scripts += tag == "script"
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(given["content"])
        if tag == "tr" and "tbody" in self._stack:
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")
        elif tag == "th":
            self.heads.append("")
        if tag not in ("meta", "img", "br"):
            self._stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._stack.pop() == tag  # well formed

    def handle_data(self, data: str) -> None:
        if "td" in self._stack:
            self.rows[-1][-1] += data
        elif "th" in self._stack:
            self.heads[-1] += data


def reopened(at: Path) -> Path:
    """A closed store as it is before it is closed."""
    layout.update(at, status="running")
    return at


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, client: distributed.Client) -> Path:
    """Stores of a slide with a name that attacks, one whose slide is gone, one that failed, and one that is begun."""
    from nets import Means

    at = tmp_path_factory.mktemp("report")
    slides = [
        write_slide(at / f"{name}.svs", 700, 600, seed=n) for n, name in enumerate([EVIL, "gone", "bad", "begun"])
    ]
    extractor = dfx.DeepFeatureExtractor(Means(), verbose=False)
    out = at / "out"
    extractor.run(slides, save_dir=out, client=client, tissue="hsv", block_size=16, **WSI)
    slides[1].unlink()
    store.fail(reopened(out / "bad.zarr"), "tile 3 of </td><script>alert(2)</script> is damaged")
    shutil.rmtree(out / "bad.zarr/features/c/1")
    for name in ("bad", "begun"):
        assert (out / f"{name}.zarr/features/c/0").exists()
    group = zarr.open_group(str(out / "begun.zarr"), mode="r+")
    said = dict(group.attrs["dfx"])  # type: ignore[arg-type]
    group.attrs["dfx"] = said | {"status": "running", "damaged_tiles": ["tile 1", "tile 2"], "batches": {"0-0": 8}}
    (out / "notes.txt").write_text("mine")
    return out


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    out = folder.parent / "report.html"
    assert cli.main(["report", str(folder), "--out", str(out)]) == 0
    return Page(out.read_text(encoding="utf-8"))


def test_each_slide_has_a_row(page: Page, folder: Path) -> None:
    assert page.heads == ["picture", "slide", "status", "patches", "read, s", "encode, s", "encoder", "to know"]
    rows = {row[1].split("/", 1)[0]: row for row in page.rows}
    assert set(rows) == {EVIL, "gone", "bad", "begun"}  # a file that is not dfx's has none
    patches = dfx.open_features(folder / f"{EVIL}.zarr").features.shape[0]
    assert rows[EVIL][2:4] == ["complete", str(patches)]
    assert float(rows[EVIL][4]) >= 0
    assert rows[EVIL][6] == "Means"
    assert "does not exist any more" in rows["gone"][0]
    assert rows["bad"][2].startswith("failed, ")
    assert rows["bad"][7] == "tile 3 of </td><script>alert(2)</script> is damaged"
    assert rows["begun"][2].startswith("partial")
    assert "2 damaged tiles left white: tile 1; tile 2" in rows["begun"][7]
    assert "smallest of 8 patches" in rows["begun"][7]


def test_nothing_is_loaded_and_no_name_becomes_markup(page: Page) -> None:
    assert page.scripts == 1
    assert page.handlers == []
    assert len(page.loaded) == 3
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.loaded)
    assert page.policy.startswith("default-src 'none'")
    assert "script-src 'sha256-" in page.policy


def test_a_report_without_pictures_opens_no_slide(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a" / "plain.html"
    assert cli.main(["report", str(folder), "--out", str(out), "--no-pictures"]) == 0
    assert Page(out.read_text(encoding="utf-8")).loaded == []


@pytest.mark.parametrize(
    ("args", "said"),
    [(["nowhere"], "no folder"), (["."], "no store of dfx"), ([".", "--out", "a.png"], "does not end with .html")],
    ids=str,
)
def test_what_is_no_run_is_a_line_of_error(
    args: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", *args]) == 2
    assert said in capsys.readouterr().err


def test_seconds_by_stage_stay_with_the_store_and_add_up(
    made_slide: Path, extractor: dfx.DeepFeatureExtractor, client: distributed.Client, tmp_path: Path
) -> None:
    run = {"save_dir": tmp_path, "client": client, "block_size": 64, "auto_get_mask": False}
    path = extractor.run([made_slide], **run, **WSI)[made_slide]  # type: ignore[arg-type, index, call-overload]
    first = dfx.open_features(path).attrs["seconds"]
    assert set(first) == {"read", "encode"}
    assert all(seconds > 0 for seconds in first.values())
    assert not (path / "notes").exists()
    shutil.rmtree(path / "features/c/2")
    extractor.run([made_slide], **run, **WSI)  # type: ignore[arg-type]
    second = dfx.open_features(path).attrs["seconds"]
    assert all(second[stage] > first[stage] for stage in first)
    assert all(second[stage] < 3 * first[stage] + 1 for stage in first)


def test_what_blocks_of_several_runs_noted_is_brought_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = store.place_of(tmp_path)
    store.write_note(place, "0-0", {"damaged_tiles": ["b"], "seconds": {"read": 1.5, "encode": 2.0}})
    (cut,) = (tmp_path / "notes").iterdir()
    with cut.open("ab") as file:
        file.write(b'\n{"block": "3-0", "damaged_t')  # a disk was full; there was room again for the next
    store.write_note(place, "1-0", {"damaged_tiles": [], "seconds": {"read": 0.5}, "batch_size": 8})
    monkeypatch.setattr(disk, "WRITER", "0" * 32)
    store.write_note(place, "2-0", {"damaged_tiles": ["c"], "seconds": {}})
    assert len(list((tmp_path / "notes").iterdir())) == 2  # one a process, whatever its blocks
    with cut.open("ab") as file:
        file.write(b'\n{"block": "4-0", "damaged_tiles": ["x"]')  # its process was killed
    before = {"damaged_tiles": ["a"], "seconds": {"read": 10.0}, "status": "running"}
    assert store.read_notes(place, before) == {
        "damaged_tiles": ["a", "b", "c"],
        "seconds": {"read": 12.0, "encode": 2.0},
        "batches": {"1-0": 8},
    }


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
def test_a_browser_shows_and_sorts_it(folder: Path, page: Page, tmp_path: Path) -> None:
    """The page's own script runs under its policy, and what a name tries does not."""
    assert CHROMIUM is not None
    text = (folder.parent / "report.html").read_text(encoding="utf-8")
    click = 'document.querySelectorAll("thead button")[2].click(); document.title += " " + document.images.length;'
    probe = re.sub(r"\bscript-src '[^']+'", "script-src 'unsafe-inline'", text)
    driven = tmp_path / "driven.html"
    driven.write_text(probe.replace("</body>", f"<script>{click}</script></body>"), encoding="utf-8")

    def dump(path: Path, *more: str) -> str:
        line = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
        line += [
            "--disable-background-networking",
            "--disable-component-update",
            f"--user-data-dir={tmp_path / 'user'}",
        ]
        line += ["--enable-logging=stderr", *more, path.as_uri()]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)  # type: ignore[arg-type]
        assert "Content Security Policy" not in done.stderr  # by which something would have been refused
        return done.stdout

    shown = Page(dump(folder.parent / "report.html", "--dump-dom"))
    assert [row[1] for row in shown.rows] == [row[1] for row in page.rows]
    by_patches = [int(row[3]) for row in Page(dump(driven, "--dump-dom")).rows]
    assert by_patches == sorted(by_patches)
    assert by_patches != [int(row[3]) for row in page.rows]
    picture = tmp_path / "page.png"
    dump(folder.parent / "report.html", f"--screenshot={picture}", "--window-size=1400,900")
    assert picture.stat().st_size > 10_000
