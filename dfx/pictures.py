"""Pictures of a store: the slide, its patches, and what the features say of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dfx.errors import CallError, SlideError, StoreError
from dfx.remote import is_remote
from dfx.slides import Slide, open_slide
from dfx.store import Features

Picture = NDArray[np.uint8]
GAP, BAR = 16, 40


def principal_colours(features: NDArray[Any]) -> Picture:
    """First three principal components of features (N, D) as uint8 colours (N, 3).

    Each component is stretched from its 2nd to its 98th percentile, and signed so that its largest
    loading is positive: the same features give the same colours.
    """
    x = np.asarray(features, np.float64)
    x = x - x.mean(axis=0) if len(x) else x
    _, _, axes = np.linalg.svd(x.T @ x) if x.shape[1] <= len(x) else np.linalg.svd(x, full_matrices=False)
    axes = axes[:3]
    axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]
    scores = np.zeros((len(x), 3))
    scores[:, : len(axes)] = x @ axes.T
    if not len(x):
        return np.zeros((0, 3), np.uint8)
    low, high = np.percentile(scores, [2, 98], axis=0)
    return (
        np.asarray(np.clip((scores - low) / np.where(high > low, high - low, 1), 0, 1) * 255).round().astype(np.uint8)
    )


def overview(
    store: Features,
    slide: Slide | None = None,
    max_size: int = 900,
    storage_options: Mapping[str, Any] | None = None,
) -> Picture:
    """Draw a store side by side: the slide, its patch grid, and its patches in their PCA colours.

    uint8 RGB. `slide`: None opens the one that the store names, with `storage_options`; raises `SlideError` when
    it is gone.
    """
    slide = slide or stored_slide(store, storage_options)
    if slide.identity != store.attrs.get("fingerprint", {}).get("slide"):
        raise CallError(f"{store.path} was not made from {slide.url}: give the slide of {store.attrs['slide']['url']}.")
    thumbnail = slide.thumbnail(max_size)
    boxes = (
        store.to_baseline() * (np.array(thumbnail.shape[1::-1]) / slide.dimensions).repeat(2).reshape(2, 2).T.ravel()
    )
    corners = np.rint(boxes).astype(int)
    grid = thumbnail.copy()
    colours: Picture = ((thumbnail.astype(np.uint16) + 255 * 2) // 3).astype(np.uint8)
    for (x0, y0, x1, y1), colour in zip(
        corners.tolist(), principal_colours(store.features.compute(scheduler="sync")).tolist(), strict=True
    ):
        cv2.rectangle(grid, (x0, y0), (x1, y1), (20, 110, 60), 1)
        cv2.rectangle(colours, (x0, y0), (max(x0, x1 - 1), max(y0, y1 - 1)), colour, -1)
    patches = store.attrs["patches"]
    shape, units = patches["shape"], patches["units"]
    titles = (
        f"{Path(slide.url).name}  {slide.dimensions[0]} x {slide.dimensions[1]}",
        f"{len(boxes)} patches of {shape[0]} x {shape[1]} at {patches['resolution']} {units}",
        f"{store.encoder['name']}: first 3 principal components",
    )
    if store.encoder["weights"] == "random":
        titles = (*titles[:2], f"{store.encoder['name']}, RANDOM WEIGHTS: first 3 components")
    pictures: list[Picture] = [thumbnail, grid, colours]
    panels = [titled(panel, title) for panel, title in zip(pictures, titles, strict=True)]
    gap = np.full((panels[0].shape[0], GAP, 3), 255, np.uint8)
    return np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=1)


def titled(panel: Picture, title: str) -> Picture:
    """Put a title above a picture, as large as its width allows."""
    title = title.encode("ascii", "replace").decode()  # what OpenCV's fonts have
    bar = np.full((BAR, panel.shape[1], 3), 255, np.uint8)
    scale = 0.7
    while scale > 0.3 and cv2.getTextSize(title, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)[0][0] > panel.shape[1] - 8:
        scale -= 0.05
    cv2.putText(bar, title, (4, BAR - 14), cv2.FONT_HERSHEY_SIMPLEX, scale, (30, 30, 30), 1, cv2.LINE_AA)
    return np.concatenate([bar, panel])


def stored_slide(store: Features, storage_options: Mapping[str, Any] | None = None) -> Slide:
    """Open the slide that a store was made from."""
    said = store.attrs.get("slide")
    if said is None:
        raise StoreError(f"{store.path} holds loose patches, which have no slide to show.")
    if not is_remote(said["url"]) and not Path(said["url"]).exists():
        raise SlideError(f"{said['url']} does not exist any more: say where the slide is now with slide= (--slide).")
    mpp = None if said["mpp"] is None else tuple(said["mpp"])
    backend = said.get("backend", "auto").partition(" ")[0]
    return open_slide(said["url"], mpp=mpp, power=said["power"], storage_options=storage_options, backend=backend)


def write_png(picture: Picture, path: str | Path) -> Path:
    """Write a picture as PNG."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise CallError(f"{path} does not end with .png: pictures are written as PNG.")
    ok, data = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    if not ok:
        raise StoreError(f"{path} could not be encoded as PNG.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.tobytes())
    except OSError as e:
        raise StoreError(f"{path} can't be written ({e}): check the folder and its permissions.") from e
    return path
