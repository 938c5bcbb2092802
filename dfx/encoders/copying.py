"""Copies and bytes of given modules, with all the state that their hooks refer to.

A forward hook refers to its module by a closure, a bound method or a shared dictionary. `copy.deepcopy` keeps functions
as they are, so hooks of the copy would write into the original; it also refuses tensors that autograd made. So a module
is pickled, in one of two ways:

- `copied`: within this process. Classes, module-level functions and global variables are shared with the original,
  since they are code; everything that a module, its hooks and its functions' closures hold is copied.
- `dumps`: for other processes. Classes and functions that can't be imported (of `__main__`, a notebook or a function)
  are pickled by value, with the global variables that they use. The bytes do not depend on addresses.

All attributes of a module travel with it, also activations that it kept from its last call. Gradients do not.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable
from types import CellType
from typing import Any

import torch
from torch import nn

from dfx.encoders.digest import stable
from dfx.encoders.pickling import HOOKS, LocalPickler, LocalUnpickler, PortablePickler, is_compiled

PICKLED_BY = ("__getstate__", "__setstate__", "__reduce__", "__reduce_ex__")
"""Methods by which a class decides what is pickled of its objects."""
PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
"""Wrappers that spread a batch over the GPUs of the machine where they were made; a worker has its own."""


def copied(module: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """Returns a copy of a module on a device; the module is left as it is.

    Raises `pickle.PicklingError`, `TypeError` or any error of the module's own `__reduce__` and `__getstate__`.
    """
    cells: dict[int, CellType] = {}
    # The first time finds the classes, whose closures are theirs and not the module's, and all that it holds.
    first = LocalPickler(Hashed(), cells)
    first.dump(module)
    stream = io.BytesIO()
    pickler = LocalPickler(stream, cells, first.held)
    pickler.dump(module)
    stream.seek(0)
    copy: nn.Module = LocalUnpickler(stream, pickler.things, torch.device(device)).load()
    lost = difference(module, copy)
    if lost:
        raise ChangedCopy(f"its own way of being pickled (__getstate__, __reduce__ or the like) changes {lost}")
    return copy.to(device)


class ChangedCopy(pickle.PicklingError):
    """A copy of a module that is not like it."""


def difference(module: nn.Module, copy: nn.Module) -> str:
    """Returns what classes that pickle themselves lost of a module: hooks, parameters, or plain values."""
    pairs = list(zip(parts(module), parts(copy), strict=False))
    if len(parts(module)) != len(parts(copy)):
        return "its layers"
    for one, other in pairs:
        if any(len(getattr(one, name)) != len(getattr(other, name)) for name in HOOKS):
            return "its hooks"
        if pickles_itself(one):
            before, after = values_of(one), values_of(other)
            lost = [key for key, value in before.items() if after.get(key, value) != value]
            if lost:
                return f"'{lost[0]}'"
    return ""


def pickles_itself(module: nn.Module) -> bool:
    """Whether a class that is not torch's decides what is pickled of a module."""
    classes = [cls for cls in type(module).__mro__[:-1] if not cls.__module__.startswith("torch.")]
    return any(name in vars(cls) for cls in classes for name in PICKLED_BY)


def values_of(module: nn.Module) -> dict[str, bytes]:
    """Returns the parameters, buffers and plain values that a module itself has, spelled out."""
    plain = {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | complex | str)}
    found = {**plain, **module._parameters, **module._buffers}
    return {key: b"".join(stable(value)) for key, value in found.items()}


def check_copied(thing: Any) -> None:
    """Raises an error if an object that a module holds can't be copied."""
    LocalPickler(Hashed(), {}).dump(thing)


def dumps(module: Any) -> bytes:
    """Returns a module as bytes for other processes. Raises as `copied`."""
    stream = io.BytesIO()
    write(module, stream)
    return stream.getvalue()


def write(module: Any, stream: Any) -> None:
    """Write the bytes of `dumps`."""
    first = LocalPickler(Hashed(), {})
    first.dump(module)
    PortablePickler(stream, first.held).dump(module)


def loads(data: bytes) -> nn.Module:
    """Returns the module of `dumps`, in main memory. Raises whatever its classes raise."""
    module: nn.Module = pickle.loads(data)
    return module.to("cpu")


def content_digest(module: nn.Module) -> str:
    """SHA-256 of a module's bytes, which are not kept. Raises as `copied`."""
    sink = Hashed()
    write(module, sink)
    for part in filter(pickles_itself, parts(module)):  # whose bytes may lack values
        for key, value in values_of(part).items():
            sink.write(key.encode() + value)
    return sink.digest.hexdigest()


def has_hooks(module: nn.Module) -> bool:
    """Whether any part of a module has hooks that see its output or its input."""
    return any(getattr(part, name) for part in parts(module) for name in HOOKS)


def bare(module: nn.Module) -> nn.Module:
    """Returns the module within wrappers for several GPUs, except where hooks are on the wrapper."""
    while isinstance(module, PARALLEL) and not any(getattr(module, name) for name in HOOKS):
        module = module.module
    return module


def parts(module: nn.Module) -> list[nn.Module]:
    """Returns a module and those within it that are Python objects, without the wrappers of `torch.compile`."""
    return [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule) and not is_compiled(m)]


def importable_classes(module: nn.Module) -> dict[tuple[str, str], type]:
    """Returns the classes of a module's parts that `dumps` stores by name only."""
    found = {(type(part).__module__, type(part).__qualname__): type(part) for part in parts(module)}
    return {key: cls for key, cls in found.items() if key[0] != "__main__" and "<locals>" not in key[1]}


def unpicklable(module: nn.Module, pickles: Callable[[Any], object]) -> str:
    """Returns the name of the attribute of a module that can't be pickled, "" if all can be pickled."""
    for private in (False, True):  # private last: hooks fail with the attributes that they refer to
        for name, part in module.named_modules():
            own = {} if isinstance(part, torch.jit.ScriptModule) else vars(part)
            for key, value in own.items():
                if key.startswith("_") == private and key not in ("_modules", "_parameters"):
                    try:
                        pickles(value)
                    except Exception:  # whatever an attribute raises
                        return f"{name}.{key}" if name else key
    return ""


class Hashed:
    """A file that keeps nothing but the digest of its bytes."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Take bytes."""
        self.digest.update(data)
        return memoryview(data).nbytes
