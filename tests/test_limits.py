"""Real limits: a control group's memory, small and read-only disks, permissions, clocks that are wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed
import nets
import numpy as np
import pytest
from test_runs import ALL, extractor_of, features

import dfx
from dfx import memory, run
from dfx.errors import RunError
from dfx.store import statuses

TESTS = Path(__file__).parent


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(line, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_fails_its_slides_and_with_room_they_are_resumed(
    made_slide: Path, small_disk: Path, client: distributed.Client
) -> None:
    class Wide(nets.Means):
        def forward(self, x: Any) -> Any:
            return super().forward(x).repeat(1, 64)

    wide = dfx.load_encoder(Wide())
    with pytest.raises(RunError, match=r"No space left|can't be written|can't be closed"):
        extractor_of(wide).run([made_slide], save_dir=small_disk / "out", client=client, **ALL)
    done = [status.done for status in statuses(small_disk / "out")]
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    events: list[Any] = []
    got = extractor_of(wide).run([made_slide], save_dir=small_disk / "out", client=client, notify=events.append, **ALL)
    assert features(got[made_slide]).shape[1] == 384  # type: ignore[index]
    (planned,) = (event for event in events if isinstance(event, run.Planned))
    assert planned.done >= min(done[0] * 16, planned.patches) > 0  # blocks that ran when the slide failed may end later


def test_an_output_that_becomes_read_only_fails_its_slides_and_they_are_resumed(
    made_slide: Path, small_disk: Path, client: distributed.Client
) -> None:
    def remount(how: str) -> bool:
        line = ["mount", "-o", f"remount,{how},size=16m", str(small_disk)]
        return subprocess.run(line, capture_output=True).returncode == 0

    def protect(event: Any) -> None:
        if isinstance(event, run.BlockDone):
            while not remount("ro"):  # as long as a block is being written
                pass

    given = ALL | {"save_dir": small_disk / "out", "client": client}
    with pytest.raises(RunError, match=r"made\.svs can't be written .*Read-only file system"):
        extractor_of(nets.Means()).run([made_slide], notify=protect, **given)
    with pytest.raises(dfx.StoreError, match=r"can't be written to: check its permissions"):
        extractor_of(nets.Means()).run([made_slide], **given)
    assert remount("rw")
    (before,) = statuses(small_disk / "out")
    assert before.state == "partial"  # nothing could be noted there
    got = extractor_of(nets.Means()).run([made_slide], **given)
    alone = extractor_of(nets.Means()).run([made_slide], **ALL | {"output_type": "dict"})
    assert np.array_equal(features(got[made_slide]), alone[made_slide]["features"])  # type: ignore[index]


def test_what_may_not_be_read_or_written_is_said_and_ends_nothing_else(made_slide: Path, tmp_path: Path) -> None:
    """Also where tests run as root, who may do everything until that is given up."""
    hidden = Path(shutil.copy(made_slide, tmp_path / "hidden.svs"))
    hidden.chmod(0)
    for name in ("closed", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "closed").chmod(0o555)
    plain = [] if os.geteuid() else ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--"]
    line = [*plain, sys.executable, "-m", "dfx", "extract", str(hidden), str(made_slide), "--quiet"]
    line += ["--encoder", "resnet18", "--weights", "random", "--resolution", "4", "--units", "mpp", "--patch", "64"]
    refused = subprocess.run([*line, "--out", tmp_path / "closed"], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"dfx: error: {tmp_path / 'closed'} can't be written to: check its permissions")
    done = subprocess.run([*line, "--out", tmp_path / "out"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "hidden.svs can't be opened: Permission denied" in done.stderr
    assert done.stdout.split() == [str(tmp_path / "out" / "made.zarr")]


def test_clocks_that_are_wrong_change_nothing(made_slide: Path, tmp_path: Path, client: distributed.Client) -> None:
    slide = Path(shutil.copy(made_slide, tmp_path / "made.svs"))
    given = ALL | {"save_dir": tmp_path / "out", "client": client}
    got = extractor_of(nets.Means()).run([slide], **given)
    right = features(got[slide])  # type: ignore[index]
    blocks = sorted((tmp_path / "out" / "made.zarr" / "features" / "c").iterdir())
    shutil.rmtree(blocks[3])
    for n, path in enumerate([slide, *(tmp_path / "out").rglob("*")]):
        os.utime(path, (0, 0) if n % 2 else (2**33, 2**33))  # 1970 and 2242
    events: list[Any] = []
    extractor_of(nets.Means()).run([slide], notify=events.append, **given)
    assert sum(isinstance(event, run.BlockDone) for event in events) == 1
    assert np.array_equal(features(tmp_path / "out" / "made.zarr"), right)


# Memory


def test_the_limits_of_a_container_and_of_a_batch_job_count_and_cached_files_do_not(tmp_path: Path) -> None:
    own = tmp_path / "own"
    assert list(memory.cgroups(tmp_path, own)) == []
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 300\n")
    assert list(memory.cgroups(tmp_path, own)) == []
    (tmp_path / "memory.max").write_text("1000\n")
    assert list(memory.cgroups(tmp_path, own)) == [(1000, 400)]
    job = tmp_path / "slurm" / "job_1"
    job.mkdir(parents=True)
    own.write_text("0::/slurm/job_1\n")
    for name, value in (("max", "500"), ("current", "200"), ("stat", "inactive_file 50")):
        (job / f"memory.{name}").write_text(value)
    assert list(memory.cgroups(tmp_path, own)) == [(1000, 400), (500, 150)]
    old = tmp_path / "memory" / "docker" / "a"
    old.mkdir(parents=True)
    own.write_text("7:blkio:/\n4:cpu,memory:/docker/a\n")
    for name, value in (("limit_in_bytes", "90"), ("usage_in_bytes", "80"), ("stat", "total_inactive_file 5")):
        (old / f"memory.{name}").write_text(value)
    assert list(memory.cgroups(tmp_path, own)) == [(1000, 400), (90, 75)]


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A control group whose processes may take 900 MiB together."""
    name, root = f"dfx-test-{uuid.uuid4().hex}", memory.CGROUP
    for folder, limit in ((root / "memory" / name, "memory.limit_in_bytes"), (root / name, "memory.max")):
        try:
            folder.mkdir()
            (folder / limit).write_text(str(900 * 2**20))
        except OSError:
            continue
        yield folder
        folder.rmdir()
        return
    pytest.skip("a control group with a memory limit needs root and a writable /sys/fs/cgroup")


def test_dict_results_larger_than_memory_are_lazy_over_a_cache_that_goes(
    made_slide: Path, small_memory: Path, tmp_path: Path
) -> None:
    code = """
import sys
sys.path.insert(0, sys.argv[3])
import nets, dfx, numpy as np, dask.array as da, torch
from conftest import WSI
from pathlib import Path
class Wide(nets.Means):
    def forward(self, x):
        return super().forward(x).repeat(1, 50_000)
slide = sys.argv[1]
run = dict(WSI, auto_get_mask=False, output_type="dict", block_size=16)
extractor = dfx.DeepFeatureExtractor(Wide(), batch_size=8, verbose=False, num_workers=1)
result = extractor.run([slide], **run)
features = result[slide]["features"]
assert isinstance(features, da.Array), type(features)
assert features.nbytes > 600e6, features.nbytes
sums = features.sum(axis=1).compute(scheduler="sync")
small = dfx.DeepFeatureExtractor(nets.Means(), verbose=False).run([slide], **run)[slide]["features"]
assert isinstance(small, np.ndarray), type(small)
assert np.allclose(sums / 50_000, small.sum(axis=1), rtol=1e-4)
print(result.cache)
"""
    enter = f'echo $$ > {small_memory}/cgroup.procs && exec "$@"'
    line = ["sh", "-c", enter, "sh", sys.executable, "-c", code, str(made_slide), str(tmp_path / "out"), str(TESTS)]
    done = subprocess.run(
        line, capture_output=True, text=True, timeout=240, env=os.environ | {"TMPDIR": str(tmp_path)}, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(tmp_path / "dfx-"))
    assert [path.name for path in tmp_path.iterdir() if path.name != "dask-scratch-space"] == []  # Dask's own
