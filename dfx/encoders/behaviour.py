"""The fingerprint of an encoder by its behaviour: its output for a few synthetic patches.

A digest of code and weights cannot see everything that features depend on: forward hooks, functions that are called
by a global name, packed weights, the versions of torch and timm. So each process runs the encoder on `PATCHES`
synthetic patches, in one batch, along the path of real patches (preparation, precision, pooling). A fixed random
projection reduces the features of each patch to `NUMBERS` numbers, which the store keeps. A run that resumes the store,
and each worker process of a run, compares its own numbers with these, within a tolerance (`TOLERANCES`).

Differences that this cannot detect:

- on patches unlike the synthetic ones, for example in a branch that only some patches take;
- below the tolerance, for example another epsilon of a normalisation, or finer changes under bfloat16;
- that depend on the size of a batch, since the batch is always the same;
- made by `torch.compile`, since a compiled network is run uncompiled here (a compiler would specialise in this batch);
- between two random networks: if two runs of a network differ, the store says so, and the numbers are not compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfx.encoders.spec import EncoderSpec, Kept
from dfx.errors import EncoderError

SCHEME = 1
"""Version of the patches and the projection; projections of different schemes are not compared."""
PATCHES = 3
"""Synthetic patches in the batch."""
NUMBERS = 32
"""Numbers per patch."""
TOLERANCES = {"float32": 1e-4, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 5e-2}
"""By arithmetic, finest first: the largest allowed difference between two projections, relative to their norm. The
tolerance of float32 covers other CPUs, GPUs and numbers of threads. Between two kinds of arithmetic, the larger
tolerance holds."""
STAINS = (243, 226, 84), (240, 142, 52), (245, 184, 132)
"""Red, green and blue of glass, eosin and haematoxylin."""
BEHAVIOURS: Kept[Behaviour] = Kept(256)
"""Behaviours measured in this process, by encoder, device and shape of the patches."""


@dataclass(frozen=True)
class Behaviour:
    """The output of an encoder for the synthetic patches of a shape. Small to pickle."""

    shape_yx: tuple[int, int]
    """Rows and columns of the patches."""
    data: bytes
    """The projection, little-endian float32 (patches, numbers)."""
    device: str
    """Kind of device: "cpu", "cuda"."""
    precision: str
    """Arithmetic of the network, a key of `TOLERANCES`."""
    deterministic: bool = True
    """Whether two runs gave the same features."""
    scheme: int = SCHEME
    """Version of the patches and the projection."""

    @property
    def projection(self) -> NDArray[np.float32]:
        """float32 (patches, numbers)."""
        return np.frombuffer(self.data, "<f4").reshape(-1, NUMBERS)

    @property
    def tolerance(self) -> float:
        """The tolerance of its arithmetic."""
        return TOLERANCES.get(self.precision, max(TOLERANCES.values()))

    def expected(self) -> tuple[bytes, str, str] | None:
        """Return the data, device and precision that a worker must match; None: it may give any features."""
        return (self.data, self.device, self.precision) if self.deterministic else None

    def describe(self) -> dict[str, Any]:
        """Give it as JSON values, with the versions of the libraries that it may depend on."""
        return {
            "scheme": self.scheme,
            "shape": list(self.shape_yx),
            "device": self.device,
            "precision": self.precision,
            "deterministic": self.deterministic,
            "libraries": {name: installed(name) for name in ("torch", "timm")},
            "projection": [[float(f"{number:.9g}") for number in row] for row in self.projection.tolist()],
        }


def installed(package: str) -> str | None:
    """Give the version of a package, without importing it; None where it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def read_behaviour(description: Any) -> Behaviour | None:
    """Return the behaviour that `describe` wrote; None if it is missing, damaged, or of another scheme."""
    if not isinstance(description, dict) or description.get("scheme") != SCHEME:
        return None
    try:
        rows, columns = (int(n) for n in description["shape"])
        numbers = np.asarray(description["projection"], "<f4")
        if numbers.shape != (PATCHES, NUMBERS):
            return None
        precision, deterministic = str(description["precision"]), bool(description["deterministic"])
        return Behaviour((rows, columns), numbers.tobytes(), str(description["device"]), precision, deterministic)
    except (KeyError, TypeError, ValueError):
        return None


def measure(
    spec: EncoderSpec, device: str, shape_yx: tuple[int, int], channels: int = 3, *, threads: int | None = None
) -> Behaviour:
    """Run an encoder twice on the synthetic patches of a shape. A process does this once and keeps the result.

    `threads`: how many torch may use on a CPU. Raises `EncoderError` for a network that fails, or gives features that
    are not finite.
    """
    from dfx.encoders import network  # which imports torch

    name = network.choose_device(device)
    key = spec, name, shape_yx, channels
    return BEHAVIOURS.get(key, lambda: _measure(network.network(spec, name), shape_yx, channels, threads))


def _measure(network: Any, shape_yx: tuple[int, int], channels: int, threads: int | None) -> Behaviour:
    patches = synthetic_patches(shape_yx, channels)
    runs = [network(patches, batch_size=PATCHES, threads=threads, compiled=False) for _ in range(2)]
    kind, precision = network.device.type, network.arithmetic
    if runs[0].dtype == np.float16:
        precision = coarsest([precision, "float16"])
    first, second = (
        Behaviour(shape_yx, checked(rows, network.spec.name, precision, kind).tobytes(), kind, precision)
        for rows in runs
    )
    return replace(first, deterministic=distance(first, second) <= first.tolerance)


def checked(features: NDArray[Any], name: str, precision: str, device: str) -> NDArray[np.float32]:
    """Project features, and refuse those that are not finite; raises `EncoderError`."""
    with np.errstate(over="ignore", invalid="ignore"):
        found = project(features)
    if np.isfinite(features).all() and np.isfinite(found).all():
        return found
    bad = int((~np.isfinite(features)).any(axis=1).sum())
    remedy = (
        "float16 overflows above 65504, so use precision='bfloat16' or 'float32'"
        if precision == "float16"
        else "check its weights, its mean and std, and what its forward divides by"
    )
    what = (
        f"that are not finite (nan or inf) for {bad} of {len(features)}" if bad else "that float32 cannot hold for some"
    )
    raise EncoderError(
        f"encoder {name} gives features {what} synthetic patches (in {precision} on {device}): {remedy}."
    )


def coarsest(precisions: Iterable[str]) -> str:
    """Give the arithmetic with the largest tolerance."""
    return max(precisions, key=lambda precision: (TOLERANCES[precision], precision))


def distance(one: Behaviour, other: Behaviour) -> float:
    """Give the largest difference between the projections of a patch, relative to the largest norm of any patch.

    The norm of the same patch is not used: features that nearly cancel out are mostly rounding errors.
    """
    a, b = one.projection.astype(np.float64), other.projection.astype(np.float64)
    if a.shape != b.shape:
        return math.inf
    norm = max(np.linalg.norm(a, axis=1).max(), np.linalg.norm(b, axis=1).max())
    return float(np.linalg.norm(a - b, axis=1).max() / norm) if norm else 0.0


def behaviour_difference(expected: Behaviour, found: Behaviour) -> str:
    """Say how two deterministic behaviours differ; empty when they are equal within the tolerance."""
    far, tolerance = distance(expected, found), max(expected.tolerance, found.tolerance)
    if far <= tolerance:
        return ""
    here, there = (f"{behaviour.precision} on {behaviour.device}" for behaviour in (expected, found))
    kinds = here if here == there else f"{here} and {there}"
    return (
        f"its features of synthetic patches differ by {100 * far:.3g} % of their norm, "
        f"where {100 * tolerance:g} % is allowed ({kinds})"
    )


# Patches and projection: integer arithmetic of our own, so that they are the same everywhere and for ever.


def project(features: NDArray[Any]) -> NDArray[np.float32]:
    """Project features (N, D) to float32 (N, `NUMBERS`): a matrix of ±1/sqrt(D), summed in float64."""
    n, width = features.shape
    found = np.zeros((n, NUMBERS), np.float64)
    for start in range(0, width, 2**14):
        part = features[:, start : start + 2**14].astype(np.float64)
        bits = scrambled(np.arange(start, start + part.shape[1], dtype=np.uint64))
        odd = (bits[:, None] >> np.arange(NUMBERS, dtype=np.uint64)) & np.uint64(1)
        found += part @ (1.0 - 2.0 * odd)
    return (found / math.sqrt(max(1, width))).astype("<f4")


def scrambled(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash 64-bit integers (SplitMix64)."""
    z = numbers + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def noise(shape_yx: tuple[int, int], cell: int, seed: int) -> NDArray[np.int64]:
    """Give smooth noise from 0 to 255: random values at the corners of cells, interpolated between them."""
    (y, fy), (x, fx) = (np.divmod(np.arange(n, dtype=np.int64), cell) for n in shape_yx)
    places = (np.arange(y[-1] + 2)[:, None] << 20) + np.arange(x[-1] + 2) + (seed << 40)
    corners = (scrambled(places.astype(np.uint64)) >> np.uint64(56)).astype(np.int64)
    rows = corners[y] * (cell - fy)[:, None] + corners[y + 1] * fy[:, None]
    found: NDArray[np.int64] = (rows[:, x] * (cell - fx) + rows[:, x + 1] * fx) // (cell * cell)
    return found


def wave(steps: NDArray[np.int64], period: int) -> NDArray[np.int64]:
    """Give a triangular wave from 0 to 255."""
    return np.abs((steps % period) * 510 // period - 255)


def synthetic_patches(shape_yx: tuple[int, int], channels: int = 3) -> NDArray[np.uint8]:
    """Make the synthetic patches, uint8 (`PATCHES`, rows, columns, channels).

    They are stained tissue with nuclei, gradients under stripes, and coloured noise from fine to coarse.
    Each looks different if it is turned or mirrored, or if its colours are exchanged.
    """
    rows, columns = shape_yx
    y, x = np.arange(rows, dtype=np.int64)[:, None], np.arange(columns, dtype=np.int64)[None, :]
    pink = np.clip((noise(shape_yx, 37, 1) - 70) * 3, 0, 255)
    blue = np.clip((noise(shape_yx, 9, 2) - 140) * 6, 0, 255) * pink // 255
    grain = noise(shape_yx, 1, 3) // 16
    gradients = x * 255 // max(1, columns - 1) + 0 * y, y * 255 // max(1, rows - 1) + 0 * x, wave(3 * x + 5 * y, 97)
    made = np.empty((PATCHES, rows, columns, channels), np.uint8)
    for channel in range(channels):
        glass, eosin, haematoxylin = STAINS[channel % 3]
        stained = (glass * (255 - pink) + eosin * pink) // 255
        stained = (stained * (255 - blue) + haematoxylin * blue) // 255
        made[0, ..., channel] = np.clip(stained - grain, 0, 255)
        made[1, ..., channel] = (3 * gradients[channel % 3] + wave(7 * x - 2 * y + 40 * channel, 31)) // 4
        coarse = sum(noise(shape_yx, cell, 10 + 8 * channel + k) for k, cell in enumerate((1, 4, 16, 64)))
        made[2, ..., channel] = np.clip((coarse - 510) * 3 // 5 + 128 - 24 * (channel % 3), 0, 255)
    return made
