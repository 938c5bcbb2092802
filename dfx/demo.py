"""The demonstration: a slide made here, its features, a picture. No network, no data."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dfx.errors import StoreError
from dfx.extractor import DeepFeatureExtractor
from dfx.pictures import write_png
from dfx.run import RunResult
from dfx.slides.synthetic import write_slide
from dfx.store import check_folder, open_features

SLIDE, PICTURE = "demo.svs", "demo.png"


def demo(out: str | Path, *, verbose: bool = True) -> tuple[Path, Path, Path]:
    """Make a slide, extract features with an untrained resnet18, draw them; gives slide, store, picture."""
    folder = check_folder(out).output
    if not isinstance(folder, Path):
        raise StoreError(f"{folder} is not on a mounted disk, where the demonstration is: give a folder with --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        slide = write_slide(folder / SLIDE)
    except OSError as e:
        raise StoreError(f"{folder} can't be written to ({e}): give another folder with --out.") from e
    extractor = DeepFeatureExtractor("resnet18", weights="random", verbose=verbose)
    result = extractor.run(
        [slide],
        patch_mode=False,
        input_resolutions=[{"resolution": 0.5, "units": "mpp"}],
        patch_input_shape=(112, 112),
        save_dir=folder,
        output_type="zarr",
    )
    assert isinstance(result, RunResult)
    store: Path = result[slide]
    return slide, store, write_png(np.asarray(open_features(store).plot()), folder / PICTURE)
