"""Workers own a GPU each, a cluster fits a run or is refused, and retiring loses nothing.

There is no GPU here: GPUs are names, and what is shown is which of them a worker process is given.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import distributed
import psutil
import pytest
from clusters import dask, scheduler
from dask import config as dask_config

from dfx import cluster, pin
from dfx.errors import CallError, CallTypeError

UUIDS = ["GPU-8f6f7b1c-0000-0000-0000-000000000001", "MIG-8f6f7b1c-0000-0000-0000-000000000002"]


def pins(client: distributed.Client) -> dict[str, str | None]:
    return client.run(lambda: os.environ.get("CUDA_VISIBLE_DEVICES"))  # type: ignore[no-any-return]


# Pins


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("0,1", ["0", "1"]),
        (" 3 , 5 ", ["3", "5"]),
        (",".join(UUIDS), UUIDS),
        ("0,0,1", ["0", "1"]),
        ("2,-1,3", ["2"]),
        ("", []),
        ("NoDevFiles", []),
    ],
)
def test_the_gpus_of_a_process_are_those_that_cuda_would_see(value: str, names: list[str]) -> None:
    assert pin.visible({"CUDA_VISIBLE_DEVICES": value}) == names


def test_a_divided_gpu_is_used_by_its_parts() -> None:
    listed = (
        "GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-a)\n"
        "  MIG 3g.20gb     Device  0: (UUID: MIG-b)\n"
        "  MIG 3g.20gb     Device  1: (UUID: MIG-GPU-a/1/0)\n"
        "GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-c)\n"
    )
    assert pin.parse_list(listed) == ["MIG-b", "MIG-GPU-a/1/0", "GPU-c"]


def test_a_gpu_is_one_process_s_and_free_again_when_it_dies(tmp_path: Path) -> None:
    holder = "import sys, time, pathlib; from dfx import pin; held = pin.claim(['a'], pathlib.Path(sys.argv[1]))\n"
    with subprocess.Popen(
        [sys.executable, "-c", f"{holder}print(held[0], flush=True); time.sleep(600)", str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "a\n"
        name, lock = pin.claim(["a", "b"], tmp_path)
        assert name == "b"
        with pytest.raises(CallError, match=rf"no GPU is left .*a by process {other.pid}, b by process {os.getpid()}"):
            pin.claim(["a", "b"], tmp_path)
        other.kill()
        other.wait()
    again = pin.claim(["a", "b"], tmp_path)
    assert again[0] == "a"
    for held in (lock, again[1]):
        held.close()


def test_a_folder_of_locks_that_is_another_s_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"dfx-pin-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CallError, match="not this user's own folder"):
        pin.lock_folder()


def test_nannies_of_one_and_of_several_processes_share_no_gpu_and_one_too_many_says_so(tmp_path: Path) -> None:
    env = {"CUDA_VISIBLE_DEVICES": ",".join(["0", *UUIDS]), "XDG_RUNTIME_DIR": str(tmp_path)}
    line = ("--nthreads", 1, "--no-dashboard", "--host", "127.0.0.1", "--preload-nanny", "dfx.pin")
    log = tmp_path / "third.log"
    with ExitStack() as running:
        address = running.enter_context(scheduler(tmp_path))
        running.enter_context(dask("worker", address, "--nworkers", 2, *line, env=env))
        running.enter_context(dask("worker", address, *line, env=env))
        with distributed.Client(address, set_as_default=False) as client:
            client.wait_for_workers(3, timeout=60)
            before = pins(client)
            assert sorted(map(str, before.values())) == sorted(["0", *UUIDS])
            third = running.enter_context(dask("worker", address, *line, env=env, log=log))
            assert third.wait(timeout=60) != 0
            assert "no GPU is left for this worker" in log.read_text()
            assert len(pins(client)) == 3

            client.restart()  # every nanny starts its worker anew
            client.wait_for_workers(3, timeout=60)
            assert sorted(map(str, pins(client).values())) == sorted(["0", *UUIDS])


def test_a_pin_that_is_there_is_left_and_a_nanny_that_ends_gives_its_gpu_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    options = {"nthreads": 1, "host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "preload_nanny": ["dfx.pin"]}
    given = {"cls": distributed.Nanny, "options": options | {"env": {"CUDA_VISIBLE_DEVICES": "4,5"}}}
    chosen = {"cls": distributed.Nanny, "options": options}
    scheduler = {"cls": distributed.Scheduler, "options": {"dashboard_address": "127.0.0.1:0", "port": 0}}
    for _ in range(2):  # the second time it is free again
        with (
            distributed.SpecCluster({"a": given, "b": chosen}, scheduler) as made,
            distributed.Client(made, set_as_default=False) as client,
        ):
            client.wait_for_workers(2, timeout=60)
            assert sorted(map(str, pins(client).values())) == ["4,5", "7"]


# The cluster of this machine


def test_a_local_cluster_has_a_process_a_gpu_which_comes_back_and_listens_on_loopback_only() -> None:
    def listening() -> dict[Any, int]:
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        return {c.laddr: p.pid for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}

    already = listening()
    with (
        dask_config.set({"distributed.deploy.lost-worker-timeout": "1 ms"}),  # a worker is never back that soon
        cluster.local(gpus=[*UUIDS], threads_per_gpu=3, memory_limit="1 GiB") as made,
        distributed.Client(made, set_as_default=False) as client,
    ):
        client.wait_for_workers(2, timeout=60)
        assert sorted(map(str, pins(client).values())) == sorted(UUIDS)
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        assert [(w["nthreads"], w["memory_limit"]) for w in workers] == [(3, 2**30)] * 2
        new = listening().keys() - already.keys()
        assert len(new) >= 5  # scheduler, two nannies, two workers
        assert {address.ip for address in new} == {"127.0.0.1"}
        pids = client.run(os.getpid)
        before = pins(client)
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while len(now := client.run(os.getpid, on_error="ignore")) < 2 or set(now.values()) & set(pids.values()):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert sorted(map(str, pins(client).values())) == sorted(map(str, before.values()))


def test_without_gpus_cores_and_memory_are_shared_fairly(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(cluster.machine, "_Nannied", lambda workers, **options: made.append((workers, options)))
    monkeypatch.setattr(cluster.machine, "CPU_COUNT", 20)
    monkeypatch.setattr(cluster.machine, "MEMORY_LIMIT", 100 * 2**30)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")

    def shares(**options: Any) -> tuple[int, int, float]:
        cluster.local(**options)
        workers = made.pop()[0].values()
        (options,) = {(w["options"]["nthreads"], w["options"]["memory_limit"]) for w in workers}
        return len(workers), options[0], options[1] / 2**30

    assert shares(gpus=0) == (3, 6, 30)
    assert shares(gpus=0, n_workers=2) == (2, 10, 45)
    assert shares(gpus=0, threads=4) == (5, 4, 18)
    assert shares() == (4, 5, 22.5)
    assert shares(gpus=2, memory_limit="4 GiB") == (2, 8, 4)
    assert shares(gpus=[3], threads_per_gpu=2) == (1, 2, 90)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"gpus": 3}, CallError),
        ({"gpus": -1}, CallError),
        ({"gpus": ["0", "0"]}, CallError),
        ({"gpus": "0,1"}, CallTypeError),
        ({"gpus": 2, "n_workers": 2}, CallError),
        ({"gpus": 0, "threads": 0}, CallError),
        ({"threads_per_gpu": True}, CallError),
    ],
)
def test_a_local_cluster_that_can_not_be_is_refused(
    options: dict[str, Any], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(error):
        cluster.local(**options)


@pytest.mark.parametrize(("gpus", "device", "several"), [("0,1", "auto", 2), ("0,1", "cuda:1", 0), ("0", "auto", 0)])
def test_the_command_line_uses_a_process_a_gpu_where_there_are_several(
    gpus: str, device: str, several: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    with cluster.on_this_machine(device) as client:
        assert (0 if client is None else len(pins(client))) == several
