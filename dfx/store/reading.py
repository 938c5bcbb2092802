"""Reading a store, lazily."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import zarr
from numpy.typing import NDArray
from PIL import Image

from dfx import html
from dfx.errors import StoreError
from dfx.masks import Mask
from dfx.slides import Slide
from dfx.store.layout import dfx_attributes
from dfx.store.place import At, place_of


class Features:
    """A complete store, read lazily. `.attrs` is what it says of itself (see README, "The store")."""

    def __init__(self, path: At, encoder: str | None = None, storage_options: Mapping[str, Any] | None = None) -> None:
        place = place_of(path, storage_options)
        self.path = place.output
        self._name = place.name
        self.storage_options = storage_options
        attributes = dfx_attributes(place)
        if attributes is None:
            raise StoreError(f"{place} is no store of dfx: give a <name>.zarr that a run wrote.")
        if attributes.get("status") != "complete":
            reason = f": {attributes['failure']}" if "failure" in attributes else ""
            raise StoreError(f"{place} is {attributes.get('status')}, not complete{reason}; run the extraction again.")
        self.attrs: dict[str, Any] = attributes
        self._group = zarr.open_group(place.zarr(), mode="r", zarr_format=3)
        several: dict[str, Any] | None = attributes.get("encoders")
        self._said = several or {attributes["encoder"]["name"]: attributes["encoder"]}
        if encoder is not None and encoder not in self._said:
            raise StoreError(f"{place} holds features of {', '.join(self._said)}, not of {encoder}.")
        self._chosen = encoder

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the encoders whose features it holds."""
        return tuple(self._said)

    @property
    def encoder(self) -> dict[str, Any]:
        """What the store says of the encoder that it was opened for."""
        return dict(self._said[self._one()])

    @property
    def features(self) -> da.Array:
        """(N, D) lazy array; raises `StoreError` where there are several and none was chosen."""
        name = self._one()
        return self._lazy(f"features/{name}" if "encoders" in self.attrs else "features")

    def _one(self) -> str:
        if self._chosen is None and len(self._said) > 1:
            raise StoreError(
                f"{self.path} holds features of {', '.join(self._said)}: say which with encoder= (--encoder)."
            )
        return self._chosen or next(iter(self._said))

    @property
    def coordinates(self) -> da.Array:
        """int64 (N, 4) lazy array: [x0, y0, x1, y1] at the requested resolution, end exclusive."""
        return self._lazy("coordinates")

    def to_baseline(self) -> NDArray[np.float64]:
        """float64 (N, 4): the coordinates in baseline (level 0) pixels."""
        return np.asarray(self.coordinates.compute(scheduler="synchronous") * np.tile(self.scale, 2))

    @property
    def scale(self) -> tuple[float, float]:
        """(x, y) factors from coordinates to baseline pixels."""
        attributes = self._group[self._present("coordinates")].attrs
        x, y = np.asarray(attributes["to_baseline"], float).tolist()
        return x, y

    @property
    def mask(self) -> Mask | None:
        """The mask that chose the patches, bool (rows, columns) over the whole slide; None where none did."""
        return stored_mask(self._group)

    def plot(
        self,
        values: str | Path | NDArray[Any] | None = None,
        *,
        slide: Slide | None = None,
        max_size: int = 900,
    ) -> Image.Image:
        """Draw the slide, the outline of its tissue, and its patches; a Pillow image, which notebooks show.

        `values`: None draws the patch grid and the features' first three principal components as colours;
        "similarity:ROW" the cosine similarity to a patch, "cluster:K" groups by k-means; an array or .npy file
        of one value a patch is drawn as labels where it has at most 20 different integers, else as a measure.
        `slide`: where it lies now, if it moved; else the one that the store names is opened, with the store's
        `storage_options`. `max_size`: pixels of a panel's longer side. Raises `CallError` for
        values that can't be drawn, `SlideError` when the slide is gone, `StoreError` when the store has none.
        """
        from dfx.store import drawing

        return Image.fromarray(drawing.plot(self, values, slide, max_size))

    def contact_sheet(self, clusters: int = 8, *, columns: int = 10, slide: Slide | None = None) -> Image.Image:
        """Draw a row a cluster (k-means) with the patches nearest to its centre; raises as `plot` does."""
        from dfx.store import drawing

        return Image.fromarray(drawing.contact_sheet(self, clusters, columns, slide))

    def _lazy(self, name: str) -> da.Array:
        return da.from_zarr(self._group[self._present(name)])

    def _present(self, name: str) -> str:
        if name not in self._group:
            raise StoreError(f"{self.path} has no {name}: it holds loose patches, not those of a slide.")
        return name

    def __repr__(self) -> str:
        return f"Features({str(self.path)!r}, {', '.join(self._said)})"

    def _repr_html_(self) -> str:
        rows: dict[str, object] = {"slide": self.attrs.get("slide", {}).get("url", "loose patches")}
        patches = self.attrs.get("patches")
        if patches is not None:
            height, width = patches["shape"]
            rows["patches"] = f"{height} x {width} at {patches['resolution']} {patches['units']}"
        for name, said in self._said.items():
            node = self._group[f"features/{name}" if "encoders" in self.attrs else "features"]
            assert isinstance(node, zarr.Array)
            random = ", random weights" if said["weights"] == "random" else ""
            rows[f"features of {name}"] = f"{node.shape[0]} x {node.shape[1]} {node.dtype}{random}"
        return html.table(f"Features {self._name}", rows)


def stored_mask(group: zarr.Group) -> Mask | None:
    """Read the mask of a store, complete or not; None where there is none, as before masks were kept."""
    array = group.get("mask")
    return Mask(np.asarray(array[...], np.bool_), str(array.attrs["method"])) if isinstance(array, zarr.Array) else None


def open_features(path: At, encoder: str | None = None, storage_options: Mapping[str, Any] | None = None) -> Features:
    """Open a complete store, by its path or URL.

    `encoder`: whose features are wanted; needed only where there are several. `storage_options`: as in `open_slide`.
    Raises `StoreError` for what is no store of dfx, is not complete, or has nothing of that encoder.
    """
    return Features(path, encoder, storage_options)
