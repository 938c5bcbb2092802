"""Polygons of GeoJSON as a mask, as QuPath exports them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from conftest import WSI
from numpy.typing import NDArray

import dfx
from dfx.errors import CallError
from dfx.masks import annotations, draw


def ring(*points: tuple[float, float]) -> list[list[float]]:
    return [list(point) for point in (*points, points[0])]


def square(x: float, y: float, size: float) -> list[list[float]]:
    return ring((x, y), (x + size, y), (x + size, y + size), (x, y + size))


def feature(geometry: dict[str, Any] | None) -> dict[str, Any]:
    return {"type": "Feature", "id": "PathAnnotationObject", "geometry": geometry, "properties": {"name": "tumour"}}


FRAME: dict[str, Any] = {"type": "Polygon", "coordinates": [square(100, 120, 600), square(300, 320, 200)]}
"""With a hole, in which a part of ISLANDS lies."""
ISLANDS = {
    "type": "MultiPolygon",
    "coordinates": [[square(350, 370, 60)], [ring((900.5, 200.25), (1500, 300), (1000, 1100.75))]],
}
BOTH = {"type": "FeatureCollection", "features": [feature(FRAME), feature(ISLANDS)]}


def oracle(found: dict[str, Any], size_xy: tuple[int, int], cells_yx: tuple[int, int]) -> tuple[Any, Any]:
    """Which cells' centres lie inside, and which cells an outline passes nearby, by shapely."""
    shape = shapely.union_all([shapely.from_geojson(json.dumps(f["geometry"])) for f in found["features"]])
    scale = np.array(size_xy) / np.array(cells_yx[::-1])
    x, y = np.meshgrid(*((np.arange(n) + 0.5) * s for n, s in zip(cells_yx[::-1], scale, strict=True)))
    points = shapely.points(x, y)
    return shapely.contains(shape, points), shapely.distance(shape.boundary, points) <= 1.5 * scale.max()


@pytest.mark.parametrize("size", [400, 4096])
def test_cells_are_those_whose_centres_lie_inside(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotations, "SIZE", size)
    cells, _ = draw(BOTH, (1600, 1300))
    assert cells.shape == ((325, 400) if size == 400 else (1300, 1600))
    inside, near = oracle(BOTH, (1600, 1300), (cells.shape[0], cells.shape[1]))
    assert np.array_equal(cells[~near], inside[~near])
    assert cells[inside].all()  # an outline's cells count, so that nothing inside is lost


def test_all_ways_of_wrapping_a_polygon_draw_the_same() -> None:
    expected, _ = draw(FRAME, (1600, 1300))
    collected = {"type": "GeometryCollection", "geometries": [FRAME, {"type": "Point", "coordinates": [1, 1]}]}
    for found in (
        feature(FRAME),
        collected,
        feature(collected),
        {"type": "FeatureCollection", "features": [feature(FRAME), feature(None)]},
    ):
        assert np.array_equal(draw(found, (1600, 1300))[0], expected)


@pytest.mark.parametrize(
    "empty",
    [
        {"type": "Polygon", "coordinates": []},
        {"type": "Polygon", "coordinates": [[]]},
        {"type": "Polygon", "coordinates": [[], []]},
        {"type": "MultiPolygon", "coordinates": []},
        {"type": "MultiPolygon", "coordinates": [[], [[]]]},
        {"type": "GeometryCollection", "geometries": []},
        {"type": "GeometryCollection", "geometries": [{"type": "Polygon", "coordinates": []}, None]},
        {"type": "MultiPoint", "coordinates": []},
    ],
    ids=json.dumps,
)
def test_an_empty_geometry_adds_nothing(empty: dict[str, Any]) -> None:
    expected, _ = draw(FRAME, (1600, 1300))
    for beside in ([feature(empty), feature(FRAME)], [feature(FRAME), feature(empty), feature(None)]):
        found, _ = draw({"type": "FeatureCollection", "features": beside}, (1600, 1300))
        assert np.array_equal(found, expected)
    with pytest.raises(CallError, match="has no polygon"):
        draw(feature(empty), (1600, 1300))


def test_rings_may_be_open_have_heights_and_empty_holes() -> None:
    expected, _ = draw(FRAME, (1600, 1300))
    outline, hole = FRAME["coordinates"]
    for rings in ([outline[:-1], hole[:-1]], [[[*p, 7.5] for p in outline], hole], [outline, [], hole]):
        found, _ = draw({"type": "Polygon", "coordinates": rings}, (1600, 1300))
        assert np.array_equal(found, expected)
    with pytest.raises(CallError, match="an invalid polygon"):
        draw({"type": "Polygon", "coordinates": [[], hole]}, (1600, 1300))


def test_holes_that_overlap_or_reach_beyond_their_outline_are_left_out_and_nothing_else() -> None:
    outline, *holes = square(100, 100, 600), square(200, 200, 200), square(300, 300, 200), square(650, 650, 200)
    cells, _ = draw({"type": "Polygon", "coordinates": [outline, *holes]}, (1600, 1300))
    shape = shapely.Polygon(outline)
    for hole in holes:
        shape = shapely.difference(shape, shapely.Polygon(hole))
    y, x = np.indices(cells.shape) + 0.5
    points = shapely.points(x, y)
    near = shapely.distance(shape.boundary, points) <= 1.5
    assert np.array_equal(cells[~near], shapely.contains(shape, points)[~near])


def test_what_reaches_beyond_the_slide_is_cut_at_its_border() -> None:
    cells, _ = draw({"type": "Polygon", "coordinates": [square(-1e12, -1e12, 2e12)]}, (1600, 1300))
    assert cells.all()
    outside, _ = draw({"type": "Polygon", "coordinates": [square(5000, 5000, 10)]}, (1600, 1300))
    assert not outside.any()


def test_a_polygon_thinner_than_a_cell_is_not_lost() -> None:
    cells, _ = draw({"type": "Polygon", "coordinates": [square(50_000.2, 70_000.4, 1)]}, (100_000, 100_000))
    assert cells.shape == (4096, 4096)
    (y, x) = np.argwhere(cells).mean(axis=0)
    assert (round(x), round(y)) == (50_000 * 4096 // 100_000, 70_000 * 4096 // 100_000)


def inside_patches(slide: dfx.Slide, mask: Any, ratio: float = 0.0) -> NDArray[np.int64]:
    return dfx.PatchGrid.over(
        slide, shape=50, resolution=1.0, units="baseline", mask=mask, min_mask_ratio=ratio
    ).coordinates


def test_patches_are_kept_under_polygons_and_not_in_their_holes(slide: dfx.Slide, tmp_path: Path) -> None:
    path = tmp_path / "made.geojson"
    path.write_text(json.dumps(BOTH["features"]))  # a list, as QuPath has it without "FeatureCollection"
    kept = inside_patches(slide, path, 0.5)
    assert np.array_equal(kept, inside_patches(slide, str(path), 0.5))
    assert np.array_equal(kept, inside_patches(slide, BOTH, 0.5))
    shape = shapely.union_all([shapely.from_geojson(json.dumps(f["geometry"])) for f in BOTH["features"]])
    every = inside_patches(slide, None)
    share = shapely.area(shapely.intersection(shape, shapely.box(*every.T))) / 2500
    clear = np.abs(share - 0.5) > 0.1
    found = (every[:, None] == kept[None]).all(axis=2).any(axis=1)
    assert np.array_equal(found[clear], share[clear] > 0.5)
    assert found.any()


def test_run_takes_geojson_by_path_and_by_value(
    made_slide: Path, tmp_path: Path, extractor: dfx.DeepFeatureExtractor
) -> None:
    path = tmp_path / "made.geojson"
    path.write_text(json.dumps(BOTH))
    options = WSI | {"output_type": "dict"}
    by_path = extractor.run([made_slide], masks=[path], **options)
    by_value = extractor.run([made_slide], masks=[BOTH], **options)
    assert isinstance(by_path, dict)
    assert isinstance(by_value, dict)
    expected = dfx.PatchGrid.over(dfx.open_slide(made_slide), shape=64, mask=path).coordinates
    assert 10 < len(expected) < 300
    for result in (by_path, by_value):
        assert np.array_equal(result[made_slide]["coordinates"], expected)
    kept = extractor.run([made_slide], masks=[BOTH], save_dir=tmp_path, **WSI)
    assert isinstance(kept, dict)
    mask = dfx.open_features(kept[made_slide]).mask
    assert mask is not None
    assert mask.method == "GeoJSON"
    assert np.array_equal(mask.cells, draw(BOTH, dfx.open_slide(made_slide).dimensions)[0])
    with pytest.raises(CallError, match="has 'Sphere'"):
        extractor.run([made_slide], masks=[{"type": "Sphere"}], **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no GeoJSON"),
        ("[" * 100_000, "is no GeoJSON"),
        ("[1, 2]", "is no GeoJSON"),
        ('{"type": "Topology"}', "has 'Topology'"),
        ('{"type": "FeatureCollection"}', "no list of features"),
        ('{"type": "FeatureCollection", "features": []}', "has no polygon"),
        ('{"type": "Point", "coordinates": [1, 2]}', "has no polygon"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]}', "an invalid polygon"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, 1], ["a", 2]]]}', "an invalid polygon"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, 1], [NaN, 2]]]}', "an invalid polygon"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, 1], [1e999, 2]]]}', "an invalid polygon"),
        ('{"type": "Polygon", "coordinates": 7}', "an invalid polygon"),
        ('{"type": "Polygon"}', "an invalid polygon"),
        ('{"type": "MultiPolygon", "coordinates": null}', "no list of coordinates"),
        ("\x00\xff", "is no GeoJSON"),
    ],
)
def test_what_is_no_area_is_refused(slide: dfx.Slide, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mask.json"
    path.write_text(text)
    with pytest.raises(CallError, match=message):
        inside_patches(slide, path)


def test_a_missing_file_is_refused_before_work_starts(
    made_slide: Path, tmp_path: Path, extractor: dfx.DeepFeatureExtractor
) -> None:
    with pytest.raises(CallError, match=r"nowhere\.geojson is not a file"):
        extractor.run([made_slide], masks=["nowhere.geojson"], save_dir=tmp_path, **WSI)
    for name in ("nowhere.geojson", "no\0where.geojson"):
        with pytest.raises(CallError, match="can't be read"):
            dfx.PatchGrid.over(dfx.open_slide(made_slide), mask=name)
