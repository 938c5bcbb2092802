"""Encoders: networks with their preprocessing, from uint8 patches to features.

Importing this is cheap; torch is imported when an encoder is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dfx.encoders.cards import Card, list_encoders
from dfx.encoders.segmenter import Segmenter, load_segmenter
from dfx.encoders.spec import EncoderSpec, Triple
from dfx.errors import CallError, CallTypeError
from dfx.grid import whole_pair

if TYPE_CHECKING:
    from torch import nn

EncoderLike: TypeAlias = "str | nn.Module | EncoderSpec"

__all__ = [
    "Card",
    "EncoderLike",
    "EncoderSpec",
    "Segmenter",
    "check_device",
    "encode",
    "footprint",
    "list_encoders",
    "load_encoder",
    "load_segmenter",
    "output",
]


def load_encoder(
    encoder: EncoderLike,
    *,
    weights: str | Path | None = None,
    mean: Triple | None = None,
    std: Triple | None = None,
    input_size: int | tuple[int, int] | None = None,
    pooling: str | None = None,
    precision: str | None = None,
    compile: bool = False,
) -> EncoderSpec:
    """Describe an encoder so that any worker can build it.

    `encoder`: the name of a timm model, or a `torch.nn.Module`. `weights` of a named one: None for
    its published weights, a local `.safetensors` or state-dict file, or "random" for none. A module
    gets float32 NCHW RGB in [0, 1], less `mean` and divided by `std` where given, patches as they
    are unless `input_size` is given; one with TIAToolbox's `infer_batch` is honoured as it is.
    `pooling` ("cls", "mean", "cls+mean") makes a vector of tokens or maps. The module is copied as
    it is now, and is itself left untouched. `compile`: workers run it through `torch.compile`. Raises
    `EncoderError` for an unknown name, weights that are missing, unreadable or of another
    architecture; `CallTypeError` for what is no encoder.
    """
    if isinstance(encoder, EncoderSpec):
        if weights is not None:
            raise CallError(f"encoder {encoder.name} is loaded already: give weights= to load_encoder, not here.")
        return encoder
    if input_size is not None:
        input_size = whole_pair(input_size, "input_size")
    if weights is not None and not isinstance(weights, str | Path):
        raise CallTypeError(f"weights must be a path, 'random' or None, not {type(weights).__name__}.")
    if isinstance(encoder, str):
        from dfx.encoders import modules

        spec = modules.timm_spec(encoder, weights)
    else:
        spec = _module_spec(encoder, weights)
    spec = spec.with_options(
        mean=mean, std=std, input_size=input_size, pooling=pooling, precision=precision, compile=bool(compile)
    )
    if isinstance(encoder, str) and weights not in (None, "random"):
        modules.module_of(spec)  # weights of another architecture are refused now, not on a worker
    return spec


def _module_spec(module: Any, weights: str | Path | None) -> EncoderSpec:
    import sys

    torch = sys.modules.get("torch")  # a module can't exist before torch is imported
    if torch is None or not isinstance(module, torch.nn.Module):
        raise CallTypeError(f"an encoder is a name or a torch.nn.Module, not {type(module).__name__}.")
    from dfx.encoders import modules
    from dfx.encoders import weights as files

    if weights is None:
        return modules.module_spec(module)
    if weights == "random":
        raise CallError("weights='random' is for named encoders: a module has its weights already.")
    spec = modules.module_spec(module)
    files.load_into(spec.module, files.weights_file(weights), type(module).__name__)
    return modules.module_spec(spec.module)


def check_device(device: object) -> str:
    """Give a device name; raises `CallTypeError` or `EncoderError` for what is none."""
    if not isinstance(device, str):
        device = str(device) if type(device).__module__ == "torch" else device
    if not isinstance(device, str):
        raise CallTypeError(f"device must be a name such as 'auto', 'cpu' or 'cuda:0', not {device!r}.")
    from dfx.encoders import network

    network.parse_device(device)
    return device


def output(spec: EncoderSpec, shape_yx: tuple[int, int], channels: int = 3) -> tuple[int, np.dtype[Any]]:
    """Width and dtype of an encoder's features for patches of a shape."""
    from dfx.encoders import network

    found = network.probe(spec, shape_yx, channels)
    return found.dim, np.dtype(found.dtype)


def footprint(spec: EncoderSpec, shape_yx: tuple[int, int], channels: int = 3) -> tuple[int, int]:
    """Bytes of an encoder's weights, and of its activations a patch."""
    from dfx.encoders import network

    found = network.probe(spec, shape_yx, channels)
    return found.weights, found.activations


def encode(
    spec: EncoderSpec,
    patches: NDArray[np.uint8],
    *,
    batch_size: int = 64,
    device: str = "auto",
    threads: int | None = None,
) -> NDArray[np.floating[Any]]:
    """Encode uint8 patches (N, rows, columns, 3) in this process: (N, D)."""
    from dfx.encoders import network

    return network.network(spec, device)(patches, batch_size=batch_size, threads=threads)
