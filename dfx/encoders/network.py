"""An encoder on a device: from uint8 patches to features. Built once a process, kept in a bounded cache."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dfx.encoders import named
from dfx.encoders.behaviour import TOLERANCES, coarsest
from dfx.encoders.copying import copied, has_hooks
from dfx.encoders.modules import module_of
from dfx.encoders.outputs import pool, rows_of, to_numpy
from dfx.encoders.prepare import Prepare
from dfx.encoders.spec import EncoderSpec, Kept
from dfx.encoders.tokens import token_layout
from dfx.errors import EncoderError

NETWORKS: Kept[Network] = Kept(8)
"""Networks on a device."""
PROBES: Kept[Probe] = Kept(256)
"""What networks give for patches of a shape."""

_locks: weakref.WeakKeyDictionary[nn.Module, threading.Lock] = weakref.WeakKeyDictionary()
"""Of each module that runs. Networks of several specs may share it, and it may keep features in itself."""
_hooked = threading.Lock()
"""Of all modules with hooks: those of several modules may keep features in one global variable."""


def network(spec: EncoderSpec, device: str) -> Network:
    """Give a spec's network on a device of this process; raises `EncoderError` where there is none."""
    name = choose_device(device)
    return NETWORKS.get((spec, name), lambda: Network(spec, module_of(spec), torch.device(name)))


def choose_device(device: str) -> str:
    """Turn "auto" into the best device of this process, and refuse one that it does not have."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise EncoderError(
            f"device '{device}' is not here ({str(e).splitlines()[0]}): use device='auto' or 'cpu', "
            "or install a torch that supports it."
        ) from e
    return device


def parse_device(device: str) -> None:
    """Refuse what is no device name, without asking whether it is there."""
    if device != "auto":
        try:
            torch.device(device)
        except RuntimeError as e:
            raise EncoderError(f"'{device}' is no device: use 'auto', 'cpu', 'cuda' or 'cuda:N'.") from e


class Probe(NamedTuple):
    """What a network gives for patches of a shape, and what it takes."""

    dim: int
    """Width of a feature vector."""
    dtype: str
    """Its data type."""
    weights: int
    """Bytes of parameters and buffers."""
    activations: int
    """Bytes a patch of the tensors that live at one time at most, the patch itself not counted."""


def probe(spec: EncoderSpec, shape_yx: tuple[int, int], channels: int = 3) -> Probe:
    """Try a network on two black patches of a shape.

    A network that a library knows by name is probed without memory or weights. A process probes once.
    """
    return PROBES.get((spec, shape_yx, channels), lambda: _probe(replace(spec, compiled=False), shape_yx, channels))


def _probe(spec: EncoderSpec, shape_yx: tuple[int, int], channels: int) -> Probe:
    largest = [0]
    module = named.outline(spec) if spec.named else None
    if module is not None:
        with torch.inference_mode(), watched(module, largest):
            out = module(torch.empty(2, 3, *(spec.input_size or shape_yx), device="meta"))
        dim, dtype = int(pool(out, spec, 2).shape[1]), "float32"
    else:
        module = module_of(spec)
        with watched(module, largest):
            rows = network(spec, "cpu")(np.zeros((2, *shape_yx, channels), np.uint8), batch_size=2)
        dim, dtype = rows.shape[1], str(rows.dtype)
    if spec.named:
        named.check_width(spec, dim)
    weights = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    return Probe(dim, dtype, weights, max(largest) // 2)


@contextlib.contextmanager
def watched(module: nn.Module, sizes: list[int]) -> Iterator[None]:
    """Note the bytes of tensors that live when each layer of a module ends, in this thread.

    Those are what it gives and what it and all around it were given, which their callers hold. The
    module's own input is left out.
    """
    thread = threading.get_ident()
    given: list[list[torch.Tensor]] = []

    def begin(_: nn.Module, inputs: Any) -> None:
        if threading.get_ident() == thread:
            given.append(list(tensors(inputs)))

    def end(_: nn.Module, __: Any, out: Any) -> None:
        if threading.get_ident() == thread and given:
            alive = {id(t): t for part in [*given, list(tensors(out))] for t in part}
            own = {id(t) for t in given[0]}
            sizes.append(sum(t.numel() * t.element_size() for key, t in alive.items() if key not in own))
            given.pop()

    layers = [layer for layer in module.modules() if not isinstance(layer, torch.jit.ScriptModule)]
    handles = [layer.register_forward_pre_hook(begin) for layer in layers]
    handles += [layer.register_forward_hook(end) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in what a layer takes or gives."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


class Network:
    """A network on a device. Safe to use from several threads: one runs forward at a time."""

    def __init__(self, spec: EncoderSpec, module: nn.Module, device: torch.device) -> None:
        self.spec = spec
        self.device = device
        self.module = module
        self.precision = spec.cpu_precision if device.type == "cpu" else spec.precision
        if device.type != "cpu":
            self.module = copied(module, device).to(memory_format=torch.channels_last)
        self._uncompiled = self.module
        self._lock = _hooked if has_hooks(self.module) else _locks.setdefault(self.module, threading.Lock())
        self._dtype = torch.float32 if self.precision != "float32" else parameter_dtype(self.module)
        self._tokens = token_layout(self.module, spec.name) if spec.pooling and not spec.named else None
        if spec.compiled:
            self.module = torch.compile(self.module)  # type: ignore[assignment]
        self._prepare = Prepare(spec, device)

    @property
    def arithmetic(self) -> str:
        """The coarsest number format that it computes in, which decides how much features may differ elsewhere.

        On GPUs that have TF32, torch uses it for convolutions of float32.
        """
        found = {self.precision} | {str(t.dtype).removeprefix("torch.") for t in self._uncompiled.parameters()}
        if self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 0) and tf32_is_on():
            found.add("tf32")
        if torch.get_float32_matmul_precision() == "medium":
            found.add("bfloat16")
        return coarsest(name for name in found if name in TOLERANCES)

    @torch.inference_mode()
    def __call__(
        self, patches: NDArray[np.uint8], *, batch_size: int, threads: int | None = None, compiled: bool = True
    ) -> NDArray[np.floating[Any]]:
        """Encode uint8 patches (N, rows, columns, 3) to (N, D), `batch_size` at a time.

        `threads` is how many torch may use on a CPU (None: as the process has it). `compiled`: False runs a compiled
        network without compilation.
        """
        module = self.module if compiled else self._uncompiled
        rows = []
        for start in range(0, len(patches), batch_size):
            batch = patches[start : start + batch_size]
            try:
                rows.append(
                    self._honour(batch, threads)
                    if self.spec.kind == "tiatoolbox"
                    else self._run(module, batch, threads)
                )
            except EncoderError:
                raise
            except Exception as e:  # whatever a network raises
                raise EncoderError(
                    f"encoder {self.spec.name} failed on {len(batch)} patches of {batch.shape[1]} x {batch.shape[2]} "
                    f"on {self.device} ({type(e).__name__}: {e}).{self._remedy()}"
                ) from e
        return np.concatenate(rows)

    def _run(self, module: nn.Module, batch: NDArray[np.uint8], threads: int | None) -> NDArray[np.floating[Any]]:
        x = self._prepare(batch)
        with self._lock, torch_threads(threads if self.device.type == "cpu" else None), self._autocast():
            out = pool(module(x.to(self._dtype)), self.spec, len(batch), self._tokens, x.shape[2:])
            found = to_numpy(out if self.spec.kind == "module" and self.precision == "float32" else out.float())
        # A module that gives part of what it was given would see its features change with the next batch.
        return found.copy() if self.device.type == "cpu" and np.may_share_memory(found, x.numpy()) else found

    def _remedy(self) -> str:
        """Returns what to do where the data types of a given module's parameters may be the reason of a failure."""
        other = ", or load_encoder(module, precision='float16'|'bfloat16')" if self.precision == "float32" else ""
        for kind, values in ("parameters", self.module.parameters()), ("buffers", self.module.buffers()):
            found = sorted({str(t.dtype).removeprefix("torch.") for t in values if t.is_floating_point()} - {"float32"})
            if found and self.spec.kind == "module":
                return f" It has {kind} of {' and '.join(found)}: give module.float(){other}."
        return ""

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.precision))

    def _honour(self, batch: NDArray[np.uint8], threads: int | None) -> NDArray[np.floating[Any]]:
        """Run a TIAToolbox model as that package does: `preproc_func` a patch, `infer_batch` a batch of NHWC."""
        prepare = getattr(self.module, "preproc_func", None)
        ready = [np.asarray(prepare(patch)) for patch in batch] if callable(prepare) else list(batch)
        with self._lock, torch_threads(threads if self.device.type == "cpu" else None):
            out = self.module.infer_batch(self.module, torch.from_numpy(np.stack(ready)), device=str(self.device))  # type: ignore[operator]
        return to_numpy(rows_of(out, len(batch), self.spec.name))


def tf32_is_on() -> bool:
    """Whether torch may use TF32 for float32 on a GPU."""
    try:
        return bool(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:  # set for some of the operations
        return True


def parameter_dtype(module: nn.Module) -> torch.dtype:
    """Returns the data type that all floating parameters of a module have; float32 where they have several.

    That of its buffers where it has no parameters.
    """
    found = {t.dtype for t in module.parameters() if t.is_floating_point()}
    found = found or {t.dtype for t in module.buffers() if t.is_floating_point()}
    return found.pop() if len(found) == 1 else torch.float32


@contextlib.contextmanager
def torch_threads(n: int | None) -> Iterator[None]:
    """Let torch use `n` threads, and as many as before afterwards.

    Under a Dask nanny OMP_NUM_THREADS is 1, and torch would run on one core whatever the worker has.
    """
    before = torch.get_num_threads()
    if n is None or n == before:
        yield
        return
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
