"""Pictures of a slide, its patches, and what their features say: uint8 RGB arrays, the slide's right side up.

`canvas` puts pictures and text together, `scene` draws over a thumbnail, `values` finds one value a patch.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from dfx.pictures.canvas import GAP, Colour, Picture, below, beside, caption, colour_bar, legend, panels, write_png
from dfx.pictures.scene import Scene
from dfx.pictures.values import (
    Values,
    clusters,
    finite_rows,
    left_out,
    principal_colours,
    similarity,
    values_of,
)
from dfx.reader import read_patches
from dfx.resolution import View
from dfx.slides import Slide

__all__ = [
    "Picture",
    "Scene",
    "Values",
    "clusters",
    "contact_sheet",
    "overview",
    "principal_colours",
    "similarity",
    "value_map",
    "values_of",
    "write_png",
]

KELLY: tuple[Colour, ...] = (
    *((243, 195, 0), (135, 86, 146), (243, 132, 0), (161, 202, 241), (190, 0, 50), (194, 178, 128), (132, 132, 130)),
    *((0, 136, 86), (230, 143, 172), (0, 103, 165), (249, 147, 121), (96, 78, 151), (246, 166, 0), (179, 68, 108)),
    *((220, 211, 0), (136, 45, 23), (141, 182, 0), (101, 69, 34), (226, 88, 34), (43, 61, 38)),
)
"""Kelly's colours of maximum contrast (Color Engineering 3(6), 1965) without white and black."""
TICKS = 5
THUMB = 112
"""Pixels of a patch on a contact sheet."""


def overview(scene: Scene, features: NDArray[np.floating], titles: Sequence[str]) -> Picture:
    """Draw side by side: the slide with the outline of its tissue, its patch grid, its patches in their PCA colours."""
    drawn = finite_rows(features)
    coloured = scene.coloured(principal_colours(features), drawn)
    *others, last = titles
    return panels([scene.outlined(), scene.gridded(), coloured], [*others, last + left_out(drawn)])


def value_map(scene: Scene, values: Values, title: str) -> Picture:
    """Draw the slide with the outline of its tissue, and beside it one value a patch with its scale or legend.

    The scale goes from the 2nd to the 98th percentile where there is something beyond them.
    """
    drawn = values.drawn
    colours = np.zeros((len(drawn), 3), np.uint8)
    if values.values.dtype.kind == "f":
        colours[drawn], scale = measured(values.values[drawn].astype(np.float64), scene.thumbnail.shape[0])
    else:
        colours[drawn], scale = labelled(values.values[drawn])
    right = scene.coloured(colours, drawn)
    if values.chosen is not None:
        right = scene.marked(right, values.chosen)
    left = panels([scene.outlined(), right], [title, values.title + left_out(drawn)])
    top = np.full((max(0, left.shape[0] - scene.thumbnail.shape[0]), scale.shape[1], 3), 255, np.uint8)
    return beside([left, below([top, scale])])


def measured(values: NDArray[np.float64], height: int) -> tuple[Picture, Picture]:
    """Colours (N, 3) of a finite measure (viridis), and their colour bar."""
    known = values if len(values) else np.zeros(1)
    exponent = np.frexp(np.abs(known).max())[1]
    known = np.ldexp(known, -exponent)  # the difference of two very large numbers is infinite
    low, high = np.percentile(known, [2, 98])
    if low == high:
        low, high = known.min(), known.max()
    share = np.clip((np.ldexp(values, -exponent) - low) / (high - low if high > low else 1), 0, 1)
    ticks = [f"{tick:.3g}" for tick in np.ldexp(np.linspace(low, high, TICKS), exponent)]
    ticks[0] = f"≤ {ticks[0]}" if known.min() < low else ticks[0]
    ticks[-1] = f"≥ {ticks[-1]}" if known.max() > high else ticks[-1]
    return viridis(share), colour_bar(viridis(np.linspace(0, 1, 256))[:, None], ticks, height)


def viridis(share: NDArray[np.float64]) -> Picture:
    """Colours (N, 3) of numbers from 0 to 1."""
    grey = np.rint(share * 255).astype(np.uint8)[:, None]
    if not len(grey):  # OpenCV takes no empty picture
        return np.zeros((0, 3), np.uint8)
    return np.asarray(cv2.applyColorMap(grey, cv2.COLORMAP_VIRIDIS)[:, 0, ::-1], np.uint8)


def labelled(values: NDArray[np.integer]) -> tuple[Picture, Picture]:
    """Colours (N, 3) of labels, and their legend."""
    names, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    said = [f"{name}: {n} patches" for name, n in zip(names.tolist(), counts.tolist(), strict=True)]
    return np.array(KELLY, np.uint8)[index], legend(said or ["no patches"], KELLY[: max(1, len(names))])


def contact_sheet(
    slide: Slide,
    view: View,
    origins_xy: NDArray[np.integer],
    shape_yx: tuple[int, int],
    features: NDArray[np.floating],
    *,
    k: int,
    columns: int,
    title: str,
) -> Picture:
    """Draw a row a cluster: its colour and size, and the patches nearest to its centre, nearest first.

    `origins_xy` (N, 2) are patches' corners at the `view`, `shape_yx` their rows and columns there.
    """
    labels, distances = clusters(features, k)
    factor = THUMB / max(shape_yx)
    size = max(1, round(shape_yx[1] * factor)), max(1, round(shape_yx[0] * factor))
    title += left_out(labels >= 0)
    rows = []
    for cluster in range(k):
        members = np.flatnonzero(labels == cluster)
        nearest = members[np.argsort(distances[members], kind="stable")][:columns]
        mark = np.full((size[1], 20, 3), KELLY[cluster], np.uint8)
        text = caption(f"{cluster}: {len(members)} patches", 130, rows=size[1])
        row = [mark, text]
        if len(nearest):
            read = read_patches(slide, view, origins_xy[nearest], shape_yx)
            row += [np.asarray(cv2.resize(p, size, interpolation=cv2.INTER_AREA), np.uint8) for p in read]
        rows.append(beside(row, 4))
    sheet = below(rows, GAP // 2)
    return below([caption(title, max(sheet.shape[1], 320)), sheet])
