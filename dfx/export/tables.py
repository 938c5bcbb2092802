"""AnnData, and SpatialData as LazySlide and wsidata have it.

spatialdata pins an old dask, so its zarr layout (container version 0.2, shapes 0.3, tables 0.2) is written here
with the libraries that it is made of; a test has spatialdata read it in an environment of its own.
"""

from __future__ import annotations

import json
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dask
import numpy as np
import zarr

from dfx.export.output import Output, needed
from dfx.export.source import Source
from dfx.store import Features

TILES, LIBRARY, INSTANCE = "tiles", "library_id", "tile_id"
"""Of SpatialData: the name of the shapes, and the columns by which a table's rows belong to them."""
MARK = "dfx_export"
"""Root attribute of a folder that an export wrote, and may replace."""
AXES = [{"name": name, "type": "space", "unit": "unit"} for name in ("x", "y")]


def anndata(source: Source) -> list[Output]:
    """Give one AnnData file: features in `X`, corners in `obs`, centres in `obsm["spatial"]`, level-0 pixels."""
    features = source.one
    ad = needed("anndata")

    def write(path: Path) -> None:
        table = annotated(source, features)
        table.obs["x"], table.obs["y"] = source.corners.T
        table.obsm["spatial"] = source.exact + source.extent_xy / 2
        table.uns["dfx"] = json.dumps(source.attrs)
        if "label" in source.attrs:
            table.obs["label"] = source.attrs["label"]
        with needed("h5py").File(path, "x") as file:
            write_table(ad, file, "/", table)

    return [Output(f"{source.name}.h5ad", write)]


def spatialdata(source: Source) -> list[Output]:
    """Give one SpatialData zarr: shapes `tiles` (boxes in level-0 pixels) and a table `<encoder>_tiles` an encoder."""
    ad, geopandas, shapely, pandas = map(needed, ("anndata", "geopandas", "shapely", "pandas"))
    needed("pyarrow")
    count = np.arange(len(source))

    def write(path: Path) -> None:
        root = zarr.create_group(
            path,
            attributes={
                "spatialdata_attrs": {"version": "0.2", "spatialdata_software_version": "0.7.3"},
                "tile_spec": {TILES: tile_spec(source)},
                MARK: {"version": version("dfx"), **source.attrs},
            },
        )
        root.create_group("shapes").create_group(
            TILES,
            attributes={
                "encoding-type": "ngff:shapes",
                "axes": ["x", "y"],
                "coordinateTransformations": [
                    {
                        "type": "identity",
                        "input": {"name": "xy", "axes": AXES},
                        "output": {"name": "global", "axes": AXES},
                    }
                ],
                "spatialdata_attrs": {"version": "0.3"},
            },
        )
        (x0, y0), (x1, y1) = source.corners.T, (source.corners + np.rint(source.extent_xy)).T
        shapes = geopandas.GeoDataFrame(
            {
                INSTANCE: count,
                "x": x0,
                "y": y0,
                "tissue_id": np.zeros(len(count), np.int64),
                "geometry": geopandas.GeoSeries(shapely.box(x0, y0, x1, y1)),
            },
            geometry="geometry",
        )
        with (path / "shapes" / TILES / "shapes.parquet").open("wb") as file:  # pyarrow takes some paths for URIs
            shapes.to_parquet(file)
        tables = root.create_group("tables")
        for name, features in source.encoders.items():
            table = annotated(source, features)
            table.obs[INSTANCE] = count
            table.obs[LIBRARY] = pandas.Categorical([TILES] * len(count), categories=[TILES])
            keys = {"region": TILES, "region_key": LIBRARY, "instance_key": INSTANCE}
            table.uns["spatialdata_attrs"] = keys
            write_table(ad, tables, f"{name}_{TILES}", table)
            said = {"spatialdata-encoding-type": "ngff:regions_table", "version": "0.2"}
            tables[f"{name}_{TILES}"].attrs.update(said | keys)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Consolidated metadata")  # not in the zarr 3 standard yet
            warnings.filterwarnings("ignore", message="Object at")  # the parquet file
            zarr.consolidate_metadata(path)

    return [Output(f"{source.name}.zarr", write, replaceable=is_exported)]


def tile_spec(source: Source) -> dict[str, Any]:
    """Say how tiles lie, as wsidata's `TileSpec` has it."""
    (height, width), downsample = source.shape_yx, float(source.extent_xy[0] / source.shape_yx[1])
    shape = source.attrs["patches"]["shape"]
    return {
        "height": height,
        "width": width,
        "stride_height": height if source.free else round(source.stride_yx[0] * height / shape[0]),
        "stride_width": width if source.free else round(source.stride_yx[1] * width / shape[1]),
        "mpp": None if source.mpp is None else source.mpp[0] * downsample,
        "ops_level": 0,
        "ops_downsample": downsample,
        "base_level": 0,
        "base_downsample": downsample,
        "tissue_name": None,
    }


def annotated(source: Source, features: Features) -> Any:
    """Give features as a table whose `X` is lazy, rows named by their number."""
    pandas = needed("pandas")
    array = features.features
    return needed("anndata").AnnData(
        X=array.rechunk((min(4096, max(1, len(source))), array.shape[1])),
        obs=pandas.DataFrame(index=np.arange(len(source)).astype(str)),
        var=pandas.DataFrame(index=np.arange(array.shape[1]).astype(str)),
    )


def write_table(ad: Any, place: Any, name: str, table: Any) -> None:
    """Write a table, its features some thousand rows at a time."""
    with dask.config.set(scheduler="synchronous"), ad.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False):
        ad.io.write_elem(place, name, table)


def is_exported(path: Path) -> bool:
    """Whether a folder is what an export wrote."""
    try:
        return MARK in zarr.open_group(path, mode="r").attrs
    except (OSError, ValueError, KeyError):
        return False
