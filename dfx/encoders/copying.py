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

from dfx.encoders.pickling import HOOKS, LocalPickler, LocalUnpickler, PortablePickler, is_compiled

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
"""Wrappers that spread a batch over the GPUs of the machine where they were made; a worker has its own."""


def copied(module: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """Returns a copy of a module on a device; the module is left as it is.

    Raises `pickle.PicklingError`, `TypeError` or any error of the module's own `__reduce__` and `__getstate__`.
    """
    cells: dict[int, CellType] = {}
    for _ in range(2):  # the first pass finds the classes, whose closures are not the module's
        stream = io.BytesIO()
        pickler = LocalPickler(stream, cells)
        pickler.dump(module)
    stream.seek(0)
    copy: nn.Module = LocalUnpickler(stream, pickler.things, torch.device(device)).load()
    hooks = [[len(getattr(part, name)) for name in HOOKS] for part in parts(module)]
    if hooks != [[len(getattr(part, name)) for name in HOOKS] for part in parts(copy)]:
        raise pickle.PicklingError("its own way of being pickled drops its hooks")
    return copy.to(device)


def check_copied(thing: Any) -> None:
    """Raises an error if an object that a module holds can't be copied."""
    LocalPickler(Hashed(), {}).dump(thing)


def dumps(module: Any) -> bytes:
    """Returns a module as bytes for other processes. Raises as `copied`."""
    stream = io.BytesIO()
    PortablePickler(stream).dump(module)
    return stream.getvalue()


def loads(data: bytes) -> nn.Module:
    """Returns the module of `dumps`, in main memory. Raises whatever its classes raise."""
    module: nn.Module = pickle.loads(data)
    return module.to("cpu")


def content_digest(module: nn.Module) -> str:
    """SHA-256 of a module's bytes, which are not kept. Raises as `copied`."""
    sink = Hashed()
    PortablePickler(sink).dump(module)
    return sink.digest.hexdigest()


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
