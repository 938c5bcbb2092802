"""The HDF5 files of TRIDENT, CLAM and STAMP, as their readers take them.

TRIDENT: `trident/IO.py`, `WSI.py` of 2026-08. CLAM: `dataset_generic.py`, `create_patches_fp.py`. STAMP 2:
`preprocessing/__init__.py`, `modeling/data.py`. What each reads is in tests/test_export.py.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dfx.export.output import Output, legible, needed
from dfx.export.source import ROWS, Source
from dfx.store import Features

TRIDENT_NAMES = {
    "uni": "uni_v1",
    "uni2-h": "uni_v2",
    "conch": "conch_v1",
    "conch-v1.5": "conch_v15",
    "prov-gigapath": "gigapath",
    "phikon-v2": "phikon_v2",
    "h-optimus-0": "hoptimus0",
    "h-optimus-1": "hoptimus1",
    "hibou-l": "hibou_l",
    "midnight-12k": "midnight12k",
    "lunit-vit-s8": "lunit-vits8",
    "kaiko-vit-s8": "kaiko-vits8",
    "kaiko-vit-s16": "kaiko-vits16",
    "kaiko-vit-b8": "kaiko-vitb8",
    "kaiko-vit-b16": "kaiko-vitb16",
    "kaiko-vit-l14": "kaiko-vitl14",
}
"""What TRIDENT calls encoders that dfx calls otherwise: it looks for their folders by these names."""


def trident(source: Source) -> list[Output]:
    """Give TRIDENT's job folder: patches, features, slide features."""
    size, extent = source.square("TRIDENT")
    level0, target = source.magnifications("TRIDENT")
    job = f"{target:g}x_{size}px_{source.overlap}px_overlap"
    attributes = {
        "patch_size": size,
        "patch_size_level0": round(extent),
        "level0_magnification": level0,
        "target_magnification": target,
        "overlap": source.overlap,
        "name": source.name,
        "level0_width": source.dimensions[0],
        "level0_height": source.dimensions[1],
    }

    def coords(file: Any, folder: str) -> None:
        file["coords"] = source.corners
        file["coords"].attrs.update(attributes | {"savetodir": folder})

    def bag(features: Features, name: str, pool: str | None = None) -> Callable[[Any, str], None]:
        def fill(file: Any, folder: str) -> None:
            if pool:
                file["features"] = source.pooled(features)
            else:
                write_rows(file, "features", source, features)
            file["features"].attrs.update({"name": source.name, "savetodir": folder, "encoder": name})
            coords(file, folder)

        return fill

    same = partial(has_coords, source=source, attributes=attributes)
    outputs = [h5(f"{job}/patches/{source.name}_patches.h5", coords, same)]
    for encoder, features in source.encoders.items():
        name = TRIDENT_NAMES.get(encoder.lower(), encoder)
        outputs.append(h5(f"{job}/features_{name}/{source.name}.h5", bag(features, name)))
        if source.pool and len(source):
            pooled = f"{source.pool}-{name}"
            outputs.append(h5(f"{job}/slide_features_{pooled}/{source.name}.h5", bag(features, pooled, source.pool)))
    if source.pool and not len(source):
        warnings.warn(f"{source.path} has no patches, so it has no {source.pool}.", UserWarning, stacklevel=3)
    return outputs


def clam(source: Source) -> list[Output]:
    """Give CLAM's folders of patches, features as h5, and features as tensors, all float32."""
    features = source.one
    _, extent = source.square("CLAM")

    def patches(file: Any, folder: str) -> None:
        file["coords"] = source.corners
        file["coords"].attrs.update(
            {
                "patch_size": round(extent),  # at the level below, where CLAM reads
                "patch_level": 0,
                "downsample": np.ones(2),
                "downsampled_level_dim": np.array(source.dimensions),
                "level_dim": np.array(source.dimensions),
                "name": source.name,
                "save_path": folder,
                "custom_downsample": 1,
            }
        )

    def bag(file: Any, folder: str) -> None:
        write_rows(file, "features", source, features, np.float32)
        file["coords"] = source.corners.astype(np.int32)

    def tensor(path: Path) -> None:
        from dfx.encoders.tensors import save_tensor  # torch takes seconds to import

        shape = len(source), features.features.shape[1]
        with tempfile.TemporaryFile(dir=path.parent) as scratch:
            array = np.memmap(scratch, np.float32, "w+", shape=shape) if len(source) else np.empty(shape, np.float32)
            for rows, part in source.rows(features, np.float32):
                array[rows] = part
            save_tensor(array, path)

    return [
        h5(f"patches/{source.name}.h5", patches),
        h5(f"h5_files/{source.name}.h5", bag),
        Output(f"pt_files/{source.name}.pt", tensor),
    ]


def stamp(source: Source) -> list[Output]:
    """Give STAMP's tile features: float16, positions in µm.

    `stamp_version` is left out: STAMP refuses files of a newer version than its own.
    """
    size, extent = source.square("STAMP")
    mpp = source.microns("STAMP")

    def tiles(features: Features, name: str) -> Callable[[Any, str], None]:
        def write(file: Any, folder: str) -> None:
            write_rows(file, "feats", source, features, np.float16)
            file["coords"] = (source.exact * mpp).astype(np.float32)
            file.attrs.update(
                {
                    "extractor": name,
                    "unit": "um",
                    "tile_size_um": extent * sum(mpp) / 2,
                    "tile_size_px": size,
                    "feat_type": "tile",
                }
            )

        return write

    return [h5(f"{name}/{source.name}.h5", tiles(features, name)) for name, features in source.encoders.items()]


def h5(path: str, fill: Callable[[Any, str], None], same: Callable[[Path], bool] = lambda path: False) -> Output:
    """Give an output that is an HDF5 file, filled by a function of it and of the folder that it lies in."""
    h5py = needed("h5py")

    def write(place: Path) -> None:
        with h5py.File(place, "x") as file:
            fill(file, legible(str(place.parent)))

    return Output(path, write, same)


def write_rows(file: Any, key: str, source: Source, features: Features, dtype: Any = None) -> None:
    """Write features as a dataset that can grow, as these tools' own can."""
    width = features.features.shape[1]
    dataset = file.create_dataset(
        key,
        shape=(len(source), width),
        maxshape=(None, width),
        chunks=(min(256, ROWS), width),
        dtype=dtype or features.features.dtype,
    )
    for rows, part in source.rows(features, dtype):
        dataset[rows] = part


def has_coords(path: Path, source: Source, attributes: dict[str, Any]) -> bool:
    """Whether a file holds the patches of a source already: several encoders' features share one."""
    try:
        with needed("h5py").File(path, "r") as file:
            coords = file["coords"]
            return np.array_equal(coords[...], source.corners) and all(
                coords.attrs.get(name) == value for name, value in attributes.items()
            )
    except (OSError, KeyError):
        return False
