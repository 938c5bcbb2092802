"""Patches that TRIDENT or CLAM laid over a slide, read from their HDF5 files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfx.errors import CallError, CallTypeError

MOST = 2**26
"""Patches that a file may have."""


@dataclass(frozen=True, eq=False)
class Coords:
    """Squares on level 0, and what becomes of them."""

    corners_xy: NDArray[np.int64]
    """(N, 2): top left corners in level-0 pixels, (x, y)."""
    size: int
    """Side of a patch in level-0 pixels."""
    pixels: int
    """Side of what it is resampled to."""
    stride: int
    """From one patch to the next in level-0 pixels, where they lie on a lattice."""
    dimensions: tuple[int, int] | None
    """(width, height) of the slide, where the file says them."""


def read_coords(path: str | Path, downsample_of: Callable[[int], float]) -> Coords:
    """Read `coords` with the attributes of TRIDENT, or else of CLAM; from a file of patches or of features.

    `downsample_of`: level-0 pixels per pixel of a level, for files of CLAM that don't say it. Raises `CallError` for
    what is no such file, or lacks the attributes that say how large patches are.
    """
    if not isinstance(path, str | Path):
        raise CallTypeError(f"a file of coordinates is given by its path (str or Path), not {type(path).__name__}.")
    try:
        import h5py
    except ImportError as e:
        raise CallError(f"reading {path} needs h5py ({e}): pip install dfx[export].") from e
    try:
        with h5py.File(path, "r") as file:
            dataset = file["coords"]
            shape, attributes = dataset.shape, dict(dataset.attrs)
            if len(shape) != 2 or shape[1] != 2 or shape[0] > MOST or dataset.dtype.kind not in "iuf":
                raise CallError(f"{path} has coords of {shape} {dataset.dtype}, which are no corners (N, 2).")
            corners = np.rint(dataset[...])
    except (OSError, KeyError, ValueError, AttributeError, RuntimeError) as e:  # h5py raises each for damaged files
        raise CallError(f"{path} has no coordinates of TRIDENT or CLAM ({e}): give a file with `coords`.") from e
    if not (np.isfinite(corners).all() and (corners >= 0).all() and (corners < 2**31).all()):
        raise CallError(f"{path} has corners that are no level-0 pixels of a slide: below 0, or beyond any.")

    def number(name: str, *, least: float = 1) -> float:
        return number_of(path, attributes, name, least)

    if "target_magnification" in attributes:
        pixels = number("patch_size")
        ratio = number("level0_magnification", least=0.01) / number("target_magnification", least=0.01)
        size = number("patch_size_level0") if "patch_size_level0" in attributes else pixels * ratio
        overlap = number("overlap", least=-(2**31)) * size / pixels if "overlap" in attributes else 0
    elif "patch_level" in attributes:
        read = number("patch_size")
        level = int(number("patch_level", least=0))
        size = read * (number("downsample", least=0.01) if "downsample" in attributes else downsample_of(level))
        pixels = read / (number("custom_downsample") if "custom_downsample" in attributes else 1)
        overlap = 0
    else:
        raise CallError(
            f"{path} doesn't say how large its patches are: give TRIDENT's file (patch_size, level0_magnification, "
            "target_magnification) or CLAM's of patches/ (patch_size, patch_level), not that of bare features."
        )
    dimensions = None
    if "level0_width" in attributes and "level0_height" in attributes:
        dimensions = int(number("level0_width")), int(number("level0_height"))
    whole = max(1, round(size)), max(1, round(pixels)), max(1, round(size - overlap))
    return Coords(corners.astype(np.int64), *whole, dimensions)


def number_of(path: str | Path, attributes: Mapping[str, Any], name: str, least: float) -> float:
    """Give an attribute that is a number, or a pair of which the first counts; raises `CallError`."""
    value = attributes.get(name)
    try:
        found = float(np.ravel(np.asarray(value))[0])
    except (TypeError, ValueError, IndexError):
        found = np.nan
    if not least <= found < 2**31:
        raise CallError(f"{path} has {name} = {value!r} on its coords, where a number of at least {least:g} must be.")
    return found
