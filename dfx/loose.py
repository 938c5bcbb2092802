"""Loose patches: arrays and image files that are encoded as they are, without a slide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
from numpy.typing import NDArray

from dfx import cluster, kernel
from dfx.errors import CallError, CallTypeError, DfxError, RunError, SlideError
from dfx.masks import image_file
from dfx.plan import Head, Options
from dfx.remote import local_path

ENDINGS = (".npy", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")


@dataclass(frozen=True, eq=False)
class Patches:
    """Patches of one shape, in memory or in files."""

    source: NDArray[Any]
    """uint8 (N, rows, columns, channels), or (N,) paths."""
    shape_yx: tuple[int, int]
    """Rows and columns of each."""

    @property
    def channels(self) -> int:
        """Channels of each."""
        return int(self.source.shape[3]) if self.source.ndim == 4 else 3


def gather(images: object, shape_yx: tuple[int, int] | None, *, any_kind: bool = False) -> Patches:
    """Check loose patches: an NHWC array, a list of HWC arrays, or a list of image files.

    Raises `CallTypeError` or `CallError` for what can't be patches, `SlideError` for a file that
    can't be read. `shape_yx`, where given, is the shape that they must have. `any_kind` takes arrays of
    any number of channels and dtype, for a model that prepares patches by itself.
    """
    if isinstance(images, np.ndarray):
        source = images
    elif isinstance(images, Sequence) and not isinstance(images, str | bytes) and len(images):
        if all(isinstance(image, np.ndarray) for image in images):
            shapes = {image.shape for image in images}
            if len(shapes) > 1:
                raise CallError(f"patches must have one shape, not {sorted(shapes)[:4]}: run each shape by itself.")
            source = np.stack(images)
        elif all(isinstance(image, str | Path) for image in images):
            source = np.array([str(local_path(image).absolute()) for image in images])
        else:
            kinds = sorted({type(image).__name__ for image in images})
            raise CallTypeError(f"patches must all be arrays or all be image files, not {', '.join(kinds)}.")
    else:
        kind = "an empty list" if isinstance(images, list | tuple) else type(images).__name__
        raise CallTypeError(
            f"patch mode takes an array (N, rows, columns, 3), a list of arrays or a list of image files, "
            f"not {kind}; for slides pass patch_mode=False."
        )
    if source.ndim == 1:
        first = read_image(str(source[0]))
        return Patches(source, check_shape(first.shape[:2], shape_yx))
    picture = source.ndim == 4 and source.dtype == np.uint8 and source.shape[3] == 3
    if source.ndim != 4 or not source.size or source.dtype.kind not in "uif" or not (picture or any_kind):
        raise CallError(
            f"patches must be uint8 RGB of shape (N, rows, columns, 3), not {source.dtype} of shape {source.shape}."
        )
    return Patches(source, check_shape(source.shape[1:3], shape_yx))


def check_shape(found: tuple[int, ...], asked: tuple[int, int] | None) -> tuple[int, int]:
    """Raise `CallError` when patches are not of the shape that was asked for."""
    if asked is not None and tuple(found) != asked:
        raise CallError(
            f"patches have {found[0]} x {found[1]} pixels, but patch_input_shape is {asked}: resize or omit it."
        )
    return int(found[0]), int(found[1])


def read_image(path: str) -> NDArray[np.uint8]:
    """Read an image file or a .npy as uint8 RGB (rows, columns, 3); raises `SlideError`.

    Rows and columns are as stored, as in slides: orientation tags are not applied. Grey becomes RGB, and a
    transparent image is laid over white.
    """
    file = Path(path)
    if file.suffix.lower() not in ENDINGS:
        raise SlideError(
            f"{path} is no patch that can be read: give {', '.join(ENDINGS)}; for slides pass patch_mode=False."
        )
    if not file.is_file():
        raise SlideError(f"{path} does not exist: check the path.")
    try:
        with file.open("rb") as opened:
            if file.suffix.lower() == ".npy":
                found = np.load(opened, allow_pickle=False)
            else:
                found = as_picture(image_file.read_image(opened))
    except image_file.ImageError as e:
        raise SlideError(f"{path} {e}.") from e
    except Exception as e:  # numpy raises many kinds
        raise SlideError(f"{path} can't be read as an image ({type(e).__name__}: {e}).") from e
    if found.dtype != np.uint8 or found.ndim != 3 or found.shape[2] != 3:
        raise SlideError(f"{path} is no 8-bit RGB image: convert it.")
    return np.asarray(found)


def as_picture(image: image_file.Image) -> NDArray[Any]:
    """Return an 8-bit image as RGB, over white where it is transparent; other images unchanged.

    Raises `ImageError` for an image that is fully transparent, and for pixels that the file lacks.
    """
    pixels = image.pixels
    if pixels.dtype != np.uint8:
        return pixels
    if image.valid is not None and not image.valid.all():
        raise image_file.ImageError("has pixels without data: fill them and save it again")
    colours = pixels
    if pixels.shape[2] in (2, 4):
        alpha = pixels[..., -1:].astype(np.uint16)
        if not alpha.any():
            raise image_file.ImageError("is transparent in all pixels: save it without alpha")
        colours = pixels[..., :-1]
        if (alpha < 255).any():
            inside = colours * np.uint16(1) if image.associated else (colours * alpha + 127) // 255
            colours = np.minimum(inside + (255 - alpha), 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(colours, (*colours.shape[:2], 3)))


def read_and_encode(block: NDArray[Any], head: Head, options: Options, shape_yx: tuple[int, int]) -> NDArray[Any]:
    """Encode a block of patches, reading them first where they are paths."""
    if block.dtype.kind == "U":
        images = []
        for path in block.ravel().tolist():
            image = read_image(path)
            if image.shape[:2] != shape_yx:
                raise SlideError(
                    f"{path} has {image.shape[0]} x {image.shape[1]} pixels, the first patch has {shape_yx}."
                )
            images.append(image)
        block = np.stack(images)
    threads = cluster.task_threads()
    cluster.check_encoders([head], options.device, threads, block.shape[3])
    return kernel.encode_patches(
        block, head.encoder, batch_size=options.batch_size, device=options.device, threads=threads
    )


def encode_all(patches: Patches, head: Head, options: Options, client: Any = None) -> NDArray[np.floating[Any]]:
    """Encode loose patches, (N, D), on a client's workers (None: on threads of this process)."""
    dim, dtype = head.dim, head.dtype
    cluster.share(head.encoder, client)
    source = patches.source if patches.source.ndim == 4 else patches.source[:, None]
    blocks = da.from_array(source, chunks=(options.block_size, *source.shape[1:]))
    task = partial(read_and_encode, head=head, options=options, shape_yx=patches.shape_yx)
    lazy = da.map_blocks(
        task,
        blocks,
        chunks=(blocks.chunks[0], (dim,)),
        drop_axis=[2, 3] if source.ndim == 4 else None,
        dtype=dtype,
        meta=np.empty((0, 0), dtype),
    )
    # Patches that the caller holds in memory can reach workers through the graph only; that's no mistake to warn of.
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TB"}):
        try:
            found: NDArray[np.floating[Any]] = lazy.compute(scheduler=client or "threads")
        except DfxError:
            raise
        except Exception as e:  # a worker's death, a lost client, an error that does not pickle
            raise RunError(f"loose patches could not be encoded ({type(e).__name__}: {e}); run again.") from e
    return found
