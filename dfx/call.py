"""What a call of the extractor says, checked before anything is read or removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dfx.errors import CallError, CallTypeError
from dfx.grid import whole_pair
from dfx.masks import Segment, as_mask, is_method, polygons, segment_of
from dfx.remote import is_remote, local_path, shown
from dfx.resolution import check_resolution, one, pair
from dfx.run import Item
from dfx.slides import Slide
from dfx.table import rows_of


def check_workers(num_workers: object) -> int:
    """Refuse what is no number of threads."""
    if isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 0:
        raise CallError(f"num_workers must be a whole number of decoding threads (0: one a core), not {num_workers!r}.")
    return num_workers


def check_percent(memory_threshold: object) -> float:
    """Refuse what is no percentage."""
    if isinstance(memory_threshold, bool) or not isinstance(memory_threshold, int | float):
        raise CallTypeError(f"memory_threshold must be a percentage, not {memory_threshold!r}.")
    if not 0 < memory_threshold <= 100:
        raise CallError(f"memory_threshold must be above 0 and at most 100 percent, not {memory_threshold!r}.")
    return float(memory_threshold)


def check_seconds(block_timeout: object) -> float:
    """Refuse what is no time that a block may take."""
    if isinstance(block_timeout, bool) or not isinstance(block_timeout, int | float):
        raise CallTypeError(f"block_timeout must be a number of seconds, not {block_timeout!r}.")
    if not block_timeout > 0:
        raise CallError(f"block_timeout must be above 0 seconds, not {block_timeout!r}.")
    return float(block_timeout)


def store_name(output_file: object) -> str:
    """Name the store of loose patches: the stem of `output_file`, as the reference has it."""
    if output_file is not None and not isinstance(output_file, str | Path):
        raise CallTypeError(f"output_file must be a name, not {type(output_file).__name__}.")
    stem = Path(output_file or "output").stem
    if not stem or len(stem.encode()) > 200:
        raise CallError(f"output_file {str(output_file)!r} is no name that a store can have.")
    return f"{stem}.zarr"


def check_count(name: str, values: ArrayLike | Sequence[Any] | None, n: int) -> None:
    """Refuse masks or labels that are not one an image."""
    if values is None:
        return
    if isinstance(values, str | bytes) or not isinstance(values, Sequence | np.ndarray):
        raise CallTypeError(f"{name} must be a list with one for each image, not {type(values).__name__}.")
    if len(values) != n:
        raise CallError(f"there are {len(values)} {name} for {n} images: give one for each (None where there is none).")


def configuration(
    ioconfig: Any, shape: Any, resolutions: Any, stride: Any
) -> tuple[int | tuple[int, int] | None, Any, int | tuple[int, int] | None]:
    """Give patch shape, resolutions and stride; a TIAToolbox `ioconfig` or a mapping goes before the rest."""
    if ioconfig is not None:
        names = ("patch_input_shape", "input_resolutions", "stride_shape")
        if isinstance(ioconfig, Mapping):
            found = [ioconfig.get(name) for name in names]
        else:
            found = [getattr(ioconfig, name, None) for name in names]
        if found[0] is None or found[1] is None:
            raise CallTypeError(
                f"ioconfig must have patch_input_shape and input_resolutions, as attributes or keys; "
                f"{type(ioconfig).__name__} has not."
            )
        shape, resolutions, stride = found
    if shape is not None:
        shape = whole_pair(shape, "patch_input_shape")
    if stride is not None:
        stride = whole_pair(stride, "stride_shape")
    return shape, resolutions, stride


def resolution_of(resolutions: Any) -> tuple[Any, Any]:
    """Give the first of `input_resolutions` as (value, units)."""
    items = [resolutions] if isinstance(resolutions, Mapping) else resolutions
    if isinstance(items, str) or not isinstance(items, Sequence) or not items:
        raise CallTypeError("input_resolutions must be a list such as [{'resolution': 0.5, 'units': 'mpp'}].")
    for item in items:
        if not isinstance(item, Mapping) or set(item) != {"resolution", "units"}:
            raise CallTypeError(f"input_resolutions must hold mappings of 'resolution' and 'units', not {item!r}.")
    if len({item["units"] for item in items}) > 1:
        raise CallError("input_resolutions must have one kind of units; only the first is read.")
    value, units = items[0]["resolution"], items[0]["units"]
    value = value.tolist() if isinstance(value, np.ndarray) else value
    check_resolution(value, units)
    return (tuple(value) if isinstance(value, list) else value), units


def slide_items(
    images: Any,
    masks: Any,
    labels: Any,
    wsireader_kwargs: Mapping[str, Any] | None,
    *,
    tissue: str | Segment | None,
    storage_options: Mapping[str, Any] | None = None,
) -> list[Item]:
    """Check slides, masks and labels of a call and bring them together; a slide given twice is one.

    `tissue`: what finds it on slides without a mask; None: every patch is kept.
    """
    rows = rows_of(images, storage_options)
    for name, values in (("mask", masks), ("label", labels)):
        check_count(f"{name}s", values, len(rows))
        if values is not None and any(getattr(row, name) is not None for row in rows):
            raise CallError(
                f"{shown(str(images))} has a column {name}, and {name}s are given too: leave one of them out."
            )
    mpp, power = metadata_of(wsireader_kwargs)
    items: dict[Any, Item] = {}
    for n, row in enumerate(rows):
        image = row.given
        slide, own_mpp, own_power = address_of(row.slide)
        mask = row.mask if masks is None else masks[n]
        mask = tissue if mask is None else usable_mask(mask)
        label = row.label if labels is None else plain_label(labels[n])
        own = row.mpp or mpp or own_mpp, row.power or power or own_power
        item = Item((image,), slide, mask, label, *own, storage_options)
        same = items.setdefault(item.identity, item)
        if same is not item:
            if not same_mask(same.mask, mask) or same.label != label:
                raise CallError(f"{item.address} is given twice with different masks or labels: give it once.")
            items[item.identity] = replace(same, given=tuple(dict.fromkeys((*same.given, image))))
    return list(items.values())


def same_mask(one: Any, other: Any) -> bool:
    """Whether two masks keep the same."""
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    return type(one) is type(other) and bool(one == other)


def plain_label(label: Any) -> Any:
    """Give a label as JSON has it; refuse what is no number, text or None."""
    label = label.item() if isinstance(label, np.generic) else label
    if label is not None and not isinstance(label, bool | int | float | str):
        raise CallTypeError(f"a label is a number, a text or None, not {type(label).__name__}.")
    return label


def address_of(image: Any) -> tuple[str | Path | Slide, Any, Any]:
    """Give what is to be opened, and the mpp and power that came with it.

    TIAToolbox's `WSIReader` is known by its `input_path` and `info`; the file is read anew.
    """
    if isinstance(image, str | Path | Slide):
        return image, None, None
    if hasattr(image, "input_path") and hasattr(image, "info"):
        if image.input_path is None:
            raise CallTypeError(f"a {type(image).__name__} without a file can't be read by workers: give a path.")
        return Path(image.input_path), *metadata_of({"meta": image.info})
    hint = "; for arrays of patches pass patch_mode=True" if isinstance(image, np.ndarray) else ""
    raise CallTypeError(f"a slide is a path (str, Path), a Slide or a WSIReader, not {type(image).__name__}{hint}.")


def usable_mask(mask: Any) -> Any:
    """Give a mask as `PatchGrid.over` takes it; refuse a kind that can't be used, or a file that is not there.

    "none" is None, as on the command line, and "tissue" is "otsu". TIAToolbox's `VirtualWSIReader` is taken by
    its image.
    """
    if isinstance(mask, Slide):
        return mask
    if isinstance(mask, str) and mask in ("none", "tissue"):
        return None if mask == "none" else "otsu"
    if isinstance(mask, Mapping):
        list(polygons(mask, "the mask"))
        return mask
    if isinstance(getattr(mask, "img", None), np.ndarray):
        mask = mask.img
    if isinstance(mask, np.ndarray):
        return as_mask(mask)
    if is_method(mask):
        segment_of(mask)
        return mask
    if not isinstance(mask, str | Path):
        raise CallTypeError(
            f"a mask is None, an array (H, W), GeoJSON, an image path, a Slide, a method's name or a function, "
            f"not {type(mask).__name__}."
        )
    if is_remote(mask):
        return mask
    path = local_path(mask)
    if not path.is_file():
        raise CallError(f"mask {mask} is not a file: give an image file, GeoJSON, an array, or None.")
    return path.absolute()  # a worker may be in another folder


def metadata_of(wsireader_kwargs: Mapping[str, Any] | None) -> tuple[Any, Any]:
    """Give the mpp and power of `wsireader_kwargs`, or of the WSIMeta in it; any other key is refused."""
    if wsireader_kwargs is None:
        return None, None
    if not isinstance(wsireader_kwargs, Mapping):
        raise CallTypeError(f"wsireader_kwargs must be a mapping, not {type(wsireader_kwargs).__name__}.")
    unknown = sorted(map(str, set(wsireader_kwargs) - {"mpp", "power", "meta"}))
    if unknown:
        raise CallTypeError(f"wsireader_kwargs takes mpp, power and meta, not {', '.join(unknown)}.")
    meta = wsireader_kwargs.get("meta")
    mpp = wsireader_kwargs.get("mpp", getattr(meta, "mpp", None))
    power = wsireader_kwargs.get("power", getattr(meta, "objective_power", None))
    return (None if mpp is None else pair(mpp, "mpp")), (None if power is None else one(power, "power"))
