"""Hosts that are cut off, slow or lost: workers in network namespaces of their own, a supervisor on each."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import nets
import numpy as np
import pytest
import zarr
from clusters import PATHS
from conftest import WSI

import dfx
from dfx.slides.synthetic import write_slide
from dfx.store import statuses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
HUB, HOSTS = "10.79.0.1", {"a": "10.79.0.2", "b": "10.79.0.3"}
SCHEDULER = f"tcp://{HUB}:8786"
OPTIONS = WSI | {"auto_get_mask": False, "block_size": 8}
# What deploy/base/settings.yaml sets, but that a host which is cut off is given up after 8 seconds.
SETTINGS = {"DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "8s", "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "30s"}
DRIVER = """
import sys
import dfx, nets
from test_network import OPTIONS

with dfx.cluster.connect(sys.argv[1], wait=120, workers=True) as client:
    extractor = dfx.DeepFeatureExtractor(nets.Slow(), batch_size=8, verbose=False)
    extractor.run(sys.argv[3:], save_dir=sys.argv[2], client=client, block_timeout=120, **OPTIONS)
"""


def ip(line: str) -> None:
    done = subprocess.run(["ip", *shlex.split(line)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"ip {line}: {done.stderr}"


class Network:
    """A hub and hosts a and b: namespaces whose cables end in a bridge of the hub."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []
        self.name = f"dfx{os.getpid()}"
        for place in ("hub", *HOSTS):
            ip(f"netns add {self.name}{place}")
            stack.callback(ip, f"netns del {self.name}{place}")
            ip(f"-n {self.name}{place} link set dev lo up")
        stack.callback(self.end)
        hub = f"{self.name}hub"
        ip(f"-n {hub} link add name bridge type bridge")
        ip(f"-n {hub} addr add {HUB}/24 dev bridge")
        ip(f"-n {hub} link set dev bridge up")
        for host, address in HOSTS.items():
            ip(f"link add name {host} netns {hub} type veth peer name eth netns {self.name}{host}")
            ip(f"-n {hub} link set dev {host} master bridge up")
            ip(f"-n {self.name}{host} addr add {address}/24 dev eth")
            ip(f"-n {self.name}{host} link set dev eth up")

    def pids(self, place: str) -> list[int]:
        done = subprocess.run(
            ["ip", "netns", "pids", f"{self.name}{place}"], check=True, capture_output=True, text=True
        )
        return [int(pid) for pid in done.stdout.split()]

    def kill(self, place: str, but: tuple[int, ...] = ()) -> int:
        """Kill what runs in a namespace, and give how many those were."""
        found = [pid for pid in self.pids(place) if pid not in but]
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return len(found)

    def start(self, place: str, *line: object) -> subprocess.Popen[str]:
        with (self.folder / f"{place}.log").open("a") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", f"{self.name}{place}", *map(str, line)],
                env=os.environ | SETTINGS | {"PYTHONPATH": PATHS},
                stdout=log,
                stderr=log,
                text=True,
            )
        self.started.append(process)
        return process

    def end(self) -> None:
        for place in ("hub", *HOSTS):
            while self.kill(place):  # what was being started as the others were killed
                time.sleep(0.1)
        for process in self.started:
            process.wait()

    def supervise(self, host: str) -> subprocess.Popen[str]:
        """Run a worker, again whenever it ends, as systemd or kubelet do."""
        worker = [sys.executable, "-m", "dask", "worker", SCHEDULER, "--nthreads", "1", "--death-timeout", "60"]
        worker += ["--host", HOSTS[host], "--no-dashboard", "--local-directory", str(self.folder / host)]
        return self.start(host, "bash", "-c", f"while :; do {shlex.join(worker)}; sleep 1; done")

    def cut(self, host: str) -> None:
        ip(f"-n {self.name}hub link set dev {host} down")

    def mend(self, host: str) -> None:
        ip(f"-n {self.name}hub link set dev {host} up")

    def cap(self, host: str) -> None:
        for place, device in (("hub", host), (host, "eth")):
            line = f"-n {self.name}{place} qdisc add dev {device} root tbf rate 1mbit burst 16kb latency 400ms"
            subprocess.run(["tc", *shlex.split(line)], check=True, capture_output=True, text=True)

    def logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in self.folder.glob("*.log"))


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"):
        pytest.skip("network namespaces need root, ip and tc")
    try:
        subprocess.run(["unshare", "--net", "true"], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as e:
        pytest.skip(f"no network namespaces here: {e.stderr.strip()}")
    with ExitStack() as stack:
        yield Network(stack, tmp_path)


def until(done: Callable[[], object], driver: subprocess.Popen[str], network: Network, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert driver.poll() is None, network.logs()
        assert time.monotonic() < end, network.logs()
        time.sleep(0.1)


def test_hosts_that_are_slow_cut_off_and_lost_change_no_feature(network: Network, tmp_path: Path) -> None:
    slides = [write_slide(tmp_path / f"s{n}.svs", 2200, 1700, seed=n) for n in range(3)]
    calm = dfx.DeepFeatureExtractor(nets.Means(), batch_size=8, verbose=False).run(
        slides, save_dir=tmp_path / "calm", **OPTIONS
    )
    assert isinstance(calm, dict)
    out = tmp_path / "out"

    def written() -> int:
        return sum(1 for path in out.glob("*.zarr/features/c/*/0"))

    network.start("hub", sys.executable, "-m", "dask", "scheduler", "--host", HUB, "--port", 8786, "--no-dashboard")
    supervisors = {host: network.supervise(host) for host in HOSTS}
    driver = network.start("hub", sys.executable, "-c", DRIVER, SCHEDULER, out, *slides)
    until(lambda: written() >= 5, driver, network)
    network.cap("a")
    so_far = written()
    until(lambda: written() >= so_far + 5, driver, network)
    network.cut("b")
    so_far = written()
    until(lambda: written() >= so_far + 5, driver, network)  # a alone goes on, though slow
    time.sleep(10)  # beyond what a host may be silent
    assert driver.poll() is None, network.logs()
    network.mend("b")
    assert network.kill("a", but=(supervisors["a"].pid,)) >= 2  # a nanny and its worker
    assert driver.wait(600) == 0, network.logs()
    assert {status.state for status in statuses(out)} == {"complete"}
    for slide in slides:
        got = zarr.open_array(str(out / f"{slide.stem}.zarr"), path="features", mode="r")[:]
        wanted = zarr.open_array(str(calm[slide]), path="features", mode="r")[:]
        assert np.array_equal(got, wanted)
