from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import pytest
from clusters import free_port, until
from nets import Means
from numpy.typing import NDArray

import dfx
from dfx.slides.cache import TILES
from dfx.slides.synthetic import write_slide

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/; last, so that the installed dfx is what is tested

DATA = Path(os.environ.get("DFX_TEST_DATA", Path(__file__).parents[2] / "shared")).absolute()


WSI: dict[str, Any] = {
    "patch_mode": False,
    "patch_input_shape": (64, 64),
    "input_resolutions": [{"resolution": 0.5, "units": "mpp"}],
    "output_type": "zarr",
}


def pytest_configure() -> None:
    # A shell that starts them in the background has the tests, and what they start, ignore interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def extractor() -> dfx.DeepFeatureExtractor:
    return dfx.DeepFeatureExtractor(Means(), verbose=False)


@pytest.fixture(autouse=True)
def _no_tiles_of_other_tests() -> None:
    TILES.clear()


@pytest.fixture(scope="session")
def made_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SVS of 1600 x 1300 pixels, 0.5 mpp, 20x, levels 1, 4 and 16."""
    return write_slide(tmp_path_factory.mktemp("slide") / "made.svs", 1600, 1300)


@pytest.fixture(scope="session")
def made_pixels(made_slide: Path) -> NDArray[np.uint8]:
    """Its baseline, decoded by tifffile alone."""
    import tifffile

    with tifffile.TiffFile(made_slide) as tif:
        return np.asarray(tif.pages[0].asarray())


@pytest.fixture
def slide(made_slide: Path) -> dfx.Slide:
    return dfx.open_slide(made_slide)


@pytest.fixture(scope="session")
def resnet18() -> dfx.EncoderSpec:
    return dfx.load_encoder("resnet18", weights="random")


@pytest.fixture(scope="session")
def client() -> Iterator[distributed.Client]:
    """A cluster in this process, not the current one."""
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0", memory_limit=0
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(scope="session")
def processes() -> Iterator[distributed.Client]:
    """A cluster of two worker processes, not the current one."""
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


def shared(name: str) -> Path:
    """A file of the shared test data; the test is skipped where there is none."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no shared test data: {path}")
    return path


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """The address of an S3 server in a process of its own."""
    port = free_port()
    line = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:

        def answers() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        until(answers)
        yield f"127.0.0.1:{port}"
        process.kill()
