"""Chaos: workers and clients are killed at random, slides are rotten, and every store comes out right or says why."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import distributed
import nets
import numpy as np
import psutil
import pytest
import zarr
from conftest import WSI
from distributed.core import Status
from test_runs import damage, features

import dfx
from dfx import cluster
from dfx.slides.synthetic import write_slide
from dfx.store import statuses

SLIDES, ROTTEN = 30, 10
OPTIONS = WSI | {"auto_get_mask": False, "block_size": 16, "on_error": "skip"}
CLIENT = """
import sys
sys.path.insert(0, sys.argv[1])
import distributed, dfx, nets
from test_chaos import OPTIONS

with distributed.Client(sys.argv[2]) as client:
    extractor = dfx.DeepFeatureExtractor(nets.Slow(), batch_size=8, verbose=False)
    extractor.run(sys.argv[4:], save_dir=sys.argv[3], client=client, block_timeout=120, **OPTIONS)
"""


def make_slides(folder: Path) -> tuple[list[Path], list[Path]]:
    """Sound slides and rotten ones: cut off, of damaged tiles, no slides at all, or gone."""
    sound = [write_slide(folder / f"s{n}.svs", 400 + 40 * (n % 5), 330, seed=n) for n in range(SLIDES - ROTTEN)]
    rotten = []
    for n in range(ROTTEN):
        path = folder / f"r{n}.svs"
        if n % 4 == 0:
            path.write_bytes(sound[n].read_bytes()[:9000])
        elif n % 4 == 1:
            damage(sound[n], n % 3, path)
        elif n % 4 == 2:
            path.write_text("not a slide")
        rotten.append(path)
    return sound, rotten


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [int(n) for n in os.environ.get("DFX_CHAOS", "1").split(",")])
def test_whatever_is_killed_every_store_is_the_undisturbed_one_or_says_why_not(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    sound, rotten = make_slides(tmp_path)
    out, here = tmp_path / "out", str(Path(__file__).parent)
    calm = dfx.DeepFeatureExtractor(nets.Means(), batch_size=8, verbose=False).run(
        sound, save_dir=tmp_path / "calm", **OPTIONS
    )
    assert isinstance(calm, dict)
    assert len(calm) == len(sound)
    with cluster.local(gpus=0, n_workers=3, threads=1) as made:
        stop, kills, began = threading.Event(), [0], time.monotonic()
        with distributed.Client(made, set_as_default=False) as client:
            dfx.DeepFeatureExtractor(nets.Slow(), batch_size=8, verbose=False).run(
                sound[:1], save_dir=tmp_path / "first", client=client, **OPTIONS
            )
        # A worker that is killed sooner than it can start and plan makes nothing, on a busy machine for ever.
        pace = max(1.0, (time.monotonic() - began) / 5)

        def kill() -> None:
            while not stop.wait(pace * rng.uniform(2, 4)):
                # A nanny whose worker dies as it starts gives up, and nothing would be left to kill.
                up = [n for n in made.workers.values() if n.process and n.process.status == Status.running]
                pid = rng.choice(up).pid if up else None
                if pid and psutil.pid_exists(pid):
                    os.kill(pid, signal.SIGKILL)
                    kills[0] += 1

        killer = threading.Thread(target=kill)
        killer.start()
        line = [sys.executable, "-c", CLIENT, here, made.scheduler_address, str(out), *map(str, sound + rotten)]
        try:
            for life in (pace * rng.uniform(8, 14), pace * rng.uniform(8, 14), None):
                with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as run:
                    if life is None:
                        _, said = run.communicate(timeout=900)
                        assert run.returncode == 0, said[-3000:]
                    else:
                        time.sleep(life)
                        run.kill()
                        run.communicate()
        finally:
            stop.set()
            killer.join()
    assert kills[0] >= 5
    found = {status.path.stem: status for status in statuses(out)}
    for path in sound:
        status = found.pop(path.stem)
        if status.state == "failed":  # two of the random kills met the same block while it ran alone
            assert "killed 2 workers" in status.reason or "cluster" in status.reason
            continue
        assert status.state == "complete"
        assert np.array_equal(features(status.path), features(calm[path]))
        assert not (Path(status.path) / "notes").exists()  # a failed store keeps those of its blocks
        group = zarr.open_group(str(status.path), mode="r")
        assert sorted(group.array_keys()) == ["coordinates", "features"]  # without a mask
    rotten_names = {path.stem for path in rotten}
    for name, status in found.items():  # those that were rotten after they were planned
        assert name in rotten_names
        assert status.state == "failed"
        assert status.reason
    # What a kill met while it was made lies hidden, and is swept up by the next run when it is an hour old.
    for part in out.glob(".*.partial"):
        os.utime(part, (0, 0))
    last = shutil.copy(sound[0], tmp_path / "last.svs")
    dfx.DeepFeatureExtractor(nets.Means(), batch_size=8, verbose=False).run([last], save_dir=out, **OPTIONS)
    assert [p for p in out.rglob("*") if p.suffix == ".partial"] == []
