"""Runs on clusters that don't fit, that need certificates, that go away and come back."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import distributed
import nets
import numpy as np
import pytest
from clusters import WORKER, dask, free_port, scheduler
from conftest import WSI
from test_runs import features

import dfx
from dfx import cluster
from dfx.errors import CallError, ClusterLost

SLOW = WSI | {"auto_get_mask": False, "block_size": 16}
QUICK = ["--encoder", "resnet18", "--weights", "random", "--quiet", "--mask", "none"]
QUICK += ["--resolution", "4", "--units", "mpp", "--patch", "64"]
MANY = ["--encoder", "test_resnet", "--weights", "random", "--quiet", "--mask", "none"]
MANY += ["--resolution", "0.25", "--units", "mpp", "--patch", "64", "--stride", "40"]


def command(*args: object, **options: Any) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "dfx", *map(str, args)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    with process:
        try:
            _, said = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return process.returncode, said


def until(happened: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A scheduler and one worker that fits, as processes."""
    with scheduler(tmp_path) as address, dask("worker", address, *WORKER):
        yield address


@pytest.fixture
def remote(address: str) -> Iterator[distributed.Client]:
    with distributed.Client(address, set_as_default=False) as client:
        until(lambda: client.scheduler_info(n_workers=-1)["workers"])
        yield client


def other_versions(folder: Path) -> dict[str, str]:
    """An environment whose torch and dfx say that they are of other versions."""
    for name in ("torch-0.1.dist-info", "dfx-9.9.dist-info"):
        (folder / "other" / name).mkdir(parents=True)
        project, version = name.removesuffix(".dist-info").split("-")
        (folder / "other" / name / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n"
        )
    return {"PYTHONPATH": os.pathsep.join([str(folder / "other"), os.environ.get("PYTHONPATH", "")])}


# Clusters that don't fit


def test_workers_of_other_versions_are_refused_by_name_and_when_they_come_late_they_do_not_join(
    made_slide: Path, tmp_path: Path, remote: distributed.Client, address: str
) -> None:
    env, log = other_versions(tmp_path), tmp_path / "late.log"
    extractor = dfx.DeepFeatureExtractor(nets.Slow(), batch_size=8, verbose=False)
    with ExitStack() as late:

        def start(event: Any) -> None:
            if isinstance(event, dfx.run.BlockDone) and not log.exists():
                log.touch()
                late.enter_context(dask("worker", address, *WORKER, "--name", "late", env=env, log=log))

        got = extractor.run([made_slide], save_dir=tmp_path / "out", client=remote, notify=start, **SLOW)
        assert len(features(got[made_slide])) > 100  # type: ignore[index]
        until(lambda: "differ from the run's client" in log.read_text())
        assert "dfx 9.9 (here" in log.read_text()
        until(lambda: "End worker" in log.read_text())
        assert len(remote.scheduler_info(n_workers=-1)["workers"]) == 1

    with dask("worker", address, *WORKER, "--name", "other", env=env):
        remote.wait_for_workers(2, timeout=60)
        workers = remote.scheduler_info(n_workers=-1)["workers"]
        (bad,) = (address for address, said in workers.items() if said["name"] == "other")
        with pytest.raises(CallError, match=rf"differ .*\({bad}: dfx 9\.9 \(here .*torch 0\.1 \(here [^;]*\): use one"):
            extractor.run([made_slide], save_dir=tmp_path / "not", client=remote, **SLOW)
        with pytest.raises(CallError, match=r"torch 0\.1"):
            extractor.run(np.zeros((4, 8, 8, 3), np.uint8), client=remote)
    assert not (tmp_path / "not").exists()


def test_a_worker_without_the_device_that_was_asked_for_is_an_error_that_names_it(
    made_slide: Path, tmp_path: Path, remote: distributed.Client, address: str
) -> None:
    extractor = dfx.DeepFeatureExtractor(nets.Means(), verbose=False)
    (plain,) = remote.scheduler_info(n_workers=-1)["workers"]
    with pytest.raises(CallError, match=rf"{plain}: device 'cuda' is not here"):
        extractor.run([made_slide], save_dir=tmp_path / "out", client=remote, device="cuda", **SLOW)
    (tmp_path / "gpu.py").write_text("import torch\ntorch.cuda.is_available = lambda: True\n")
    with dask("worker", address, *WORKER, "--preload", tmp_path / "gpu.py"):
        remote.wait_for_workers(2, timeout=60)
        with pytest.raises(CallError, match=rf"no device in common \(.*{plain}: cpu.*device='cpu'"):
            extractor.run([made_slide], save_dir=tmp_path / "out", client=remote, **SLOW)
    assert not (tmp_path / "out").exists()


def test_the_embedded_cluster_lacks_devices_too(made_slide: Path, tmp_path: Path) -> None:
    extractor = dfx.DeepFeatureExtractor(nets.Means(), verbose=False, device="cuda:7")
    with pytest.raises(CallError, match="this process: device 'cuda:7' is not here"):
        extractor.run([made_slide], save_dir=tmp_path / "out", **SLOW)
    assert not (tmp_path / "out").exists()


# TLS


def certificates(folder: Path) -> dict[str, Path]:
    """A certificate that signs itself, for all of a cluster."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "dask")])
    now = datetime.now(UTC)
    cert = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir()
    files = {"ca": folder / "cert.pem", "cert": folder / "cert.pem", "key": folder / "key.pem"}
    files["cert"].write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    files["key"].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


@pytest.mark.slow
def test_a_tls_cluster_is_reached_with_its_certificates_and_in_no_other_way(made_slide: Path, tmp_path: Path) -> None:
    ours, theirs = certificates(tmp_path / "ours"), certificates(tmp_path / "theirs")
    tls = [part for name, path in ours.items() for part in (f"--tls-{name}", str(path))]
    flags = [
        part
        for name, path in ours.items()
        for part in (f"--tls-{name}-file".replace("key-file", "key").replace("cert-file", "cert"), str(path))
    ]
    line = ["extract", made_slide, *QUICK, "--out", tmp_path / "out", "--wait", 60]
    with (
        scheduler(tmp_path, "--protocol", "tls", *flags) as address,
        dask("worker", address, *flags, *WORKER),
    ):
        assert address.startswith("tls://")
        assert ended(command(*line, "--scheduler", address, *tls)) == (0, "")
        assert dfx.open_features(tmp_path / "out" / "made.zarr").attrs["status"] == "complete"
        with pytest.raises(CallError, match="needs certificates"):
            cluster.connect(address)
        with pytest.raises(ClusterLost):
            cluster.connect(address, security=cluster.security_of(**theirs), wait=3)
        with pytest.raises(CallError, match=r"--tls-key .* is not a file"):
            cluster.security_of(ours["ca"], ours["cert"], tmp_path / "gone.pem")
        env = {
            "DASK_DISTRIBUTED__COMM__TLS__CA_FILE": str(ours["ca"]),
            "DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT": str(ours["cert"]),
            "DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY": str(ours["key"]),
        }
        assert ended(command(*line, "--scheduler", address, env=os.environ | env))[0] == 0
    assert ended(command(*line, "--scheduler", "tcp://127.0.0.1:1", *tls))[0] == 2


# Clusters that go away


@pytest.mark.parametrize("there", ["nothing", "no workers"])
def test_what_may_work_later_says_try_again(there: str, made_slide: Path, tmp_path: Path) -> None:
    line = ["extract", made_slide, *QUICK, "--out", tmp_path / "out", "--wait", 2]
    with ExitStack() as stack:
        address = f"tcp://127.0.0.1:{free_port()}"
        if there == "no workers":
            address = stack.enter_context(scheduler(tmp_path))
        code, said = ended(command(*line, "--scheduler", address))
    assert code == 3
    assert said.count("\n") == 1
    assert address in said


def test_counters_are_served_while_a_run_goes_on(made_slide: Path, tmp_path: Path) -> None:
    port = free_port()
    run = command("extract", made_slide, *MANY, "--out", tmp_path / "out", "--metrics-port", port)
    scraped: list[str] = []

    def counted() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
                scraped.append(answer.read().decode())
        except OSError:
            return False
        return 'dfx_stage_seconds_total{stage="encode"}' in scraped[-1]

    until(counted)
    lines = dict(line.rsplit(" ", 1) for line in scraped[-1].splitlines() if not line.startswith("#"))
    assert int(lines["dfx_patches_done_total"]) > 0
    assert lines["dfx_slides_planned_total"] == "1"
    assert run.poll() is None
    run.send_signal(signal.SIGINT)
    assert ended(run)[0] == 130


def test_a_port_of_another_s_is_refused(made_slide: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        line = ["extract", made_slide, *QUICK, "--out", tmp_path / "out", "--metrics-port", taken.getsockname()[1]]
        code, said = ended(command(*line))
    assert code == 2
    assert "--metrics-port" in said


# Retiring


def test_what_a_retired_worker_held_is_not_computed_again(tmp_path: Path) -> None:
    routes = [*distributed.scheduler.dask.config.get("distributed.scheduler.http.routes"), cluster.pods.API]
    env = {"DASK_DISTRIBUTED__SCHEDULER__HTTP__ROUTES": str(routes)}
    log = tmp_path / "log"
    with scheduler(tmp_path, env=env) as address, ExitStack() as stack:
        for name in ("group-worker-1", "group-worker-10"):
            stack.enter_context(dask("worker", address, *WORKER, "--name", name))
        with distributed.Client(address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)

            def noted(n: int) -> int:
                with log.open("a") as file:
                    file.write(f"{n}\n")
                return n * n

            results = client.map(noted, range(20))
            with client.as_current():
                distributed.wait(results)
            held = client.has_what()
            assert all(held.values())
            pod = {"DASK_SCHEDULER_ADDRESS": address, "DASK_WORKER_NAME": "group-worker-1"}
            hook = [shutil.which("dfx") or "dfx", "worker-retire", "--timeout", "60"]
            done = subprocess.run(hook, env=os.environ | pod, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            gone = done.stdout.split()
            assert len(gone) == 1
            assert set(client.scheduler_info(n_workers=-1)["workers"]) == set(held) - set(gone)
            assert client.gather(results) == [n * n for n in range(20)]
            assert sorted(map(int, log.read_text().split())) == list(range(20))  # each once

            again = subprocess.run(hook, env=os.environ | pod, capture_output=True, text=True, timeout=120)
            assert (again.returncode, again.stdout) == (0, "")  # there is none of that name any more
            last = pod | {"DASK_WORKER_NAME": "group-worker-10"}
            kept = subprocess.run(hook, env=os.environ | last, capture_output=True, text=True, timeout=120)
            assert kept.returncode == 3
            assert "no other worker takes what it holds" in kept.stderr
            assert client.gather(results) == [n * n for n in range(20)]


def test_a_worker_that_is_not_known_is_not_retired(monkeypatch: pytest.MonkeyPatch) -> None:
    from dfx import cli

    monkeypatch.delenv("DASK_WORKER_NAME", raising=False)
    assert cli.main(["worker-retire", "--scheduler", "tcp://127.0.0.1:1"]) == 2
    monkeypatch.setenv("DASK_WORKER_NAME", "x")
    assert cli.main(["worker-retire", "--scheduler", f"tcp://127.0.0.1:{free_port()}", "--timeout", "1"]) == 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_scheduler_that_dies_and_comes_back_is_found_again_and_the_run_is_the_undisturbed_one(
    made_slide: Path, tmp_path: Path
) -> None:
    port, out = free_port(), tmp_path / "out"
    line = ["extract", made_slide, *MANY, "--out", out, "--wait", 120, "--scheduler", f"tcp://127.0.0.1:{port}"]
    driver = command(*line)  # before there is any scheduler
    with scheduler(tmp_path, port=port) as address, dask("worker", address, *WORKER):
        until(lambda: list(out.glob("made.zarr/features/c/*/0")))
        (pid,) = (p for p in pids_listening(port))
        os.kill(pid, signal.SIGKILL)
    assert driver.poll() is None
    with scheduler(tmp_path, port=port) as address, dask("worker", address, *WORKER):
        code, said = ended(driver)
        assert (code, "Waiting for the cluster to come back" in said) == (0, True), said
        calm = ["extract", made_slide, *MANY, "--out", tmp_path / "calm", "--scheduler", address]
        assert ended(command(*calm)) == (0, "")
    assert np.array_equal(features(out / "made.zarr"), features(tmp_path / "calm" / "made.zarr"))


def pids_listening(port: int) -> set[int]:
    import psutil

    return {c.pid for c in psutil.net_connections("inet") if c.laddr and c.laddr.port == port and c.status == "LISTEN"}


def test_sigterm_ends_a_run_in_order_and_says_try_again(made_slide: Path, tmp_path: Path) -> None:
    line = ["extract", made_slide, *MANY, "--out", tmp_path / "out"]
    run = command(*line)
    until(lambda: list(tmp_path.glob("out/made.zarr/features/c/*/0")))
    run.send_signal(signal.SIGTERM)
    code, said = ended(run)
    assert (code, "terminated; the same command goes on" in said, "Traceback" in said) == (3, True, False), said
