"""One value or colour a patch, from its features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
MOST_CLUSTERS = 20
"""As many as there are colours that can be told apart."""


@dataclass(frozen=True, eq=False)
class Values:
    """One value a patch, to be drawn."""

    title: str
    """What they are."""
    values: NDArray[Any]
    """(N,): integers are labels, floats a measure (NaN: none)."""
    chosen: int | None = None
    """The patch that others are compared with."""


def chunks(features: NDArray[Any]) -> Iterator[NDArray[np.float64]]:
    """Give features a few rows at a time, in float64."""
    return (features[start : start + CHUNK].astype(np.float64) for start in range(0, len(features), CHUNK))


def principal_colours(features: NDArray[Any]) -> Picture:
    """First three principal components of features (N, D) as uint8 colours (N, 3).

    Each component is stretched from its 2nd to its 98th percentile, and signed so that its largest
    loading is positive: the same features give the same colours.
    """
    n, dim = features.shape
    if not n:
        return np.zeros((0, 3), np.uint8)
    mean = sum(part.sum(axis=0) for part in chunks(features)) / n
    if dim <= n:
        scatter = sum(((part - mean).T @ (part - mean) for part in chunks(features)), np.zeros((dim, dim)))
        _, _, axes = np.linalg.svd(scatter)
    else:
        _, _, axes = np.linalg.svd(features.astype(np.float64) - mean, full_matrices=False)
    axes = axes[:3]
    axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]
    scores = np.zeros((n, 3))
    scores[:, : len(axes)] = np.concatenate([(part - mean) @ axes.T for part in chunks(features)])
    low, high = np.percentile(scores, [2, 98], axis=0)
    spread = np.where(high > low, high - low, 1)
    return np.asarray(np.clip((scores - low) / spread, 0, 1) * 255).round().astype(np.uint8)


def unit(features: NDArray[Any]) -> NDArray[np.float32]:
    """Scale rows to length 1; rows of zeros stay."""
    out = features.astype(np.float32)
    lengths = np.sqrt(np.einsum("nd,nd->n", out, out, dtype=np.float64))
    out /= np.where(lengths > 0, lengths, 1)[:, None]
    return out


def similarity(features: NDArray[Any], row: int) -> NDArray[np.float32]:
    """Cosine similarity of each row of features (N, D) to one of them: float32 (N,), from -1 to 1."""
    if not 0 <= row < len(features):
        raise CallError(f"there is no patch {row}: rows go from 0 to {len(features) - 1}.")
    rows = unit(features)
    return np.asarray(rows @ rows[row], np.float32)


def clusters(features: NDArray[Any], k: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Group rows of features (N, D), scaled to length 1, by k-means: labels (N,), distances to their centres (N,).

    k-means++ (doi:10.5555/1283383.1283494) from a fixed seed, then Lloyd's rounds: the same features give the same
    groups. Label 0 is the largest group.
    """
    if isinstance(k, bool) or not isinstance(k, int) or not 2 <= k <= min(MOST_CLUSTERS, len(features)):
        raise CallError(f"patches go into 2 to {min(MOST_CLUSTERS, len(features))} clusters, not {k!r}.")
    rows = unit(features)
    sample = rows[np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).round().astype(int)]
    rng = np.random.default_rng(0)
    centres = sample[[rng.integers(len(sample))]]
    while len(centres) < k:
        far = nearest(sample, centres)[1].astype(np.float64) ** 2
        weights = far / far.sum() if far.sum() > 0 else None  # all are alike
        centres = np.concatenate([centres, sample[[rng.choice(len(sample), p=weights)]]])
    labels = np.full(len(sample), -1)
    for _ in range(ROUNDS):
        before, labels = labels, nearest(sample, centres)[0]
        if np.array_equal(before, labels):
            break
        centres = np.stack([sample[labels == i].mean(axis=0) if (labels == i).any() else centres[i] for i in range(k)])
    labels, distances = nearest(rows, centres)
    rank = np.empty(k, np.intp)
    rank[np.argsort(-np.bincount(labels, minlength=k), kind="stable")] = np.arange(k)
    return rank[labels], distances


def nearest(rows: NDArray[np.float32], centres: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
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
            return Values(f"cosine similarity to patch {number}", similarity(features, int(number)), int(number))
        return Values(f"{number} clusters (k-means)", clusters(features, int(number))[0])
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
    many = asked.dtype.kind != "f" and len(np.unique(asked)) > MOST_CLUSTERS  # too many for labels
    return Values(title, asked.astype(np.float64) if many else asked)
