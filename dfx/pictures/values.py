"""One value or colour per patch, from its features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dfx.errors import CallError, CallTypeError
from dfx.pictures.canvas import Picture

CHUNK = 8192
"""Rows that are in float64 at a time."""
SAMPLE = 20_000
"""Rows that centres are found from, evenly spaced among all."""
ROUNDS = 50
"""Of k-means, at most."""
ATTEMPTS = 3
"""Attempts of k-means, of which the best counts."""
NOISE = 1e-9
"""Share of the largest feature: a component with a smaller spread shows only the rounding of a constant."""
MOST_CLUSTERS = 20
"""As many as there are colours that can be told apart."""


@dataclass(frozen=True, eq=False)
class Values:
    """One value per patch, to be drawn."""

    title: str
    """What they are."""
    values: NDArray[Any]
    """(N,): integers are labels, floats a measure."""
    drawn: NDArray[np.bool_]
    """(N,): which patches have a value."""
    chosen: int | None = None
    """The patch that others are compared with."""


def finite_rows(features: NDArray[Any]) -> NDArray[np.bool_]:
    """Find the rows of features (N, D) without NaN and infinity: bool (N,).

    Raises `CallError` if there are rows, and each of them has NaN or infinity.
    """
    parts = [np.isfinite(features[n : n + CHUNK]).all(axis=1) for n in range(0, len(features), CHUNK)]
    found = np.concatenate([np.zeros(0, bool), *parts])
    if len(found) and not found.any():
        raise CallError(
            f"all {len(found)} patches have features that are NaN or infinite, so nothing can be drawn: extract them "
            "again with an encoder whose numbers do not overflow (another precision)."
        )
    return found


def left_out(drawn: NDArray[np.bool_]) -> str:
    """Say how many patches are not drawn, for the end of a title."""
    count = int((~drawn).sum())
    return f"; {count} of {len(drawn)} patches left out: NaN or infinite" if count else ""


def chunks(features: NDArray[Any]) -> Iterator[NDArray[np.float64]]:
    """Give finite features a few rows at a time, in float64 and scaled by a power of 2 to at most 1."""
    exponent = -np.frexp(float(np.abs(features).max(initial=0)))[1]
    return (
        np.ldexp(features[start : start + CHUNK].astype(np.float64), exponent)
        for start in range(0, len(features), CHUNK)
    )


def principal_colours(features: NDArray[Any]) -> Picture:
    """First three principal components of features (N, D) as uint8 colours (N, 3).

    Each component is stretched from its 2nd to its 98th percentile, and signed so that its largest
    loading is positive: the same features give the same colours. Rows with NaN or infinity are left out, and are black.
    Raises `CallError` if all rows have NaN or infinity.
    """
    finite = finite_rows(features)
    out = np.zeros((len(features), 3), np.uint8)
    features = features if finite.all() else features[finite]
    n, dim = features.shape
    if not n:
        return out
    mean = sum(part.sum(axis=0) for part in chunks(features)) / n
    if dim <= n:
        scatter = sum(((part - mean).T @ (part - mean) for part in chunks(features)), np.zeros((dim, dim)))
        _, _, axes = np.linalg.svd(scatter)
    else:
        _, _, axes = np.linalg.svd(np.concatenate(list(chunks(features))) - mean, full_matrices=False)
    axes = axes[:3]
    axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]
    scores = np.zeros((n, 3))
    scores[:, : len(axes)] = np.concatenate([(part - mean) @ axes.T for part in chunks(features)])
    low, high = np.percentile(scores, [2, 98], axis=0)
    spread = np.where(high - low > NOISE, high - low, np.inf)
    out[finite] = (np.clip((scores - low) / spread, 0, 1) * 255).round()
    return out


def unit(features: NDArray[Any]) -> NDArray[np.float32]:
    """Scale finite rows to length 1; rows of zeros stay."""
    out = np.empty(features.shape, np.float32)
    for start in range(0, len(features), CHUNK):
        part = features[start : start + CHUNK].astype(np.float64)
        part = np.ldexp(part, -np.frexp(np.abs(part).max(axis=1, initial=0))[1][:, None])
        lengths = np.linalg.norm(part, axis=1)
        out[start : start + CHUNK] = part / np.where(lengths > 0, lengths, 1)[:, None]
    return out


def similarity(features: NDArray[Any], row: int) -> NDArray[np.float32]:
    """Cosine similarity of each row of features (N, D) to one of them: float32 (N,), from -1 to 1.

    Rows with NaN or infinity give NaN. Raises `CallError` if the chosen row has NaN or infinity, or does not exist.
    """
    if not 0 <= row < len(features):
        rows = f"rows go from 0 to {len(features) - 1}" if len(features) else "the slide has no patches"
        raise CallError(f"there is no patch {row}: {rows}.")
    finite = finite_rows(features)
    if not finite[row]:
        other = finite.argmax()
        raise CallError(f"patch {row} has features that are NaN or infinite: choose another patch, such as {other}.")
    found = np.full(len(features), np.nan, np.float32)
    found[finite] = unit(features[finite]) @ unit(features[row : row + 1])[0]
    return found


def clusters(features: NDArray[Any], k: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Group rows of features (N, D), scaled to length 1, by k-means: labels (N,), distances to their centres (N,).

    k-means++ (doi:10.5555/1283383.1283494) from a fixed seed, then Lloyd's rounds: the same features give the same
    groups. Label 0 is the largest group. Rows with NaN or infinity have the label -1 and the distance NaN.
    """
    finite = finite_rows(features)
    most = min(MOST_CLUSTERS, int(finite.sum()))
    if most < 2:
        raise CallError(f"clusters need at least 2 patches with finite features, not {most}.")
    if isinstance(k, bool) or not isinstance(k, int) or not 2 <= k <= most:
        raise CallError(f"patches go into 2 to {most} clusters, not {k!r}.")
    rows = unit(features[finite])
    sample = rows[np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).round().astype(int)]
    cv2.setRNGSeed(0)
    stop = cv2.TERM_CRITERIA_COUNT + cv2.TERM_CRITERIA_EPS, ROUNDS, 0
    _, _, centres = cv2.kmeans(sample, k, np.empty(0, np.int32), stop, ATTEMPTS, cv2.KMEANS_PP_CENTERS)
    nearest, lengths = nearest_centre(rows, np.asarray(centres, np.float32))
    rank = np.empty(k, np.intp)
    rank[np.argsort(-np.bincount(nearest, minlength=k), kind="stable")] = np.arange(k)
    labels, distances = np.full(len(features), -1, np.intp), np.full(len(features), np.nan, np.float32)
    labels[finite], distances[finite] = rank[nearest], lengths
    return labels, distances


def nearest_centre(
    rows: NDArray[np.float32], centres: NDArray[np.float32]
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Which centre is nearest to each row, and how far it is."""
    squares = (centres * centres).sum(axis=1) - 2 * (rows @ centres.T)
    labels = squares.argmin(axis=1)
    lengths = np.einsum("nd,nd->n", rows, rows)
    return labels, np.sqrt(np.maximum(lengths + squares[np.arange(len(rows)), labels], 0))


def values_of(asked: object, features: NDArray[Any]) -> Values:
    """Give what is to be drawn: "similarity:ROW", "cluster:K", a .npy file or an array of one value a patch.

    Raises `CallError` or `CallTypeError` for what is none of these, or not one a patch.
    """
    if isinstance(asked, str) and asked.partition(":")[0] in ("similarity", "cluster"):
        kind, _, number = asked.partition(":")
        if not number.isascii() or not number.isdigit():
            raise CallError(f"{asked!r} has no number: use similarity:ROW or cluster:K.")
        if kind == "similarity":
            found = similarity(features, int(number))
            return Values(f"cosine similarity to patch {number}", found, np.isfinite(found), int(number))
        labels = clusters(features, int(number))[0]
        return Values(f"{number} clusters (k-means)", labels, labels >= 0)
    title = "values"
    if isinstance(asked, str | Path):
        path = Path(asked)
        if path.suffix != ".npy" or not path.is_file():
            raise CallError(f"{asked} can't be drawn: use similarity:ROW, cluster:K or a .npy file.")
        title = path.stem
        try:
            asked = np.load(path, allow_pickle=False)
        except Exception as e:  # numpy raises ValueError, EOFError, TokenError, MemoryError and more
            raise CallError(f"{path} can't be read ({type(e).__name__}: {e}): save one number a patch.") from e
    if not isinstance(asked, np.ndarray):
        raise CallTypeError(f"values are a numpy array, a .npy file or a text, not {type(asked).__name__}.")
    if asked.shape != (len(features),) or asked.dtype.kind not in "biuf":
        raise CallError(
            f"values must be {len(features)} numbers, one a patch, not {asked.dtype} of shape {asked.shape}."
        )
    drawn = np.isfinite(asked)
    if len(asked) and not drawn.any():
        raise CallError(f"all {len(asked)} values are NaN or infinite, so nothing can be drawn.")
    many = asked.dtype.kind != "f" and len(np.unique(asked)) > MOST_CLUSTERS  # too many for labels
    return Values(title, asked.astype(np.float64) if many else asked, drawn)
