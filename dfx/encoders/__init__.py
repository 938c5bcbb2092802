"""Encoders: networks with their preprocessing, from uint8 patches to features.

Importing this is cheap; torch is imported when an encoder is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dfx.encoders.behaviour import BEHAVIOURS, Behaviour, behaviour_difference, measure, read_behaviour
from dfx.encoders.cards import Card, list_encoders, unusual_mpp
from dfx.encoders.segmenter import Segmenter, load_segmenter
from dfx.encoders.spec import EncoderSpec, Triple
from dfx.errors import CallError, CallTypeError
from dfx.grid import whole_pair

if TYPE_CHECKING:
    from torch import nn

EncoderLike: TypeAlias = "str | nn.Module | EncoderSpec"

__all__ = [
    "BEHAVIOURS",
    "Behaviour",
    "Card",
    "EncoderLike",
    "EncoderSpec",
    "Segmenter",
    "behaviour_difference",
    "check_device",
    "device_here",
    "encode",
    "footprint",
    "list_encoders",
    "load_encoder",
    "load_segmenter",
    "measure",
    "output",
    "read_behaviour",
    "unusual_mpp",
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
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> EncoderSpec:
    """Describe an encoder so that any worker can build it.

    `encoder`: a name of `list_encoders()` (whatever its case, `-` and `_`) or of timm, or a `torch.nn.Module`.

    `weights`: a local file (safetensors or a state dict; its names may have any prefix), the index of its shards
    (`*.index.json`), or the folder of its repository. For a named encoder also "random" (untrained), or None: the file
    or folder of its name in the folder of the environment's DFX_WEIGHTS (`uni.safetensors`, `.pt`, `.pth`, `.bin`, or a
    folder `phikon/`), else the published weights, at `revision` if given. Code of a repository runs only with
    `trust_remote_code=True` and a `revision` that is a commit (or `weights`, a folder). The digest of this code is part
    of the weights' digest, so workers run the same code.

    A module gets float32 NCHW RGB in [0, 1], less `mean` and divided by `std` where given, patches as they
    are unless `input_size` is given; one with TIAToolbox's `infer_batch` is honoured as it is.
    `pooling` ("cls", "mean", "cls+mean") makes a vector of tokens or maps. The module is copied as
    it is now, and is itself left untouched. `compile`: workers run it through `torch.compile`.

    `precision`: in which the network computes, on any device. None: as its card says on a GPU (autocast; features are
    float32 all the same), float32 on a CPU. A store names both, so a run may go on on the other device: features of
    one encoder are equal to within the lesser of the two.

    Raises `EncoderError` for an unknown name, weights that are missing, gated, unreadable or of another
    architecture; `CallTypeError` for what is no encoder.
    """
    if isinstance(encoder, EncoderSpec):
        if weights is not None:
            raise CallError(f"encoder {encoder.name} is loaded already: give weights= to load_encoder, not here.")
        return encoder
    if revision is not None and not (isinstance(encoder, str) and weights is None):
        raise CallError("revision= is of published weights: give it with a name, and without weights=.")
    if input_size is not None:
        input_size = whole_pair(input_size, "input_size")
    if weights is not None and not isinstance(weights, str | Path):
        raise CallTypeError(f"weights must be a path, 'random' or None, not {type(weights).__name__}.")
    if isinstance(encoder, str):
        from dfx.encoders import modules, named

        spec = named.named_spec(encoder, weights, trusted=bool(trust_remote_code), revision=revision)
    else:
        spec = _module_spec(encoder, weights)
    spec = spec.with_options(
        mean=mean, std=std, input_size=input_size, pooling=pooling, precision=precision, compile=bool(compile)
    )
    if isinstance(encoder, str) and spec.weights != "random" and not spec.weights.startswith("hub:"):
        modules.module_of(spec)  # weights of another architecture are refused now, not on a worker
    return spec


def _module_spec(module: Any, weights: str | Path | None) -> EncoderSpec:
    import sys

    torch = sys.modules.get("torch")  # a module can't exist before torch is imported
    if torch is None or not isinstance(module, torch.nn.Module):
        raise CallTypeError(f"an encoder is a name or a torch.nn.Module, not {type(module).__name__}.")
    from dfx.encoders import hub, modules

    if weights is None:
        return modules.module_spec(module)
    if weights == "random":
        raise CallError("weights='random' is for named encoders: a module has its weights already.")
    return modules.module_spec(module, hub.given(hub.Wanted(type(module).__name__, (hub.FILES,), None), weights))


def check_device(device: object) -> str:
    """Give a device name; raises `CallTypeError` or `EncoderError` for what is none."""
    if not isinstance(device, str):
        device = str(device) if type(device).__module__ == "torch" else device
    if not isinstance(device, str):
        raise CallTypeError(f"device must be a name such as 'auto', 'cpu' or 'cuda:0', not {device!r}.")
    from dfx.encoders import network

    network.parse_device(device)
    return device


def device_here(device: str) -> str:
    """Give the device that a name means in this process ("auto": the best); raises `EncoderError` where it has none."""
    from dfx.encoders import network

    return network.choose_device(device)


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
