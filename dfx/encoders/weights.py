"""Weights files: hashed, read without unpickling anything, and held against the network."""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfx.errors import EncoderError

WRAPPERS = ("state_dict", "model_state_dict", "model", "teacher", "module")
"""Under which training scripts put a state dict, the first one found."""


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict from safetensors, or from torch's format with `weights_only=True`.

    Nothing but tensors is taken from the file, so an untrusted file runs no code.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            # DINO's training scripts save their arguments beside the weights: attributes, and no code.
            with torch.serialization.safe_globals([argparse.Namespace]):
                found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # both readers raise many kinds
        raise EncoderError(
            f"weights {path} can't be read as {'safetensors' if path.suffix == '.safetensors' else 'a state dict'} "
            f"({type(e).__name__}): it is damaged, or holds more than tensors, and only tensors are taken from a file; "
            "save module.state_dict() with safetensors.torch.save_file or torch.save."
        ) from e
    for wrapper in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
            break
    tensors = isinstance(found, dict) and all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in found.items()
    )
    if not tensors or not found:
        raise EncoderError(f"weights {path} hold no state dict (names and tensors): save module.state_dict() alone.")
    if all(name.startswith("module.") for name in found):  # saved from DataParallel
        found = {name.removeprefix("module."): value for name, value in found.items()}
    return dict(found)


def load_into(module: nn.Module, path: Path, name: str, *, prefix: str = "") -> None:
    """Load a file into a network; every parameter must get a value, and only a classifier's may be left over.

    `prefix`: where any name in the file begins with it, those that do are the network's, and others are not.
    """
    state = read_state_dict(path)
    if prefix and any(key.startswith(prefix) for key in state):
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    convert = getattr(sys.modules.get(type(module).__module__), "checkpoint_filter_fn", None)
    heads = tuple(f"{head}." for head in classifiers(module))
    try:
        if convert is not None:  # timm's own remapping of published checkpoints
            state = convert(state, module)
        missing, unexpected = module.load_state_dict(state, strict=False)
    except (RuntimeError, KeyError, ValueError, AttributeError, IndexError) as e:
        lines = str(e).splitlines()
        detail = (lines[1] if len(lines) > 1 else str(e)).strip()
        raise EncoderError(
            f"weights {path} are not those of '{name}': {detail} Give the file of this architecture."
        ) from e
    unexpected = [key for key in unexpected if not key.startswith(heads)] if heads else list(unexpected)
    if missing or unexpected:
        raise EncoderError(
            f"weights {path} are not those of '{name}': "
            f"{len(missing)} parameters get no value{some(missing)} and "
            f"{len(unexpected)} values have no place{some(unexpected)}. "
            "Give the file of this architecture."
        )


def some(names: list[str]) -> str:
    """Name a few of many."""
    return f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else ""


def classifiers(module: nn.Module) -> list[str]:
    """Names of the classifying layers that a timm model had before they were removed."""
    config = getattr(module, "pretrained_cfg", None) or {}
    head = config.get("classifier")
    heads = [head] if isinstance(head, str) else list(head or ())
    return [*heads, "head_dist"] if heads == ["head"] else heads
