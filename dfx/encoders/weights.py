"""Files of weights: their digests, their shards, and their tensors, read without unpickling anything else."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from dfx.errors import EncoderError

INDEX = ".index.json"
"""Ending of the name of an index, which is a file that lists the shard of each tensor."""
DEPTH = 16
"""Depth to which nested dicts are read. A hostile file may nest deeper than Python can recurse."""


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weight_map(index: Path) -> dict[str, str]:
    """Returns the shard of each tensor, as an index states it.

    Raises `EncoderError` for a file that is no index, and for a shard outside its folder.
    """
    try:
        found = json.loads(index.read_text())["weight_map"]
        shards = {str(name): str(shard) for name, shard in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise EncoderError(
            f"weights {index} are no index of shards ({type(e).__name__}: {e}): download it again, or give one file."
        ) from e
    for shard in shards.values():
        if PurePosixPath(shard).is_absolute() or ".." in PurePosixPath(shard).parts:
            raise EncoderError(
                f"weights {index} name {shard!r}, which is outside their folder: put all shards into it."
            )
    return shards


def files_of(path: Path) -> list[Path]:
    """Returns a file alone, or an index with all its shards; raises `EncoderError` where some are absent."""
    if not path.name.endswith(INDEX):
        return [path]
    shards = [path.parent / shard for shard in sorted(set(weight_map(path).values()))]
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise EncoderError(
            f"weights {path} lack {len(absent)} of {len(shards)} shards{some(absent)}: download them too."
        )
    return [path, *shards]


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Returns all tensors of a file, or of an index's shards; keys of nested dicts are joined by dots.

    Raises `EncoderError` for a file without tensors, and for a file that holds more than tensors and plain values, so
    that an untrusted file runs no code.
    """
    _, *shards = files_of(path)
    if not shards:
        return read_file(path)
    read = {shard: read_file(shard) for shard in shards}
    found = {name: (path.parent / shard, name) for name, shard in weight_map(path).items()}
    absent = [name for name, (shard, _) in found.items() if name not in read[shard]]
    if absent:
        raise EncoderError(f"weights {path} name tensors that their shards lack{some(absent)}: download them again.")
    return {name: read[shard][name] for name, (shard, _) in found.items()}


def read_file(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of one file; its content decides its format, not its name."""
    try:
        found: Any = read_safetensors(path) if is_safetensors(path) else read_torch(path)
    except Exception as e:  # both readers raise many kinds
        held = re.search(r"GLOBAL (\S+) was not an allowed", str(e))
        if held:
            raise EncoderError(
                f"weights {path} hold {held[1]}, and only tensors are taken from a file: "
                "save module.state_dict() alone, with torch.save or safetensors.torch.save_file. "
                "If you trust the origin of the file, run in the environment that made it: "
                "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)."
            ) from e
        raise EncoderError(
            f"weights {path} can't be read as safetensors or a state dict ({type(e).__name__}): "
            "the file is damaged, or holds more than tensors, and only tensors are taken from a file; "
            "save module.state_dict() with safetensors.torch.save_file or torch.save."
        ) from e
    state: dict[str, torch.Tensor] = {}
    for name, value in tensors_of(found if isinstance(found, dict) else {}, (), set()):
        if state.setdefault(name, value) is not value:
            raise EncoderError(f"weights {path} hold two tensors under {name!r}: save module.state_dict() alone.")
    if not state:
        raise EncoderError(f"weights {path} hold no state dict (names and tensors): save module.state_dict() alone.")
    return state


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: with the length of a JSON object, and with that object."""
    with path.open("rb") as file:
        length, first = int.from_bytes(file.read(8), "little"), file.read(1)
    return first == b"{" and length <= path.stat().st_size - 8


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a file of safetensors."""
    from safetensors.torch import load_file

    return load_file(path)


def read_torch(path: Path) -> Any:
    """Returns the tensors and plain values of a file of torch."""
    # If another tool compressed the archive, its tensors can't be mapped into memory.
    mapped = zipfile.is_zipfile(path) and path.suffix != ".safetensors"  # torch would go by this suffix alone
    if mapped:
        with zipfile.ZipFile(path) as archive:
            mapped = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    # DINO's training scripts save their arguments beside the weights: attributes, and no code.
    with torch.serialization.safe_globals([argparse.Namespace]):
        if mapped:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)


def tensors_of(value: Any, keys: tuple[str, ...], seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of nested dicts. A dict that occurs several times yields its tensors only once."""
    if isinstance(value, torch.Tensor):
        yield ".".join(keys), value
    elif isinstance(value, dict) and id(value) not in seen and len(keys) < DEPTH:
        seen.add(id(value))
        for key, inner in value.items():
            if isinstance(key, str):  # an optimizer's state is kept by number
                yield from tensors_of(inner, (*keys, key), seen)


def some(names: list[str]) -> str:
    """Name a few of many."""
    return f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else ""
