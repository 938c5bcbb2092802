from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import dfx
from dfx.slides.synthetic import write_slide

DATA = Path(os.environ.get("DFX_TEST_DATA", Path(__file__).parents[2] / "shared")).absolute()


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


def shared(name: str) -> Path:
    """A file of the shared test data; the test is skipped where there is none."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no shared test data: {path}")
    return path
