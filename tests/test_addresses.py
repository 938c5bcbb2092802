"""A path is a path, whatever letters it has; two addresses are two slides; and what is told of them has no secret."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed
import nets
import numpy as np
import pytest
from conftest import WSI

import dfx
from benchmarks.server import Server
from dfx import cli, remote
from dfx.errors import CallError, StoreError
from dfx.export import export
from dfx.report import write_report
from dfx.slides.synthetic import write_slide
from dfx.store import place_of

ALL = WSI | {"auto_get_mask": False, "block_size": 64}
SECRET = "wJalrXUtnFEMI-K7MDENG"
NAMES = ["S20-1::A2", "a:b", "what?", "100%25", "50 % #1", "~x", "ünï\udcff", "s3::http:", "file:", "[1]*"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_local_path_is_a_path_everywhere(
    name: str, folder: Path, made_slide: Path, processes: distributed.Client, capfdbinary: Any
) -> None:
    import cv2

    home = folder / name
    home.mkdir()
    slide, mask, table = home / f"{name}.svs", home / f"{name}.png", home / f"{name}.csv"
    shutil.copy(made_slide, slide)
    mask.write_bytes(cv2.imencode(".png", np.full((13, 16), 255, np.uint8))[1].tobytes())
    if "\udcff" not in name:  # a table is UTF-8
        table.write_text(f'slide,mask\n"{slide.name}","{mask.name}"\n', encoding="utf-8")
        assert [Path(row.slide) for row in dfx.table.read_table(str(table))] == [slide]
    extractor = dfx.DeepFeatureExtractor(nets.Means(), verbose=False)
    out = home / "out"
    given = os.path.relpath(slide)
    run: dict[str, Any] = {"masks": [os.path.relpath(mask)], "save_dir": str(out), "client": processes, **ALL}
    (store,) = extractor.run([given], **run).values()  # type: ignore[union-attr]
    assert store.parent == out
    assert store == extractor.run([slide.as_uri()], **run)[slide.as_uri()]  # type: ignore[index, call-overload]
    found = dfx.open_features(str(store))
    near = dfx.open_slide(made_slide)
    grid = dfx.PatchGrid.over(near, shape=64, resolution=0.5, mask=None)
    assert found.attrs["slide"]["url"] == str(slide)
    wanted = dfx.features(near, grid, nets.Means()).compute(scheduler="sync")
    assert np.allclose(found.features.compute(scheduler="sync"), wanted)
    assert np.allclose(processes.compute(found.features).result(), wanted)  # type: ignore[no-untyped-call]
    lazy = dfx.features(dfx.open_slide(str(slide)), grid, nets.Means())
    assert np.allclose(lazy.compute(scheduler="sync"), wanted)
    assert write_report(str(out), str(home / "r.html")).read_text(encoding="utf-8").count("data:image") == 1
    assert export([str(out)], "clam", str(home / "h5"))
    assert export([str(out)], "spatialdata", str(home / "zarr"))
    assert cli.main(["show", str(store), "--out", str(home / "a.png")]) == 0
    assert cli.main(["status", str(out)]) == 0
    assert os.fsencode(home / "a.png") in capfdbinary.readouterr().out or "\udcff" in name
    assert {path.name for path in folder.iterdir()} == {name}  # nothing went elsewhere


def test_a_name_that_is_no_utf_8_is_printed_as_it_is(tmp_path: Path, made_slide: Path) -> None:
    slide = shutil.copy(made_slide, tmp_path / "a\udcff.svs")
    line = [sys.executable, "-m", "dfx", "info", os.fsencode(slide)]
    done = subprocess.run(line, env=os.environ | {"PYTHONUTF8": "1"}, capture_output=True, check=True)
    assert done.stdout.startswith(os.fsencode(slide))


def test_patterns_and_weights_are_paths_too(folder: Path, made_slide: Path, resnet18: dfx.EncoderSpec) -> None:
    import timm
    import torch

    home = folder / "S20::1"
    home.mkdir()
    shutil.copy(made_slide, home / "a::b.svs")
    assert [row.slide for row in dfx.table.rows_of("S20::1/*.svs")] == ["S20::1/a::b.svs"]
    assert [row.slide for row in dfx.table.rows_of(f"file://{home}/*.svs")] == [str(home / "a::b.svs")]
    (home / "list.txt").write_text("a::b.svs\n")
    assert [row.slide for row in dfx.table.rows_of("S20::1/list.txt")] == ["S20::1/a::b.svs"]
    image = np.arange(192, dtype=np.uint8).reshape(1, 8, 8, 3)
    np.save(home / "p::%.npy", image[0])
    loose = dfx.DeepFeatureExtractor(nets.Means(), verbose=False)
    for given in ("S20::1/p::%.npy", (home / "p::%.npy").as_uri()):
        assert np.array_equal(loose.run([given])["features"], loose.run(image)["features"])  # type: ignore[index, call-overload]
    torch.save(timm.create_model("resnet18", num_classes=0).state_dict(), home / "w::1.pt")
    assert dfx.load_encoder("resnet18", weights="S20::1/w::1.pt").weights != "random"


@pytest.mark.parametrize(
    ("address", "remote_"),
    [
        ("s3://bucket/S20-1::A2.tif", True),
        ("S3://bucket/a.tif", True),
        ("simplecache::s3://bucket/a.tif", True),
        ("zip://a.tif::/data/a.zip", True),
        ("blockcache::simplecache::https://host/a.tif", True),
        ("S20-1::A2.tif", False),
        ("cache::a.tif", False),
        ("/data/run::http://x.tif", False),
        ("./a://b.tif", False),
        ("file:///data/a::b.tif", False),
        ("file://localhost/data/a.tif", False),
        (Path("s3://bucket/a.tif"), False),
    ],
)
def test_only_how_an_address_begins_makes_it_a_url(address: Any, remote_: bool) -> None:
    assert remote.is_remote(address) == remote_


def test_a_file_url_is_decoded_and_a_tilde_is_home_unless_there_is_such_a_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert remote.local_path("file:///data/a%20b%23.svs") == Path("/data/a b#.svs")
    assert remote.local_path("file://localhost/data/a.svs") == Path("/data/a.svs")
    (folder / "50%20.svs").touch()
    assert remote.local_path(f"file://{folder}/50%20.svs") == folder / "50%20.svs"
    assert remote.local_path((folder / "50%20.svs").as_uri()) == folder / "50%20.svs"
    assert remote.local_path("~/a.svs") == Path("/somewhere/a.svs")
    (folder / "~").mkdir()
    (folder / "~" / "a.svs").touch()
    assert remote.local_path("~/a.svs") == folder / "~" / "a.svs"


def test_pictures_and_reports_do_not_go_to_a_folder_that_is_called_like_a_url(folder: Path) -> None:
    with pytest.raises(CallError, match="is a URL"):
        write_report(folder, "s3://bucket/r.html")
    with pytest.raises(CallError, match="is a URL"):
        dfx.pictures.write_png(np.zeros((2, 2, 3), np.uint8), "s3://bucket/r.png")
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s3://b/a?1.svs", "s3://b/a?1.svs"),
        ("s3://b/a.svs?versionId=x1", "s3://b/a.svs?versionId=x1"),
        ("gs://b/a?b::c?d", "gs://b/a?b::c?d"),
        (f"s3://b/a.svs?X-Amz-Signature={SECRET}", "s3://b/a.svs"),
        (f"s3://b/a.svs?versionId=1&X-Amz-Security-Token={SECRET}", "s3://b/a.svs"),
        ("https://h/a.svs?versionId=1", "https://h/a.svs"),
        ("https://h/a.svs?id=1", "https://h/a.svs"),
        (f"ftp://u:{SECRET}?@h/a.svs", "ftp://h/a.svs"),
        ("zip://a?.svs::s3://b/a?1.zip", "zip://a::s3://b/a?1.zip"),
    ],
)
def test_what_is_told_of_an_address_has_the_whole_key_and_no_secret(url: str, told: str) -> None:
    assert remote.shown(url) == told
    assert remote.without_queries(f"can't read {url} (403)") == f"can't read {told} (403)"


@pytest.fixture
def bucket(moto: str) -> dict[str, Any]:
    """Options of an S3 that has a bucket "keys", with versions."""
    import s3fs

    options = {"key": "AKIADFX", "secret": SECRET, "client_kwargs": {"endpoint_url": f"http://{moto}"}}
    fs = s3fs.S3FileSystem(**options)
    if not fs.exists("keys"):
        fs.call_s3("create_bucket", Bucket="keys")
        enabled = {"Status": "Enabled"}
        fs.call_s3("put_bucket_versioning", Bucket="keys", VersioningConfiguration=enabled)
    return options


def test_keys_that_differ_behind_a_question_mark_are_two_slides(
    bucket: dict[str, Any], tmp_path: Path, client: distributed.Client, extractor: dfx.DeepFeatureExtractor
) -> None:
    import s3fs

    fs = s3fs.S3FileSystem(**bucket)
    data = [write_slide(tmp_path / f"{n}.svs", 512, 512, seed=n).read_bytes() for n in range(5)]
    versions = [fs.call_s3("put_object", Bucket="keys", Key="v.svs", Body=body)["VersionId"] for body in data[:2]]
    for key, body in zip(("a?x.svs", "a?y.svs", "S20::1.svs"), data[2:], strict=True):
        fs.call_s3("put_object", Bucket="keys", Key=key, Body=body)
    given = [f"s3://keys/v.svs?versionId={version}" for version in versions]
    given += ["s3://keys/a?x.svs", "s3://keys/a?y.svs", "s3://keys/S20::1.svs"]
    run: dict[str, Any] = {"storage_options": bucket, "client": client, **ALL}
    result = extractor.run(given, save_dir="s3://keys/out?1", **run)
    assert len({*result.values()}) == 5  # type: ignore[union-attr]
    for n, address in enumerate(given):
        store = dfx.open_features(result[address], storage_options=bucket)  # type: ignore[index, call-overload]
        slide = dfx.open_slide(tmp_path / f"{n}.svs")
        grid = dfx.PatchGrid.over(slide, shape=64, resolution=0.5, mask=None)
        wanted = dfx.features(slide, grid, nets.Means()).compute(scheduler="sync")
        assert np.array_equal(store.features.compute(scheduler="sync"), wanted)
        assert store.attrs["slide"]["url"] == address
        assert store.plot().size[0] > 100  # opened again by what the store says
    assert extractor.run(given, save_dir="s3://keys/out?1", **run) == result
    assert sorted(row.slide for row in dfx.table.rows_of("s3://keys/a*.svs", bucket)) == given[2:4]


def test_objects_that_a_server_tells_apart_by_the_query_are_two_slides(
    tmp_path: Path, client: distributed.Client, extractor: dfx.DeepFeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(2):
        write_slide(tmp_path / f"{n}.svs", 512, 512, seed=n)
    with Server(tmp_path).running() as web:
        file = web.RequestHandlerClass.file  # type: ignore[attr-defined]

        def by_query(handler: Any, path: str) -> Any:
            return file(handler, f"/{handler.path.partition('id=')[2].partition('&')[0]}.svs")

        monkeypatch.setattr(web.RequestHandlerClass, "file", by_query)
        given = [f"{web.url}/slide?id={n}&sig={SECRET}" for n in range(2)]
        one, two = (dfx.open_slide(url) for url in given)
        assert one.url == two.url == f"{web.url}/slide"
        assert one.level(0).name != two.level(0).name
        run: dict[str, Any] = {"client": client, **ALL}
        stores = extractor.run(given, save_dir=tmp_path / "out", **run)
        arrays = extractor.run(given, **run | {"output_type": "dict"})
        assert len({*stores.values()}) == 2  # type: ignore[union-attr]
        for n, url in enumerate(given):
            slide = dfx.open_slide(tmp_path / f"{n}.svs")
            grid = dfx.PatchGrid.over(slide, shape=64, resolution=0.5, mask=None)
            wanted = dfx.features(slide, grid, nets.Means()).compute(scheduler="sync")
            assert np.array_equal(dfx.open_features(stores[url]).features.compute(), wanted)  # type: ignore[index, call-overload]
            assert np.array_equal(arrays[url]["features"], wanted)  # type: ignore[index, call-overload]
        for store in stores.values():  # type: ignore[union-attr]
            assert SECRET not in (store / "zarr.json").read_text() + str(store)
        with pytest.raises(CallError) as caught:
            dfx.table.read_table(f"{web.url}/t?sig={SECRET}")
        assert SECRET not in str(caught.value)
        with pytest.raises(StoreError, match="query or a password"):
            place_of(given[0])
