"""Pictures: the right way up, aligned, legible; and what notebooks show."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import pytest
import zarr
from conftest import WSI
from numpy.typing import NDArray
from PIL import Image

import dfx
from dfx import cli, html
from dfx.pictures import KELLY, clusters, principal_colours, similarity, values_of
from dfx.pictures.canvas import caption, legible, lines_of, panels
from dfx.run import RunResult
from dfx.slides.synthetic import write_picture

RNG = np.random.default_rng(5)
SIDE = 512


@pytest.fixture(scope="module")
def quarters(tmp_path_factory: pytest.TempPathFactory, client: distributed.Client) -> tuple[dfx.Slide, dfx.Features]:
    """A slide of which each quarter has a colour of its own, so that what is turned or mirrored shows."""
    from nets import Means

    picture = np.empty((SIDE, SIDE, 3), np.uint8)
    half = SIDE // 2
    picture[:half, :half], picture[:half, half:] = (200, 40, 40), (40, 160, 40)
    picture[half:, :half], picture[half:, half:] = (40, 40, 200), (190, 190, 60)
    folder = tmp_path_factory.mktemp("quarters")
    path = write_picture(folder / "Größe & <b>.svs", picture, mpp=0.5)
    mask = np.zeros((8, 8), bool)
    mask[1:7, 1:7] = True
    extractor = dfx.DeepFeatureExtractor(Means(), verbose=False)
    result = extractor.run([path], masks=[mask], save_dir=folder, client=client, **WSI)
    return dfx.open_slide(path), dfx.open_features(result[path])  # type: ignore[index, call-overload]


def panel(picture: Image.Image, n: int, size: int = SIDE) -> NDArray[np.uint8]:
    """The n-th panel of a picture, without its title."""
    return np.asarray(picture)[-size:, n * (size + 16) : n * (size + 16) + size]


def colour_at(picture: NDArray[np.uint8], box: NDArray[Any]) -> tuple[int, ...]:
    x0, y0, x1, y1 = np.rint(box).astype(int)
    inside = picture[y0 + 4 : y1 - 4, x0 + 4 : x1 - 4].reshape(-1, 3)
    assert (inside == inside[0]).all()
    return tuple(inside[0].tolist())


def test_the_overview_shows_slide_outline_grid_and_components(quarters: tuple[dfx.Slide, dfx.Features]) -> None:
    slide, store = quarters
    picture = store.plot()
    assert picture.size[0] == 3 * SIDE + 2 * 16
    outlined, grid, colours = (panel(picture, n) for n in range(3))
    thumbnail = slide.thumbnail(900)
    assert np.array_equal(outlined[:60], thumbnail[:60])  # the mask begins at 64
    assert np.array_equal(outlined[100:400, 100:400], thumbnail[100:400, 100:400])
    assert (outlined[64, 64:448] == (0, 110, 220)).all()
    assert (outlined[447, 64:448] == (0, 110, 220)).all()
    boxes = store.to_baseline()
    assert len(boxes) == 36
    for x0, y0, x1, y1 in np.rint(boxes).astype(int):
        assert (grid[y0, x0 : x1 + 1] == (20, 110, 60)).all()
        assert (grid[y0 : y1 + 1, x1] == (20, 110, 60)).all()
    expected = principal_colours(store.features.compute())
    assert [colour_at(colours, box) for box in boxes] == [tuple(c) for c in expected.tolist()]


def test_clusters_are_drawn_where_their_patches_lie(quarters: tuple[dfx.Slide, dfx.Features]) -> None:
    _, store = quarters
    colours = panel(store.plot("cluster:4"), 1)
    seen: dict[tuple[bool, bool], set[tuple[int, ...]]] = {}
    for box in store.to_baseline():
        quarter = bool(box[0] >= SIDE // 2), bool(box[1] >= SIDE // 2)
        seen.setdefault(quarter, set()).add(colour_at(colours, box))
    assert all(len(found) == 1 for found in seen.values())
    assert set.union(*seen.values()) == set(KELLY[:4])


def test_similarity_is_the_cosine_and_marks_its_patch(quarters: tuple[dfx.Slide, dfx.Features]) -> None:
    _, store = quarters
    features = store.features.compute().astype(np.float64)
    expected = features @ features[7] / np.linalg.norm(features, axis=1) / np.linalg.norm(features[7])
    assert np.allclose(similarity(store.features.compute(), 7), expected, atol=1e-6)
    colours = panel(store.plot("similarity:7"), 1)
    x0, y0, x1, _ = np.rint(store.to_baseline()[7]).astype(int)
    assert (colours[y0 - 1, x0:x1] == (220, 20, 20)).all()
    alike = [n for n in range(36) if n != 7 and np.isclose(expected[n], 1)]
    assert colour_at(colours, store.to_baseline()[alike[0]]) == (253, 231, 37)  # the top of viridis


def test_values_of_a_file_are_drawn_with_their_scale(quarters: tuple[dfx.Slide, dfx.Features], tmp_path: Path) -> None:
    _, store = quarters
    values = np.linspace(0, 10, 36)
    values[3] = np.nan
    np.save(tmp_path / "attention.npy", values)
    picture = store.plot(tmp_path / "attention.npy")
    colours, boxes = panel(picture, 1), store.to_baseline()
    assert colour_at(colours, boxes[0]) == (68, 1, 84)
    assert colour_at(colours, boxes[35]) == (253, 231, 37)
    pale = (panel(picture, 0).astype(int)[200, 200] + 510) // 3
    x0, y0 = np.rint(boxes[3][:2]).astype(int)
    assert max(colours[y0 + 20, x0 + 20]) > 220  # nothing drawn over the paler slide
    assert pale.max() > 170
    assert picture.size[0] > 2 * (SIDE + 16) + 100  # the scale beside it


def test_a_contact_sheet_has_the_patches_nearest_to_the_centres(quarters: tuple[dfx.Slide, dfx.Features]) -> None:
    _, store = quarters
    sheet = np.asarray(store.contact_sheet(4, columns=3))
    rows = sheet[-(4 * 112 + 3 * 8) :]
    means = store.features.compute()[:, :3]
    labels, _ = clusters(store.features.compute(), 4)
    for n in range(4):
        row = rows[n * 120 : n * 120 + 112]
        assert (row[:, :20] == KELLY[n]).all()
        last = row[20:90, -90:-20].reshape(-1, 3).mean(axis=0)
        assert np.abs(last - means[labels == n].mean(axis=0) * 255).max() < 3


def test_k_means_finds_groups_and_is_repeatable() -> None:
    centres = np.eye(5, 32)
    truth = np.repeat(np.arange(5), [50, 40, 30, 20, 10])
    rows = (centres[truth] * RNG.uniform(1, 9, (150, 1)) + RNG.normal(0, 0.02, (150, 32))).astype(np.float32)
    order = RNG.permutation(150)
    labels, distances = clusters(rows[order], 5)
    assert np.array_equal(labels, truth[order])  # the largest is 0
    assert distances.shape == (150,)
    again = clusters(rows[order], 5)
    assert np.array_equal(labels, again[0])
    assert clusters(np.ones((9, 4), np.float16), 3)[0].max() <= 2  # all are alike
    with pytest.raises(dfx.CallError, match="2 to 9 clusters"):
        clusters(rows[:9], 10)


def test_principal_colours_do_not_depend_on_how_rows_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = RNG.normal(size=(100, 12)) * np.arange(1, 13)
    whole = principal_colours(rows)
    monkeypatch.setattr("dfx.pictures.values.CHUNK", 7)
    assert np.abs(principal_colours(rows).astype(int) - whole).max() <= 1
    centred = rows - rows.mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:3]
    scores = centred @ axes.T
    correlation = [abs(np.corrcoef(whole[:, n], scores[:, n])[0, 1]) for n in range(3)]
    assert min(correlation) > 0.98


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("similarity:36", "rows go from 0 to 35"),
        ("similarity:", "no number"),
        ("cluster:x", "no number"),
        ("cluster:21", "2 to 20"),
        ("nowhere.npy", "can't be drawn"),
        (np.zeros(7), "36 numbers"),
        (np.array(["a"] * 36), "36 numbers"),
        ([1, 2], "not list"),
    ],
    ids=str,
)
def test_values_that_can_not_be_drawn_are_refused(asked: Any, said: str) -> None:
    with pytest.raises(dfx.CallError if said != "not list" else dfx.CallTypeError, match=said):
        values_of(asked, np.ones((36, 4), np.float32))


def test_many_integers_are_a_measure_and_few_are_labels() -> None:
    features = np.ones((50, 2), np.float32)
    assert values_of(np.arange(50), features).values.dtype == np.float64
    assert values_of(np.arange(50) % 3 - 1, features).values.dtype.kind == "i"


def test_text_is_never_cut_or_lost() -> None:
    for text in ("a-very-long-slide-name-without-any-space-" * 8, "many words " * 40, "", "Größe µ ≤", "スライド\x00"):
        shown, font = legible(text, 18)
        lines = lines_of(shown, font, 312)
        assert all(font.getlength(line) <= 312 for line in lines)
        assert "?" not in shown
        picture = caption(text, 320)
        assert picture.shape[1] == 320
        assert (picture[:, -1] == 255).all()  # nothing runs over the edge
        assert (picture[-1] == 255).all()
        assert bool((picture < 128).any()) == bool(text.strip())
    assert legible("\x00", 18)[0] == "\\x00"
    assert legible("日", 18)[0] in ("日", "\\u65e5")


def test_narrow_pictures_have_room_for_their_titles() -> None:
    made = panels([np.zeros((600, 30, 3), np.uint8)] * 3, ["a", "some more words than fit on one line of it " * 2, "c"])
    assert made.shape[1] == 3 * 320 + 2 * 16
    assert (made[-600:, :30] == 0).all()


def test_loose_patches_and_other_slides_are_refused(
    quarters: tuple[dfx.Slide, dfx.Features], made_slide: Path, extractor: dfx.DeepFeatureExtractor, tmp_path: Path
) -> None:
    _, store = quarters
    with pytest.raises(dfx.CallError, match="was not made from"):
        store.plot(slide=dfx.open_slide(made_slide))
    path = extractor.run(np.zeros((3, 8, 8, 3), np.uint8), save_dir=tmp_path, output_type="zarr")
    loose = dfx.open_features(path)  # type: ignore[arg-type]
    with pytest.raises(dfx.StoreError, match="no slide to show"):
        loose.plot()
    assert "loose patches" in loose._repr_html_()


def test_the_command_draws_values_and_contact_sheets(
    quarters: tuple[dfx.Slide, dfx.Features], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, store = quarters
    for n, what in enumerate([["--values", "cluster:3"], ["--contact-sheet", 3, "--columns", 4], ["--size", 256]]):
        out = tmp_path / f"{n}.png"
        assert cli.main(["show", str(store.path), "--out", str(out), *map(str, what)]) == 0
        assert capsys.readouterr().out.strip() == str(out)
        with Image.open(out) as image:
            assert image.size[0] > 256
    assert cli.main(["show", str(store.path), "--out", str(tmp_path / "a.png"), "--values", "cluster:99"]) == 2
    assert "2 to 20" in capsys.readouterr().err


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_notebooks_show_slides_grids_features_and_results(quarters: tuple[dfx.Slide, dfx.Features]) -> None:
    slide, store = quarters
    result = RunResult()
    result["<i>a.svs"] = store.path
    result.failures["b.svs"] = dfx.SlideError("<script>alert(1)</script>")
    grid = dfx.PatchGrid.over(slide, shape=64, mask="otsu")
    for shown, said in (
        (slide, "512 x 512"),
        (grid, "64 x 64"),
        (store, "36 x 6 float32"),
        (result, "1 done, 1 failed"),
    ):
        found = Tags(shown._repr_html_())  # type: ignore[attr-defined]
        assert said in found.text
        assert not {"script", "i"} & set(found.tags)
        assert found.tags.count("b") == 1  # the title's own
        assert found.tags.count("img") == (shown is slide)
    assert "<script>alert(1)</script>" in Tags(result._repr_html_()).text


def test_a_picture_in_a_page_is_the_picture() -> None:
    import base64
    import io

    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:, :30] = (250, 20, 20)
    source = html.image(picture, "a").split("base64,")[1].split('"')[0]
    back = np.asarray(Image.open(io.BytesIO(base64.b64decode(source))))
    assert np.abs(back.astype(int) - picture)[:, [5, 50]].max() < 12


@pytest.fixture(scope="module")
def store_of(
    quarters: tuple[dfx.Slide, dfx.Features], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[NDArray[Any]], dfx.Features]:
    """Makes a store of the first patches of the quarters with other features."""
    _, store = quarters
    folder = tmp_path_factory.mktemp("stores")

    def made(features: NDArray[Any]) -> dfx.Features:
        path = folder / f"{len(list(folder.iterdir()))}.zarr"
        shutil.copytree(store.path, path)
        said = json.loads((path / "zarr.json").read_text())
        group = zarr.open_group(path, mode="r+", use_consolidated=False)
        coordinates = group["coordinates"]
        boxes, attributes = np.asarray(coordinates[: len(features)]), dict(coordinates.attrs)  # type: ignore[index]
        group.create_array("coordinates", data=boxes, attributes=attributes, overwrite=True)
        group.create_array("features", data=features, overwrite=True)
        (path / "zarr.json").write_text(json.dumps(said | {"consolidated_metadata": None}))
        return dfx.open_features(path)

    return made


OTHER = np.random.default_rng(6)
ROWS = OTHER.normal(size=(36, 5))
WITH_NAN = np.where(np.arange(36)[:, None] % 9 == 4, np.nan, ROWS)
INFINITE = ROWS.astype(np.float16)
INFINITE[3:6, 2] = np.inf, -np.inf, np.nan
KINDS = {
    "nan": WITH_NAN.astype(np.float32),
    "infinite": INFINITE,
    "constant": np.full((36, 5), 0.1, np.float32),
    "zeros": np.zeros((36, 5), np.float16),
    "wide": ROWS[:, :1].astype(np.float16),
    "huge": ROWS * 1e307,
    "tiny": ROWS * 1e-310,
    "two patches": ROWS[:2],
    "more columns than patches": OTHER.normal(size=(4, 50)).astype(np.float16),
}


@pytest.mark.parametrize("features", KINDS.values(), ids=KINDS)
def test_features_of_every_kind_are_drawn_and_what_is_not_finite_is_left_out_and_said(
    features: NDArray[Any], store_of: Callable[[NDArray[Any]], dfx.Features], monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []
    written = lambda text, *how, **more: titles.append(text) or caption(text, *how, **more)  # noqa: E731
    for module in ("dfx.pictures", "dfx.pictures.canvas"):
        monkeypatch.setattr(f"{module}.caption", written)
    store, finite = store_of(features), np.isfinite(features).all(axis=1)
    boxes, plain = store.to_baseline(), panel(store.plot(), 0)
    pale = ((plain.astype(np.uint16) + 510) // 3).astype(np.uint8)
    values = OTHER.normal(size=len(features))
    values[~finite] = np.inf
    for draw in (
        store.plot,
        lambda: store.plot("cluster:2"),
        lambda: store.plot("similarity:0"),
        lambda: store.plot(values),
        lambda: store.contact_sheet(2),
    ):
        titles.clear()
        picture = draw()
        missing = f"{(~finite).sum()} of {len(features)} patches left out"
        assert any(missing in title for title in titles) == bool((~finite).any())
        if picture.size[1] > SIDE and picture.size[0] > 2 * SIDE:
            colours = panel(picture, 2 if draw == store.plot else 1)
            drawn = [colour_at(colours, box) != colour_at(pale, box) for box in boxes[5:]]
            assert drawn == finite[5:].tolist()  # a frame is around the patch that others are compared with


def test_the_same_finite_rows_have_the_same_colours_whatever_is_beside_them() -> None:
    finite = np.isfinite(WITH_NAN).all(axis=1)
    assert np.array_equal(principal_colours(WITH_NAN)[finite], principal_colours(ROWS[finite]))
    assert np.array_equal(principal_colours(ROWS * 2.0**900), principal_colours(ROWS))
    assert np.array_equal(clusters(WITH_NAN, 3)[0][finite], clusters(ROWS[finite], 3)[0])
    assert (clusters(WITH_NAN, 3)[0][~finite] == -1).all()
    assert np.array_equal(similarity(WITH_NAN, 0)[finite], similarity(ROWS[finite], 0))
    assert not principal_colours(np.full((9, 3), 0.1)).any()  # no picture of rounding


@pytest.mark.parametrize(
    ("features", "asked", "said"),
    [
        (np.full((4, 3), np.nan), None, "all 4 patches have features that are NaN or infinite"),
        (np.full((4, 3), np.inf), "cluster:2", "all 4 patches have features that are NaN or infinite"),
        (WITH_NAN, "similarity:4", "patch 4 has features that are NaN or infinite: choose another patch, such as 0"),
        (WITH_NAN[3:6], "cluster:3", "2 to 2 clusters"),
        (ROWS[:1], "cluster:2", "at least 2 patches with finite features, not 1"),
        (ROWS[:0], "cluster:2", "at least 2 patches with finite features, not 0"),
        (ROWS[:0], "similarity:0", "there is no patch 0: the slide has no patches"),
        (ROWS, np.full(36, np.nan), "all 36 values are NaN or infinite"),
    ],
    ids=["nan", "infinite", "chosen", "too few", "one", "none", "no row", "values"],
)
def test_what_can_not_be_drawn_is_an_error_in_words(
    features: NDArray[Any], asked: Any, said: str, store_of: Callable[[NDArray[Any]], dfx.Features]
) -> None:
    store = store_of(features)
    with pytest.raises(dfx.CallError, match=said):
        store.plot(asked)
    if isinstance(asked, str) and asked.startswith("cluster"):
        with pytest.raises(dfx.CallError, match=said):
            store.contact_sheet(int(asked[-1]))


def test_a_store_of_no_patch_or_one_has_a_picture(store_of: Callable[[NDArray[Any]], dfx.Features]) -> None:
    assert store_of(ROWS[:0]).plot().size[0] > 3 * SIDE
    for dtype in ("f8", "i8", "?"):
        assert store_of(ROWS[:0]).plot(np.zeros(0, dtype)).size[0] > 2 * SIDE
    assert store_of(ROWS[:1]).plot().size[0] > 3 * SIDE
    assert store_of(ROWS[:1]).plot("similarity:0").size[0] > 2 * SIDE


def test_k_means_does_not_depend_on_threads() -> None:
    import cv2

    rows, threads = RNG.normal(size=(5000, 16)).astype(np.float32), cv2.getNumThreads()
    try:
        found = []
        for n in (1, 2, 4):
            cv2.setNumThreads(n)
            found.append(clusters(rows, 7)[0])
    finally:
        cv2.setNumThreads(threads)
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])
