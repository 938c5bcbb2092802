"""Slides and stores on servers: few requests, fetched ahead, tried again, resumed; and no secret is told."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import distributed
import fsspec
import nets
import numpy as np
import pytest
from clusters import until
from conftest import WSI
from hypothesis import given
from hypothesis import strategies as st

import dfx
from benchmarks.server import Asked, Server
from dfx import kernel, remote
from dfx.arrays import make_plan
from dfx.cli import main
from dfx.errors import CallError, RunError, SlideError, StoreError
from dfx.plan import Options
from dfx.slides import fetch
from dfx.slides.synthetic import write_slide
from dfx.store import Store, place_of, statuses
from dfx.store.writing import finish, write_note

SECRET = "wJalrXUtnFEMI-K7MDENG"
ALL = WSI | {"auto_get_mask": False, "block_size": 16}


def ranges(asked: list[Asked]) -> list[tuple[int, int]]:
    """(start, stop) of what was asked for by range."""
    pairs = [one.range.removeprefix("bytes=").split("-") for one in asked if one.range and one.status == 206]
    return [(int(start), int(stop) + 1) for start, stop in pairs]


def features(store: Any, options: Any = None) -> np.ndarray[Any, Any]:
    return np.asarray(dfx.open_features(store, storage_options=options).features.compute(scheduler="sync"))


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Server]:
    """A server of the files in `root`."""
    (tmp_path / "web").mkdir()
    with Server(tmp_path / "web").running() as server:
        yield server


@pytest.fixture
def s3(moto: str, made_slide: Path) -> Iterator[tuple[Server, dict[str, Any]]]:
    """A server in front of S3, which counts, and options that lead there; s3://data/made.svs is the made slide."""
    import s3fs

    with Server(upstream=moto).running() as server:
        options = {"key": "AKIADFX", "secret": SECRET, "client_kwargs": {"endpoint_url": server.url}}
        fs = s3fs.S3FileSystem(**options)
        for bucket in ("data", "out"):
            if not fs.exists(bucket):
                fs.mkdir(bucket)
        fs.pipe_file("data/made.svs", made_slide.read_bytes())
        server.clear()
        yield server, options
        fs.rm("out", recursive=True)


# What is fetched


def test_a_slide_of_100000_tiles_is_opened_by_10_requests_and_3_mb(web: Server) -> None:
    import tifffile

    empty = zlib.compress(bytes(256 * 256 * 3))
    assert web.root is not None
    with tifffile.TiffWriter(web.root / "big.svs", bigtiff=True) as out:
        for side in (320, 80):
            out.write(
                iter([empty] * side**2),
                shape=(side * 256, side * 256, 3),
                dtype=np.uint8,
                tile=(256, 256),
                photometric="rgb",
                compression="zlib",
                description="Aperio Image Library|AppMag = 40|MPP = 0.25",
                metadata=None,
            )
    slide = dfx.open_slide(f"{web.url}/big.svs")
    assert slide.levels[0].parts[0].offsets.size == 102_400
    assert len(web.asked) <= 10
    assert web.sent <= 3e6


def test_tiles_are_what_the_file_has_by_few_requests_and_few_more_bytes_than_needed(web: Server) -> None:
    assert web.root is not None
    near = dfx.open_slide(write_slide(web.root / "a.svs", 5000, 4000))
    far = dfx.open_slide(f"{web.url}/a.svs")
    assert far.identity == near.identity
    grid = dfx.PatchGrid.over(near, shape=224, resolution=1.0, units="mpp", mask="tissue")
    web.clear()
    patches = dfx.patches(far, grid).compute(scheduler="sync")
    assert np.array_equal(patches, dfx.patches(near, grid).compute(scheduler="sync"))
    part = far.levels[0].parts[0]
    boxes = grid.coordinates[:, [1, 0, 3, 2]] * 2
    needed = sum(count for at in part.touching(boxes) for _, count in part.pieces(*at))
    assert web.sent <= 1.15 * needed
    assert len(ranges(web.asked)) <= len(part.touching(boxes)) / 4


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 10**5)), max_size=40))
def test_merged_ranges_hold_all_that_is_asked_for_and_little_more(asked: list[tuple[int, int]]) -> None:
    found = fetch.merged(asked)
    assert all(any(a <= offset and offset + count <= b for a, b in found) for offset, count in asked)
    needed = np.zeros(11 * 10**5, bool)
    for offset, count in asked:
        needed[offset : offset + count] = True
    assert sum(b - a for a, b in found) <= 1.15 * needed.sum()
    assert all(b < c for (_, b), (c, _) in pairwise(found))


def test_what_comes_next_is_asked_for_while_tiles_are_decoded(web: Server) -> None:
    assert web.root is not None
    write_slide(web.root / "a.svs", 4096, 4096)
    slide = dfx.open_slide(f"{web.url}/a.svs")
    now, then = np.array([[0, 0, 256, 1024]]), np.array([[3072, 0, 3328, 1024]])
    wanted = [piece for at in slide.levels[0].parts[0].touching(then) for piece in slide.levels[0].parts[0].pieces(*at)]
    web.clear()
    tiles = slide.tiles(0, now, rgb=True, following=then)
    next(tiles)  # the first is decoded, the others not yet
    until(lambda: all(any(a <= o and o + c <= b for a, b in ranges(web.asked)) for o, c in wanted))
    assert len(list(tiles)) == 3
    asked = len(web.asked)
    assert len(list(slide.tiles(0, then, rgb=True))) == 4
    assert len(web.asked) == asked  # all of it was there


def test_a_block_asks_for_its_next_batch_before_the_first_is_encoded(
    web: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert web.root is not None
    write_slide(web.root / "a.svs", 4096, 2048)
    slide = dfx.open_slide(f"{web.url}/a.svs")
    grid = dfx.PatchGrid.over(slide, shape=256, resolution=0.5, units="mpp", mask=None)
    part = slide.levels[0].parts[0]
    second = [part.pieces(y, x)[0] for x, y in grid.steps_xy[16:32].tolist()]
    web.clear()

    encode, waited = kernel.encode, list[int]()

    def encode_late(encoder: Any, patches: Any, **how: Any) -> Any:
        if not waited:
            until(lambda: all(any(a <= o and o + c <= b for a, b in ranges(web.asked)) for o, c in second))
            waited.append(len(patches))
        return encode(encoder, patches, **how)

    monkeypatch.setattr(kernel, "encode", encode_late)
    dfx.features(slide, grid, nets.Means(), batch_size=16, block_size=128).compute(scheduler="sync")
    assert waited == [16]


# What fails


def test_what_fails_for_the_moment_is_tried_again(web: Server, made_slide: Path) -> None:
    assert web.root is not None
    shutil.copy(made_slide, web.root)
    web.faults.extend([503, "reset", 500])
    slide = dfx.open_slide(f"{web.url}/made.svs")
    web.faults.extend(["cut", 429, "reset"])
    got = slide.region(0, (0, 0, 1300, 1600), rgb=True)
    assert not web.faults
    assert np.array_equal(got, dfx.open_slide(made_slide).region(0, (0, 0, 1300, 1600), rgb=True))


def test_what_keeps_failing_is_an_error_in_the_end(
    web: Server, made_slide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PATIENCE", 1.0)
    assert web.root is not None
    shutil.copy(made_slide, web.root)
    web.faults.extend([503] * 100)
    with pytest.raises(SlideError, match=rf"{web.url}/made\.svs can't be read.*503.*1 seconds of trying"):
        dfx.open_slide(f"{web.url}/made.svs")


@pytest.mark.parametrize(("fault", "says"), [(403, "no permission"), (404, "does not exist"), (401, "no permission")])
def test_what_will_not_pass_is_an_error_at_once_that_names_the_slide(
    fault: int, says: str, web: Server, made_slide: Path
) -> None:
    assert web.root is not None
    shutil.copy(made_slide, web.root)
    web.faults.append(fault)
    start = time.monotonic()
    with pytest.raises(SlideError, match=rf"{web.url}/made\.svs .*{says}") as caught:
        dfx.open_slide(f"{web.url}/made.svs?signature={SECRET}")
    assert time.monotonic() - start < 5
    assert SECRET not in "".join(str(e) for e in chain(caught.value))


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def test_addresses_that_lead_nowhere_are_refused_in_words(s3: Any, tmp_path: Path) -> None:
    _, options = s3
    with pytest.raises(SlideError, match=r"s3://data/none\.svs does not exist"):
        dfx.open_slide("s3://data/none.svs", storage_options=options)
    with pytest.raises(SlideError, match=r"s3://none/x\.svs does not exist.*bucket"):
        dfx.open_slide("s3://none/x.svs", storage_options=options)
    with pytest.raises(SlideError, match=r"s3://data is a folder"):
        dfx.open_slide("s3://data", storage_options=options)
    with pytest.raises(CallError, match="Protocol not known: nonsense"):
        dfx.open_slide("nonsense://x/y.svs")
    with pytest.raises(CallError, match=r"pip install dfx\[gcs\]"):
        dfx.open_slide("gs://bucket/y.svs")
    with pytest.raises(StoreError, match="query or a password"):
        place_of(f"https://user:{SECRET}@host/out")
    with pytest.raises(StoreError, match="no store of dfx"):
        dfx.open_features("s3://out/none.zarr", storage_options=options)


def test_a_slide_that_changes_while_it_is_read_is_noticed(
    web: Server, made_slide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert web.root is not None
    shutil.copy(made_slide, web.root)
    slide = dfx.open_slide(f"{web.url}/made.svs")
    monkeypatch.setattr(fetch, "CHECK", 0.0)
    slide.thumbnail(64)
    os.utime(web.root / "made.svs", (1, 1))
    with pytest.raises(SlideError, match="changed since it was opened"):
        slide.thumbnail(64)


# Runs


def test_from_s3_to_s3_is_what_it_is_on_a_disk_and_told_by_its_url(
    s3: Any, made_slide: Path, tmp_path: Path, extractor: dfx.DeepFeatureExtractor, client: distributed.Client
) -> None:
    server, options = s3
    near = extractor.run([made_slide], save_dir=tmp_path, client=client, **ALL)
    keys = {"s3://data": options, "s3://out": options}
    server.clear()
    far = extractor.run(["s3://data/made.svs"], save_dir="s3://out/run/", client=client, storage_options=keys, **ALL)
    assert far == {"s3://data/made.svs": "s3://out/run/made.zarr"}
    assert np.array_equal(features("s3://out/run/made.zarr", options), features(near[made_slide]))
    store = dfx.open_features("s3://out/run/made.zarr", storage_options=options)
    assert np.array_equal(store.to_baseline(), dfx.open_features(near[made_slide]).to_baseline())
    assert [(s.state, s.path) for s in statuses("s3://out/run", options)] == [("complete", "s3://out/run/made.zarr")]
    server.clear()
    assert extractor.run(["s3://data/made.svs"], save_dir="s3://out/run", storage_options=options, **ALL) == far
    assert not [one for one in server.asked if one.method == "PUT" and "/c/" in one.path]  # nothing is computed again


def test_what_dfx_did_not_make_is_left_alone_in_a_bucket_too(s3: Any, extractor: dfx.DeepFeatureExtractor) -> None:
    _, options = s3
    foreign = place_of("s3://out/run/made.zarr", options)
    foreign.write("notes.txt", b"mine")
    with pytest.raises(StoreError, match="not made by dfx"):
        extractor.run(["s3://data/made.svs"], save_dir="s3://out/run", overwrite=True, storage_options=options, **ALL)
    foreign.remove(["notes.txt"])
    args = {"save_dir": "s3://out/run", "storage_options": options, **ALL}
    extractor.run(["s3://data/made.svs"], **args)
    foreign.write("notes.txt", b"mine")
    with pytest.raises(RunError, match="holds the output of another run"):
        extractor.run(["s3://data/made.svs"], **args | {"block_size": 8})
    extractor.run(["s3://data/made.svs"], overwrite=True, **args | {"block_size": 8})
    assert foreign.read("notes.txt") == b"mine"


def test_a_mask_may_lie_in_a_bucket(s3: Any, extractor: dfx.DeepFeatureExtractor) -> None:
    import cv2

    _, options = s3
    mask = np.zeros((13, 16), np.uint8)
    mask[:6, :8] = 255
    place_of("s3://data", options).write("mask.png", cv2.imencode(".png", mask)[1].tobytes())
    args = {"storage_options": options, **ALL | {"output_type": "dict"}}
    (got,) = extractor.run(["s3://data/made.svs"], masks=["s3://data/mask.png"], **args).values()  # type: ignore[union-attr]
    (same,) = extractor.run(["s3://data/made.svs"], masks=[mask], **args).values()  # type: ignore[union-attr]
    assert np.array_equal(got["coordinates"], same["coordinates"])
    ring = [[0, 0], [800, 0], [800, 600], [0, 600], [0, 0]]
    drawn = {"type": "Polygon", "coordinates": [ring]}
    place_of("s3://data", options).write("mask.geojson", json.dumps(drawn).encode())
    (got,) = extractor.run(["s3://data/made.svs"], masks=["s3://data/mask.geojson"], **args).values()  # type: ignore[union-attr]
    (same,) = extractor.run(["s3://data/made.svs"], masks=[drawn], **args).values()  # type: ignore[union-attr]
    assert 0 < len(got["coordinates"]) == len(same["coordinates"])
    assert np.array_equal(got["coordinates"], same["coordinates"])
    with pytest.raises(RunError, match=r"mask s3://data/none\.geojson can't be read"):
        extractor.run(["s3://data/made.svs"], masks=["s3://data/none.geojson"], **args)
    with pytest.raises(RunError, match=r"mask s3://data/none\.png can't be read"):
        extractor.run(["s3://data/made.svs"], masks=["s3://data/none.png"], **args)


def test_the_signature_of_a_masks_url_is_not_kept(web: Server, made_slide: Path) -> None:
    import cv2

    assert web.root is not None
    cv2.imwrite(str(web.root / "mask.png"), np.full((13, 16), 255, np.uint8))
    mask = dfx.PatchGrid.over(dfx.open_slide(made_slide), mask=f"{web.url}/mask.png?signature={SECRET}").mask
    assert mask is not None
    assert mask.cells.all()
    assert mask.method == f"{web.url}/mask.png"


RUN = (
    "import sys, json; sys.path.insert(0, sys.argv[1]); import nets, dfx; from conftest import WSI\n"
    "dfx.DeepFeatureExtractor(nets.Slow(), batch_size=4, verbose=False).run(['s3://data/made.svs'],"
    "save_dir=sys.argv[2], storage_options=json.loads(sys.argv[3]),"
    "**WSI | {'auto_get_mask': False, 'block_size': 16})"
)


def started(save_dir: str, options: dict[str, Any]) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-c", RUN, str(Path(__file__).parent), save_dir, json.dumps(options)]
    return subprocess.Popen(line)


@pytest.mark.slow
def test_a_run_to_s3_that_is_killed_is_resumed_with_the_same_result(
    s3: Any, made_slide: Path, tmp_path: Path, extractor: dfx.DeepFeatureExtractor
) -> None:
    server, options = s3

    def written() -> list[str]:
        return [one.path for one in server.asked if one.method == "PUT" and "/features/c/" in one.path]

    with started("s3://out/killed", options) as process:
        until(lambda: len(written()) >= 3)
        process.send_signal(signal.SIGKILL)
    until(lambda: process.poll() is not None)
    time.sleep(0.2)
    (found,) = statuses("s3://out/killed", options)
    assert found.state == "partial"
    assert 3 <= found.done < found.blocks
    with pytest.raises(StoreError, match="running, not complete"):
        dfx.open_features("s3://out/killed/made.zarr", storage_options=options)
    server.clear()
    with started("s3://out/killed", options) as process:
        assert process.wait(120) == 0
    assert len(written()) == found.blocks - found.done
    near = dfx.DeepFeatureExtractor(nets.Slow(), batch_size=4, verbose=False).run(
        [made_slide], save_dir=tmp_path, **ALL
    )
    assert np.array_equal(features("s3://out/killed/made.zarr", options), features(near[made_slide]))


def test_of_those_who_create_a_marker_at_once_one_wins(s3: Any, tmp_path: Path) -> None:
    _, options = s3
    (tmp_path / "a").mkdir()
    for place in (place_of("s3://out/race", options), place_of(tmp_path / "a")):
        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(lambda n, place=place: place.create("marker", str(n).encode()), range(16)))
        assert won.count(True) == 1
        assert place.read("marker") == str(won.index(True)).encode()
        place.remove(["marker"])


def test_many_runs_that_make_one_store_at_once_make_one_in_a_bucket_too(s3: Any, made_slide: Path) -> None:
    _, options = s3
    grid = dfx.PatchGrid.over(dfx.open_slide(made_slide), shape=64, resolution=0.5, mask=None)
    plan = make_plan(dfx.open_slide(made_slide), grid, [dfx.load_encoder(nets.Means())], Options(block_size=16))
    place = place_of("s3://out/many/one.zarr", options)
    place.write("features/c/9/0", b"of a store that was removed")
    start = threading.Barrier(6)

    def make(n: int) -> None:
        start.wait()
        Store.prepare(place, plan).arrays[0][16 * n : 16 * n + 16] = np.ones((16, 6), np.float32)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(make, range(6)))
    assert Store.prepare(place, plan).missing() == list(range(6, plan.blocks))


def test_what_another_process_put_there_is_read_though_it_was_not_there_when_listed(s3: Any) -> None:
    _, options = s3
    place = place_of("s3://out/seen.zarr/notes", options)
    place.write("first.jsonl", b"1")
    assert place.files() == ["first.jsonl"]
    other = fsspec.filesystem("s3", **options, skip_instance_cache=True)
    other.pipe_file("out/seen.zarr/notes/closing.json", b"2")
    assert not place.create("closing.json", b"3")
    assert place.read("closing.json") == b"2"


def test_a_create_only_put_whose_refusal_is_a_status_alone_says_that_it_was_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Refused(Exception):  # as libraries other than s3fs have it
        status = 412

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise Refused

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "pipe_file", refuse)
    assert not place_of("memory://out/made.zarr").create("closing.json", b"1")


@pytest.mark.slow
def test_two_runs_of_one_store_at_once_do_no_harm_and_what_was_noted_is_kept(
    s3: Any, made_slide: Path, tmp_path: Path, extractor: dfx.DeepFeatureExtractor
) -> None:
    _, options = s3
    both = [started("s3://out/both", options) for _ in range(2)]
    for process in both:
        assert process.wait(120) == 0
    near = dfx.DeepFeatureExtractor(nets.Slow(), batch_size=4, verbose=False).run(
        [made_slide], save_dir=tmp_path, **ALL
    )
    assert np.array_equal(features("s3://out/both/made.zarr", options), features(near[made_slide]))
    place = place_of("s3://out/both/made.zarr", options)
    place.write("zarr.json", place.read("zarr.json").replace(b'"complete"', b'"running"'))
    write_note(place, "0-0", {"damaged_tiles": ["tile 3"], "seconds": {}})
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(finish, [place] * 4))
    assert dfx.open_features(place).attrs["damaged_tiles"] == ["tile 3"]
    assert not (place / "notes").exists()


def test_from_the_command_line(
    s3: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, options = s3
    said = ["--storage-options", json.dumps(options)]
    assert main(["info", "s3://data/made.svs", *said]) == 0
    assert "1600 x 1300" in capsys.readouterr().out
    line = "extract s3://data/made.svs --encoder resnet18 --weights random --resolution 4 --units mpp --patch 64"
    assert main([*line.split(), "--out", "s3://out/cli", "--quiet", *said]) == 0
    assert capsys.readouterr().out == "s3://out/cli/made.zarr\n"
    monkeypatch.setenv("DFX_STORAGE_OPTIONS", json.dumps({"s3": options}))
    assert main(["status", "s3://out/cli"]) == 0
    assert capsys.readouterr().out == "complete  made.zarr\n1 complete\n"
    assert main(["show", "s3://out/cli/made.zarr", "--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert main(["report", "s3://out/cli", "--out", str(tmp_path / "a.html")]) == 0
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "s3://out/cli" in page
    assert "data:image/jpeg" in page
    assert main(["info", "s3://data/made.svs", "--storage-options", SECRET]) == 2
    assert SECRET not in "".join(capsys.readouterr())


# Secrets


def test_no_secret_is_in_a_log_a_message_a_key_or_a_store(
    s3: Any,
    web: Server,
    made_slide: Path,
    tmp_path: Path,
    processes: distributed.Client,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, options = s3
    assert web.root is not None
    shutil.copy(made_slide, web.root / "signed.svs")
    (web.root / "bad.svs").write_bytes(made_slide.read_bytes()[:90_000] + bytes(made_slide.stat().st_size - 90_000))
    given = ["s3://data/made.svs", *(f"{web.url}/{name}.svs?X-Signature={SECRET}" for name in ("signed", "bad", "no"))]
    told: list[str] = []
    caplog.set_level(logging.DEBUG, "dfx")
    caplog.set_level(logging.DEBUG, "distributed")

    def notify(event: Any) -> None:
        told.append(repr(event))
        tasks = processes.run_on_scheduler(
            lambda dask_scheduler: [repr((t.key, t)) for t in dask_scheduler.tasks.values()]
        )
        told.extend(tasks)

    with pytest.raises(RunError) as caught:
        dfx.DeepFeatureExtractor(nets.Means(), verbose=False).run(
            given, save_dir="s3://out/secret", storage_options={"s3": options}, client=processes, notify=notify, **ALL
        )
    assert set(caught.value.failures) == set(given[2:])
    told += [str(e) for e in chain(caught.value)] + [repr(e) for e in caught.value.failures.values()]
    told += [caplog.text, *capfd.readouterr()]
    place = place_of("s3://out/secret", options)
    told += [place.read(name).decode("latin-1") for name in place.files()]
    told += [repr(place), str(place / "x")]
    slide = dfx.open_slide(given[1], storage_options={"s3": options})
    told += [repr(slide), slide.url, repr(slide.source), repr(slide.level(0)), slide.level(0).name]
    assert slide.url == f"{web.url}/signed.svs"
    assert [text for text in told if SECRET in text or "X-Signature" in text] == []
    assert dfx.open_features("s3://out/secret/signed.zarr", storage_options=options).attrs["slide"]["url"] == slide.url
    again = pickle.loads(pickle.dumps(slide))
    assert again.identity == slide.identity


@pytest.mark.parametrize(
    ("url", "options", "found"),
    [
        ("s3://a/b", None, {}),
        ("s3://a/b", {"key": "k", "client_kwargs": {}}, {"key": "k", "client_kwargs": {}}),
        ("s3://a/b", {"client_kwargs": {"endpoint_url": "x"}}, {"client_kwargs": {"endpoint_url": "x"}}),
        ("s3://a/b", {"s3": {"key": "k"}, "https": {"x": 1}}, {"key": "k"}),
        ("gs://a/b", {"s3": {"key": "k"}}, {}),
        ("s3://a/out/x", {"s3": {"key": "k"}, "s3://a": {"key": "a"}, "s3://a/out/": {"key": "o"}}, {"key": "o"}),
        ("s3://ab/x", {"s3": {"key": "k"}, "s3://a": {"key": "a"}}, {"key": "k"}),
        ("simplecache::s3://a/b", {"s3": {"key": "k"}, "gs": {}}, {"s3": {"key": "k"}}),
    ],
)
def test_each_url_gets_its_own_options(url: str, options: Any, found: dict[str, Any]) -> None:
    assert remote.options_for(url, options) == found


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("/a/b?c", "/a/b?c"),
        ("https://h/a.svs?sig=1", "https://h/a.svs"),
        ("ftp://u:p@h/a.svs", "ftp://h/a.svs"),
        ("abfs://container@account/a", "abfs://container@account/a"),
        ("zip://a.svs::https://h/a.zip?sig=1", "zip://a.svs::https://h/a.zip"),
    ],
)
def test_an_address_is_told_without_its_secrets(url: str, told: str) -> None:
    assert remote.shown(url) == told
