"""The digest of a given module's code and values.

It decides whether a store may be resumed only if the store has no behaviour, as in version 0.1, or a random
behaviour. It does not cover forward hooks, private attributes, functions that are called by a global name, and packed
weights: see `dfx.encoders.behaviour`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import nn


def module_digest(module: nn.Module) -> str:
    """Returns the SHA-256 of a module's structure, code, parameters, buffers and public attributes.

    It is the same in every process of one Python version, also for classes of a notebook or `__main__`.
    """
    digest = hashlib.sha256()
    for part in stable((repr(module), list(module.named_modules()))):
        digest.update(part)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        for part in stable((name, tensor)):
            digest.update(part)
    return digest.hexdigest()


def stable(value: Any, depth: int = 0) -> Iterator[bytes]:
    """Spell out a value in bytes that do not depend on addresses, hashing or process."""
    yield f"<{type(value).__module__}.{type(value).__qualname__}>".encode()
    if depth > 12 or value is None:
        return
    if isinstance(value, bool | int | float | complex | str | bytes | np.generic | torch.dtype | torch.device):
        yield repr(value).encode()
    elif isinstance(value, torch.Tensor):
        if value.is_nested or value.layout != torch.strided or value.is_quantized:
            parts = value.dequantize() if value.is_quantized else value
            yield from stable([*parts.unbind()] if value.is_nested else parts.to_dense(), depth + 1)
            return
        array = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        yield f"{array.dtype} {tuple(array.shape)}".encode()
        yield array.flatten().view(torch.uint8).numpy().tobytes() if array.numel() else b""
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape}".encode()
        yield value.tobytes() if value.dtype != object else b""
    elif isinstance(value, list | tuple):
        for item in value:
            yield from stable(item, depth + 1)
    elif isinstance(value, set | frozenset):
        yield from sorted(b"".join(stable(item, depth + 1)) for item in value)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from stable(key, depth + 1)
            yield from stable(item, depth + 1)
    elif isinstance(value, CodeType):
        yield value.co_code
        yield from stable((value.co_names, value.co_varnames, value.co_consts), depth + 1)
    elif isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if not isinstance(cell.cell_contents, type)]
        yield from stable((value.__code__, value.__defaults__, value.__kwdefaults__, cells), depth + 1)
    elif isinstance(value, MethodType):
        yield from stable(value.__func__, depth + 1)
    elif isinstance(value, type):
        for owner in value.__mro__:
            if not owner.__module__.startswith(("torch", "timm", "builtins")):  # theirs is named by their version
                functions = {
                    k: f for k, f in vars(owner).items() if isinstance(f, FunctionType | staticmethod | property)
                }
                for name, function in functions.items():
                    code = getattr(function, "fget", getattr(function, "__func__", function))
                    yield from stable((name, code), depth + 1)
    elif isinstance(value, nn.Module):
        yield from stable(type(value), depth + 1)
        yield from stable(
            {k: v for k, v in vars(value).items() if not k.startswith("_") and k != "training"}, depth + 1
        )
    elif hasattr(value, "__dict__"):
        yield from stable(vars(value), depth + 1)
