"""A run loses nothing: workers die, hang or run short, slides rot, users interrupt, and it goes on."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import distributed
import nets
import numpy as np
import pytest
import zarr
from clusters import until
from conftest import WSI

import dfx
from dfx import memory, run
from dfx.arrays import make_plan
from dfx.errors import CallError, CallTypeError, MemoryShortage, RunError, SlideError
from dfx.plan import Needs, Options
from dfx.slides.synthetic import write_slide
from dfx.store import Store, dfx_attributes, disk, fail, finish, place_of, statuses, write_note

ALL = WSI | {"auto_get_mask": False, "block_size": 16}


@pytest.fixture
def nannies() -> Iterator[distributed.Client]:
    """Two worker processes that are restarted when they die, not the current cluster."""
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


def extractor_of(module: Any) -> dfx.DeepFeatureExtractor:
    return dfx.DeepFeatureExtractor(module, batch_size=8, verbose=False)


def features(store: Any) -> np.ndarray[Any, Any]:
    return np.asarray(dfx.open_features(store).features.compute(scheduler="sync"))


def damage(path: Path, tile: int, out: Path) -> Path:
    """Copy a slide with one tile of its first level overwritten."""
    import tifffile

    shutil.copy(path, out)
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[0]
        offset, count = page.dataoffsets[tile], page.databytecounts[tile]
    with out.open("r+b") as file:
        file.seek(offset)
        file.write(b"\0" * count)
    return out


# Damaged tiles


def test_a_damaged_tile_fails_its_slide_unless_told_to_fill_it_and_then_the_store_names_it(
    made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    bad = damage(made_slide, 8, tmp_path / "bad.svs")
    extractor = extractor_of(nets.Means())
    with pytest.raises(RunError, match=r"tile 8 \(row 1, column 1\) of level 0 of .*bad\.svs can't be decoded"):
        extractor.run([bad], save_dir=tmp_path / "out", client=client, **ALL)
    (failed,) = statuses(tmp_path / "out")
    assert failed.state == "failed"
    assert "tile 8" in failed.reason
    good = extractor.run([made_slide], save_dir=tmp_path / "good", client=client, **ALL)
    got = extractor.run([bad], save_dir=tmp_path / "out", client=client, on_bad_tile="fill", **ALL)
    found = dfx.open_features(got[bad])  # type: ignore[index]
    assert len(found.attrs["damaged_tiles"]) == 1
    assert found.attrs["damaged_tiles"][0].startswith("tile 8 (row 1, column 1) of level 0")
    assert not (Path(found.path) / "notes").exists()
    x0, y0, x1, y1 = found.coordinates.compute().T
    level = dfx.open_slide(made_slide).levels[0]
    h, w = level.tile_yx
    touching = (x0 < 2 * w) & (x1 > w) & (y0 < 2 * h) & (y1 > h)
    ours, right = features(got[bad]), features(good[made_slide])  # type: ignore[index]
    assert np.array_equal(ours[~touching], right[~touching])
    within = (x0 >= w) & (x1 <= 2 * w) & (y0 >= h) & (y1 <= 2 * h)
    assert within.any()
    assert np.allclose(ours[within], 1)  # white


def test_what_was_filled_is_told_of_arrays_too(made_slide: Path, tmp_path: Path, client: distributed.Client) -> None:
    bad = damage(made_slide, 8, tmp_path / "bad.svs")
    got = extractor_of(nets.Means()).run([bad], client=client, on_bad_tile="fill", **ALL | {"output_type": "dict"})
    assert len(got[bad]["damaged_tiles"]) == 1  # type: ignore[index]


def test_a_file_that_is_gone_is_not_filled_with_white(
    made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    copy = tmp_path / "copy.svs"
    shutil.copy(made_slide, copy)
    with copy.open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(RunError):
        extractor_of(nets.Means()).run([copy], save_dir=tmp_path / "o", client=client, on_bad_tile="fill", **ALL)


# Workers that die


def test_a_run_whose_workers_die_gives_what_an_undisturbed_one_gives(
    made_slide: Path, tmp_path: Path, nannies: distributed.Client
) -> None:
    log = tmp_path / "log"
    extractor = extractor_of(nets.Slow(str(log)))
    calm = extractor_of(nets.Means()).run([made_slide], save_dir=tmp_path / "calm", **ALL)
    stop, kills = threading.Event(), [0]

    def kill() -> None:
        while not stop.wait(5):
            pids = list(nannies.run(os.getpid, on_error="ignore").values())
            if len(pids) > 1:  # Dask gives up a worker that is away for 15 seconds, as on a busy machine
                os.kill(pids[0], signal.SIGKILL)
                kills[0] += 1

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        got = extractor.run([made_slide], save_dir=tmp_path / "out", client=nannies, **ALL)
    finally:
        stop.set()
        killer.join()
    assert np.array_equal(features(got[made_slide]), features(calm[made_slide]))  # type: ignore[index]
    assert kills[0]
    again = sum(map(int, log.read_text().split())) - len(features(got[made_slide]))  # type: ignore[index]
    assert again <= kills[0] * ALL["block_size"]  # one block a thread of the worker


def test_a_block_that_kills_workers_is_found_out_and_fails_its_slide_alone(
    made_slide: Path, tmp_path: Path, nannies: distributed.Client
) -> None:
    poison = write_slide(tmp_path / "poison.svs", 640, 520, seed=3)
    events: list[Any] = []
    mask = np.ones((4, 4), bool)
    with pytest.raises(RunError, match=r"block \d of .*poison\.svs killed 2 workers that ran nothing else") as caught:
        extractor_of(nets.Deadly()).run(
            [poison, made_slide],
            masks=[mask, np.tile([[True, False]], (8, 4))],
            save_dir=tmp_path / "out",
            client=nannies,
            notify=events.append,
            **ALL,
        )
    assert list(caught.value.result) == [made_slide]
    assert {s.path.stem: s.state for s in statuses(tmp_path / "out")} == {"made": "complete", "poison": "failed"}
    assert any(isinstance(event, run.Throttled) and "alone" in event.reason for event in events)
    assert nannies.submit(lambda: 7).result(timeout=60) == 7  # the cluster lives


def test_a_block_that_hangs_is_given_up_and_its_worker_freed(
    made_slide: Path, tmp_path: Path, nannies: distributed.Client
) -> None:
    stuck = write_slide(tmp_path / "stuck.svs", 640, 520, seed=3)
    began = time.monotonic()
    with pytest.raises(RunError, match=r"stuck\.svs has not ended in 15 seconds on tcp://.*: given up") as caught:
        extractor_of(nets.Stuck()).run(
            [stuck, made_slide],
            masks=[None, np.tile([[True, False]], (8, 4))],
            save_dir=tmp_path / "out",
            client=nannies,
            block_timeout=15,
            **ALL,
        )
    assert list(caught.value.result) == [made_slide]
    assert time.monotonic() - began < 120
    nannies.wait_for_workers(2, timeout=60)
    assert all(nannies.run(lambda: 7).values())


@pytest.mark.slow
def test_what_hangs_in_this_process_is_given_up_too(tmp_path: Path) -> None:
    stuck = write_slide(tmp_path / "stuck.svs", 640, 520, seed=3)
    with pytest.raises(RunError, match=r"stuck\.svs has not ended in 3 seconds on inproc://.*: given up"):
        extractor_of(nets.Stuck(30)).run([stuck], save_dir=tmp_path / "out", block_timeout=3, **ALL)


def test_all_workers_may_die_at_once(made_slide: Path, tmp_path: Path, nannies: distributed.Client) -> None:
    def kill(event: Any) -> None:
        if isinstance(event, run.BlockDone) and not killed:
            killed.extend(nannies.run(os.getpid).values())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    killed: list[int] = []
    got = extractor_of(nets.Slow()).run([made_slide], save_dir=tmp_path / "out", client=nannies, notify=kill, **ALL)
    calm = extractor_of(nets.Means()).run([made_slide], save_dir=tmp_path / "calm", **ALL)
    assert len(killed) == 2
    assert np.array_equal(features(got[made_slide]), features(calm[made_slide]))  # type: ignore[index]


# Memory


def test_a_block_waits_for_room_and_then_takes_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [1000]
    monkeypatch.setattr(memory, "room", lambda threshold, limit=None: free[0])
    guard = memory.Guard()
    needs = Needs(shared=100, shared_a_patch=10, a_thread=50, a_thread_a_patch=5)
    with guard.admit("a", needs, 32, 80, None) as (size, tell):
        assert size == 32  # 100 + 320 + 50 + 160 = 630
        waited: list[int] = []

        def second() -> None:
            with guard.admit("a", needs, 32, 80, None) as (size, _):
                waited.append(size)

        other = threading.Thread(target=second)
        other.start()
        other.join(timeout=1.5)
        assert waited == []  # it would take 630 more
        tell(32)  # the first one's memory is resident now, and what is shared is there
        other.join(timeout=5)
        assert waited == [32]
    free[0] = 300
    with guard.admit("a", needs, 32, 80, None) as (size, _):
        assert size == 16  # 160 + 50 + 80
    free[0] = 40
    with pytest.raises(MemoryShortage, match=r"no room for a block: .* MB are resident .* batches of 1 take"):
        guard.admit("a", needs, 32, 80, None).__enter__()


def test_memory_is_measured_anew_before_more_blocks_start_than_there_was_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured: list[float] = []
    monkeypatch.setattr(memory, "room", lambda threshold, limit=None: measured.append(threshold) or 1000)
    guard = memory.Guard()
    needs = Needs(shared=0, shared_a_patch=0, a_thread=100, a_thread_a_patch=0)
    for _ in range(100):
        with guard.admit("a", needs, 32, 80, None) as (_, tell):
            tell(32)
    assert 10 <= len(measured) < 50  # it takes long, so not for every block; each takes a tenth
    with guard.admit("a", needs, 32, 70, None):
        assert measured[-1] == 70


def test_a_worker_with_little_memory_halves_its_batches_and_the_store_says_so(made_slide: Path, tmp_path: Path) -> None:
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, memory_limit="1500MiB", dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        extractor = dfx.DeepFeatureExtractor(nets.Hungry(), batch_size=64, verbose=False)
        got = extractor.run([made_slide], save_dir=tmp_path / "out", client=client, **ALL | {"block_size": 64})
        calm = extractor.run([made_slide], save_dir=tmp_path / "calm", **ALL | {"block_size": 64})
    attrs = dfx.open_features(got[made_slide]).attrs  # type: ignore[index]
    assert attrs["batches"]
    assert all(size < 64 for size in attrs["batches"].values())
    assert np.allclose(features(got[made_slide]), features(calm[made_slide]), atol=1e-6)  # type: ignore[index]


def test_a_plan_that_no_worker_has_memory_for_is_refused_with_its_arithmetic(made_slide: Path, tmp_path: Path) -> None:
    large = ALL | {"patch_input_shape": 13_000, "input_resolutions": [{"resolution": 0.01, "units": "mpp"}]}
    extractor = dfx.DeepFeatureExtractor("resnet18", weights="random", verbose=False)
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, memory_limit="2GiB", dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
        pytest.raises(RunError, match=r"takes [\d,]+ MB with one thread and one patch a batch .* may take 1,946 MB"),
    ):
        extractor.run([made_slide], save_dir=tmp_path / "out", client=client, **large)


def test_a_cluster_that_is_paused_for_want_of_memory_is_an_error_with_figures(
    made_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfx.run.health.PAUSED", 4)
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, memory_limit="1GiB", dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        client.run(importlib.import_module, "dfx.run")  # which takes memory of its own
        client.run(nets.hoard, 850 * 2**20)
        until(lambda: {w["status"] for w in client.scheduler_info()["workers"].values()} == {"paused"})
        with pytest.raises(RunError, match=r"all 1 workers have been paused .* of 1,024 MB"):
            extractor_of(nets.Means()).run([made_slide], save_dir=tmp_path / "out", client=client, **ALL)


# What users do


def test_an_output_that_is_removed_while_it_is_written_is_that_slide_s_failure(
    made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    other = write_slide(tmp_path / "other.svs", 640, 520, seed=3)

    def remove(event: Any) -> None:
        if isinstance(event, run.BlockDone) and event.item.address == str(made_slide):
            shutil.rmtree(tmp_path / "out" / "made.zarr", ignore_errors=True)

    with pytest.raises(RunError, match=r"made\.zarr|made\.svs") as caught:
        extractor_of(nets.Means()).run(
            [made_slide, other], save_dir=tmp_path / "out", client=client, notify=remove, **ALL
        )
    assert list(caught.value.result) == [other]
    got = extractor_of(nets.Means()).run([made_slide, other], save_dir=tmp_path / "out", client=client, **ALL)
    assert len(got) == 2


def test_a_slide_that_is_replaced_during_a_run_fails_and_names_itself(
    made_slide: Path, tmp_path: Path, nannies: distributed.Client
) -> None:
    path = tmp_path / "replaced.svs"
    shutil.copy(made_slide, path)
    replacement = write_slide(tmp_path / "new.svs", 1600, 1300, seed=9)

    def replace(event: Any) -> None:
        if isinstance(event, run.Planned):
            replacement.replace(path)

    with pytest.raises(RunError, match=r"replaced\.svs changed since it was opened"):
        extractor_of(nets.Slow()).run([path], save_dir=tmp_path / "out", client=nannies, notify=replace, **ALL)


def test_two_runs_on_one_folder_at_once_do_no_harm(made_slide: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[3]); import nets, dfx; from conftest import WSI;"
        "dfx.DeepFeatureExtractor(nets.Means(), verbose=False).run([sys.argv[1]], save_dir=sys.argv[2],"
        "**WSI | {'auto_get_mask': False, 'block_size': 16})"
    )
    line = [sys.executable, "-c", code, str(made_slide), str(tmp_path / "out"), str(Path(__file__).parent)]
    both = [subprocess.Popen(line, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    told = [one.communicate(timeout=120)[1] for one in both]
    assert [one.returncode for one in both] == [0, 0, 0], told
    alone = extractor_of(nets.Means()).run([made_slide], save_dir=tmp_path / "alone", **ALL)
    assert np.array_equal(features(tmp_path / "out" / "made.zarr"), features(alone[made_slide]))  # type: ignore[index]
    assert [s.state for s in statuses(tmp_path / "out")] == ["complete"]


def test_many_runs_that_make_one_store_at_once_make_one(made_slide: Path, tmp_path: Path) -> None:
    """The race of two runs at its narrowest: no chunk that one has written is lost to another's creation."""
    slide = dfx.open_slide(made_slide)
    grid = dfx.PatchGrid.over(slide, shape=64, resolution=0.5, mask=None)
    plan = make_plan(slide, grid, [dfx.load_encoder(nets.Means())], Options(block_size=16))
    block = np.ones((16, 6), np.float32)
    start = threading.Barrier(8)

    def make(n: int) -> None:
        start.wait()
        store = Store.prepare(tmp_path / "one.zarr", plan)
        store.arrays[0][16 * n : 16 * n + 16] = block

    for attempt in range(5):
        shutil.rmtree(tmp_path / "one.zarr", ignore_errors=True)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(make, range(8)))
        blocks = -(-len(grid) // 16)
        assert Store.prepare(tmp_path / "one.zarr", plan).missing() == list(range(8, blocks)), attempt
    assert [p.name for p in tmp_path.iterdir()] == ["one.zarr"]


def test_a_folder_that_another_run_makes_while_it_is_removed_is_removed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.is_dir

    def late(self: Path) -> bool:
        there = original(self)
        if self.name == "notes" and not there:
            self.mkdir()
            (self / "closing.json").touch()
        return there

    place = place_of(tmp_path / "one.zarr")
    (tmp_path / "one.zarr").mkdir()
    monkeypatch.setattr(Path, "is_dir", late)
    place.remove(["notes"])
    monkeypatch.undo()
    assert not (tmp_path / "one.zarr").exists()


def test_many_runs_that_close_one_store_at_once_close_it(
    made_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = dfx.open_slide(made_slide)
    grid = dfx.PatchGrid.over(slide, shape=64, resolution=0.5, mask=None)
    plan = make_plan(slide, grid, [dfx.load_encoder(nets.Means())], Options(block_size=16))
    at = place_of(tmp_path / "one.zarr")
    start = threading.Barrier(8)

    def close(_: int) -> None:
        start.wait()
        finish(at)

    for attempt in range(5):
        store = Store.prepare(at, plan, overwrite=True)
        store.arrays[0][...] = np.ones((len(grid), 6), np.float32)
        for n in range(200):
            monkeypatch.setattr(disk, "WRITER", f"{n:032x}")  # as of so many processes
            write_note(at, f"{n}-0", {"damaged_tiles": [f"{n}"], "seconds": {}})
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(close, range(8)))
        said = dfx_attributes(at) or {}
        assert (said["status"], len(said["damaged_tiles"])) == ("complete", 200), attempt
        assert not (tmp_path / "one.zarr" / "notes").exists(), attempt
    fail(at, "a run that came too late")
    assert (dfx_attributes(at) or {})["status"] == "complete"


def test_an_interrupt_ends_at_once_and_the_same_command_goes_on(made_slide: Path, tmp_path: Path) -> None:
    line = [str(Path(sys.executable).parent / "dfx"), "extract", str(made_slide), "--encoder", "resnet18"]
    line += ["--weights", "random", "--resolution", "0.25", "--units", "mpp", "--patch", "224", "--mask", "none"]
    line += ["--out", str(tmp_path / "out"), "--batch-size", "8"]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as interrupted:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("out/made.zarr/features")) and time.monotonic() < deadline:
            time.sleep(0.05)
        interrupted.send_signal(signal.SIGINT)
        _, said = interrupted.communicate(timeout=120)
    assert interrupted.returncode == 130, said
    assert "the same command goes on from here" in said
    assert "Traceback" not in said


def test_masks_reach_workers_in_other_folders_whether_files_or_large_arrays(
    made_slide: Path, tmp_path: Path, nannies: distributed.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cv2

    half = np.zeros((4000, 4000), np.uint8)
    half[:, :2000] = 255
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("half.png", half)
    sizes = [
        extractor_of(nets.Means()).run([made_slide], masks=[mask], save_dir=f"out{n}", client=nannies, **ALL)
        for n, mask in enumerate(["half.png", half])
    ]
    assert len({len(features(got[made_slide])) for got in sizes}) == 1  # type: ignore[index]


# Accounts


def test_status_tells_complete_partial_failed_and_foreign(
    made_slide: Path, tmp_path: Path, client: distributed.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    from dfx.cli import main

    out = tmp_path / "out"
    others = [write_slide(tmp_path / f"{name}.svs", 640, 520, seed=3) for name in ("partial", "failed")]
    extractor_of(nets.Means()).run([made_slide, *others], save_dir=out, client=client, **ALL)
    assert main(["status", str(out)]) == 0
    assert "3 complete" in capsys.readouterr().out
    from dfx.store.layout import update

    update(out / "partial.zarr", status="running")
    (out / "partial.zarr" / "features" / "c" / "1" / "0").unlink()
    update(out / "failed.zarr", status="failed", failure="tile 3 is damaged")
    (out / "notes.txt").write_text("mine")
    zarr.create_group(str(out / "theirs.zarr"))
    assert main(["status", str(out)]) == 1
    said = capsys.readouterr().out
    assert "complete  made.zarr" in said
    assert "failed    failed.zarr  (100% of 6 blocks; tile 3 is damaged)" in said
    assert "partial   partial.zarr  (83% of 6 blocks)" in said
    assert "foreign   notes.txt" in said
    assert "foreign   theirs.zarr" in said
    assert main(["status", str(tmp_path / "nowhere")]) == 2


def test_the_client_opens_no_slide_of_a_run_on_other_processes(
    made_slide: Path, tmp_path: Path, nannies: distributed.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfx.slides.slide._reopened", lambda *args: pytest.fail("a slide was opened"))
    monkeypatch.setattr("dfx.run.item.open_slide", lambda *args, **kwargs: pytest.fail("a slide was opened"))
    got = extractor_of(nets.Means()).run([made_slide], save_dir=tmp_path / "out", client=nannies, **ALL)
    assert len(got) == 1


def test_counters_are_what_prometheus_reads(made_slide: Path, tmp_path: Path, client: distributed.Client) -> None:
    from dfx.counters import Counters

    counters = Counters()
    assert "dfx_slides_done_total 0\n" in counters.text()
    extractor_of(nets.Slow()).run(
        [made_slide, tmp_path / "missing.svs"],
        save_dir=tmp_path / "out",
        client=client,
        masks=[np.tile([[True, False, False, False]], (4, 1)), None],
        on_error="skip",
        notify=counters,
        **ALL,
    )
    patches = len(features(tmp_path / "out" / "made.zarr"))
    lines = dict(line.rsplit(" ", 1) for line in counters.text().splitlines() if not line.startswith("#"))
    assert lines["dfx_patches_done_total"] == lines["dfx_patches_planned_total"] == str(patches)
    assert (lines["dfx_slides_done_total"], lines["dfx_slides_failed_total"]) == ("1", "1")
    assert float(lines['dfx_stage_seconds_total{stage="read"}']) > 0
    assert float(lines['dfx_stage_seconds_total{stage="encode"}']) > 1  # 20 ms a patch
    assert float(lines['dfx_stage_seconds_total{stage="write"}']) > 0


def test_events_count_every_patch_once(made_slide: Path, tmp_path: Path, client: distributed.Client) -> None:
    events: list[Any] = []
    missing = tmp_path / "missing.svs"
    extractor_of(nets.Means()).run(
        [made_slide, missing], save_dir=tmp_path / "out", client=client, on_error="skip", notify=events.append, **ALL
    )
    (planned,) = (event for event in events if isinstance(event, run.Planned))
    assert planned.patches == sum(event.patches for event in events if isinstance(event, run.BlockDone))
    assert [event.item.address for event in events if isinstance(event, run.SlideDone)] == [str(made_slide)]
    (failed,) = (event for event in events if isinstance(event, run.SlideFailed))
    assert isinstance(failed.error, SlideError)
    again: list[Any] = []
    extractor_of(nets.Means()).run([made_slide], save_dir=tmp_path / "out", client=client, notify=again.append, **ALL)
    assert [type(event) for event in again] == [run.Planned, run.SlideDone, run.Timed]
    assert again[0].done == planned.patches


def test_what_dask_keeps_of_a_run_does_not_grow_with_its_slides(made_slide: Path, tmp_path: Path) -> None:
    links = [tmp_path / f"{n}.svs" for n in range(12)]
    for link in links:
        link.symlink_to(made_slide)
    few = np.zeros((8, 8), bool)
    few[2, 2] = True
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0") as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        extractor_of(nets.Means()).run(links, save_dir=tmp_path / "out", client=client, masks=[few] * 12, **ALL)
        spans = cluster.scheduler.extensions["spans"].spans.values()
        groups = sorted(group.name for span in spans for group in span.groups)
    assert groups == ["dfx-block", "dfx-close", "dfx-plan"]


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ({"on_bad_tile": "ignore"}, CallError),
        ({"block_timeout": 0}, CallError),
        ({"block_timeout": "1h"}, CallTypeError),
        ({"notify": "print"}, CallTypeError),
    ],
)
def test_a_bad_option_is_refused(
    args: dict[str, Any], error: type[Exception], made_slide: Path, tmp_path: Path
) -> None:
    with pytest.raises(error):
        extractor_of(nets.Means()).run([made_slide], save_dir=tmp_path / "out", **ALL | args)
    assert not (tmp_path / "out").exists()
