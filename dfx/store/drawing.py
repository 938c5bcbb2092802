"""Pictures of a store: the slide is opened where the store says it lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfx import pictures
from dfx.errors import CallError, SlideError, StoreError
from dfx.remote import is_remote, local_path
from dfx.slides import Slide, is_same, open_slide

if TYPE_CHECKING:
    from dfx.store.reading import Features


def stored_slide(
    path: Path | str,
    attributes: dict[str, Any],
    slide: Slide | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Slide:
    """Open the slide that a store was made from, or check that `slide` is it.

    `attributes` is what the store says of itself. Raises `StoreError` when it has no slide, `SlideError` when the slide
    is gone, `CallError` when another is given.
    """
    said = attributes.get("slide")
    if said is None:
        raise StoreError(f"{path} holds loose patches, which have no slide to show.")
    if slide is None:
        if not is_remote(said["url"]) and not local_path(said["url"]).exists():
            raise SlideError(
                f"{said['url']} does not exist any more: say where the slide is now with slide= (--slide)."
            )
        mpp = None if said["mpp"] is None else tuple(said["mpp"])
        backend = said.get("backend", "auto").partition(" ")[0]
        slide = open_slide(said["url"], mpp, said["power"], storage_options, backend=backend)
    if not is_same(attributes.get("fingerprint", {}).get("slide"), slide.identity):
        raise CallError(f"{path} was not made from {slide.url}: give the slide of {said['url']}.")
    return slide


def plot(store: Features, values: Any, slide: Slide | None, max_size: int) -> pictures.Picture:
    """Draw a store; see `Features.plot`."""
    slide = stored_slide(store.path, store.attrs, slide, store.storage_options)
    features = store.features.compute(scheduler="sync")
    found = None if values is None else pictures.values_of(values, features)
    scene = pictures.Scene.of(slide, store.to_baseline(), store.mask, max_size)
    tissue = "" if store.mask is None else f", tissue by {store.mask.method}"
    title = f"{Path(slide.url).name}  {slide.dimensions[0]} x {slide.dimensions[1]}{tissue}"
    if found is not None:
        named = replace(found, title=f"{encoder_title(store)}: {found.title}")
        return pictures.value_map(scene, named, title)
    patches = store.attrs["patches"]
    rows, columns = patches["shape"]
    grid = f"{len(features)} patches of {rows} x {columns} at {patches['resolution']} {patches['units']}"
    return pictures.overview(scene, features, (title, grid, f"{encoder_title(store)}: first 3 principal components"))


def contact_sheet(store: Features, k: int, columns: int, slide: Slide | None) -> pictures.Picture:
    """Draw a store's patches by cluster; see `Features.contact_sheet`."""
    if isinstance(columns, bool) or not isinstance(columns, int) or not 1 <= columns <= 100:
        raise CallError(f"a row of a contact sheet has 1 to 100 patches, not {columns!r}.")
    slide = stored_slide(store.path, store.attrs, slide, store.storage_options)
    patches = store.attrs["patches"]
    resolution = patches["resolution"]
    view = slide.view(tuple(resolution) if isinstance(resolution, list) else resolution, patches["units"])
    origins = np.asarray(store.coordinates.compute(scheduler="sync"))[:, :2]
    features = store.features.compute(scheduler="sync")
    title = f"{Path(slide.url).name}, {encoder_title(store)}: {k} clusters (k-means), patches nearest to their centres"
    return pictures.contact_sheet(
        slide, view, origins, tuple(patches["shape"]), features, k=k, columns=columns, title=title
    )


def encoder_title(store: Features) -> str:
    """Name the encoder, and say so where it is untrained."""
    random = ", RANDOM WEIGHTS" if store.encoder["weights"] == "random" else ""
    return f"{store.encoder['name']}{random}"
