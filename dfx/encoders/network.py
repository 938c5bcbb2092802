"""An encoder on a device: from uint8 patches to features. Built once a process, kept in a bounded cache."""

from __future__ import annotations

import contextlib
import copy
import difflib
import itertools
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from dfx.encoders import weights as files
from dfx.encoders.digest import module_digest
from dfx.encoders.outputs import pool, rows_of, to_numpy
from dfx.encoders.spec import SHARED, EncoderSpec, Kept, Triple
from dfx.errors import EncoderError

MODULES: Kept[nn.Module] = Kept(8)
"""Networks in main memory, in evaluation mode."""
GIVEN: weakref.WeakValueDictionary[tuple[str, str], nn.Module] = weakref.WeakValueDictionary()
"""Modules given in this process; they live as long as the specs, extractors and arrays that hold them."""
NETWORKS: Kept[Network] = Kept(8)
"""Networks on a device."""
PROBES: Kept[tuple[int, str]] = Kept(256)
"""What networks give for patches of a shape."""

SEED = 0
"""Of untrained weights, so that every worker has the same."""
_tokens: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_counter = itertools.count()


# From a name or a module to a spec


def timm_spec(name: str, weights: str | Path | None) -> EncoderSpec:
    """Describe a timm model by name; finds and hashes its weights."""
    import timm

    config = None
    if timm.is_model(name):
        with contextlib.suppress(RuntimeError):  # an unknown tag of a known architecture
            config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    if config is None:
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise EncoderError(
            f"'{name}' is no encoder that dfx or timm {timm.__version__} knows"
            f"{': did you mean ' + ', '.join(close) + '?' if close else '.'} `dfx encoders` lists names; "
            "a torch.nn.Module of your own can be given instead."
        )
    if weights == "random":
        source, digest = "random", f"random-{SEED}"
    elif weights is not None:
        path = files.weights_file(weights)
        source, digest = str(path), files.file_digest(path)
    elif not config.has_weights or not config.hf_hub_id:
        raise EncoderError(
            f"'{name}' has no published weights: pass weights=PATH, or weights='random' to run it untrained."
        )
    else:
        digest = files.file_digest(files.hub_file(config.hf_hub_id, name))
        source = f"hub:{config.hf_hub_id}"
    rows, columns = config.input_size[1:]
    return EncoderSpec(
        name=name,
        kind="timm",
        weights=source,
        weights_digest=digest,
        mean=tuple(config.mean),
        std=tuple(config.std),
        input_size=(int(rows), int(columns)),
        interpolation="bilinear" if config.interpolation == "bilinear" else "bicubic",
    )


def module_spec(module: nn.Module) -> EncoderSpec:
    """Describe a module and keep a copy of it as it is now; the module itself is left as it is."""
    try:
        own = copy.deepcopy(module).to("cpu").eval()
        digest = module_digest(own)
    except Exception as e:  # whatever a module's attributes raise; lazy and meta modules have no values
        raise EncoderError(
            f"module {type(module).__name__} can't be copied ({type(e).__name__}: {e}): "
            "initialise its parameters, and hold no locks or open files in it."
        ) from e
    spec = EncoderSpec(
        name=type(module).__name__,
        kind="tiatoolbox" if hasattr(module, "infer_batch") else "module",
        weights="given",
        weights_digest=digest,
        token=f"{os.getpid()}-{_tokens.setdefault(module, next(_counter))}",
        module=own,
    )
    GIVEN[spec.token, digest] = own
    return spec


# From a spec to a network


def module_of(spec: EncoderSpec) -> nn.Module:
    """Give a spec's network in main memory, building it the first time."""
    given = GIVEN.get((spec.token, spec.weights_digest))
    if given is not None:
        return given
    return MODULES.get(spec.key, lambda: build_timm(spec) if spec.kind == "timm" else unpickle(spec))


def build_timm(spec: EncoderSpec) -> nn.Module:
    """Build a timm model without its classifier: it then pools by itself and gives (N, D)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        module = timm_model(spec)
    if spec.weights == "random":
        return module
    path = files.hub_file(spec.weights.removeprefix("hub:"), spec.name) if spec.weights.startswith("hub:") else None
    path = path or files.weights_file(spec.weights)
    if files.file_digest(path) != spec.weights_digest:
        raise EncoderError(f"weights {path} are not the file that this run was planned with: restore it, or run anew.")
    files.load_into(module, path, spec.name)
    return module


def timm_model(spec: EncoderSpec) -> nn.Module:
    """Build a timm model's layers, untrained, in evaluation mode."""
    import timm

    config = timm.get_pretrained_cfg(spec.name)
    sized = {"img_size": spec.input_size} if config.fixed_input_size else {}
    pooled = {"global_pool": {"cls": "token", "mean": "avg"}[spec.pooling]} if spec.pooling in ("cls", "mean") else {}
    try:
        module: nn.Module = timm.create_model(spec.name, pretrained=False, num_classes=0, **sized, **pooled)
    except (AssertionError, TypeError, ValueError, RuntimeError) as e:
        raise EncoderError(
            f"timm can't build '{spec.name}' with input_size={spec.input_size} and pooling={spec.pooling!r} "
            f"({type(e).__name__}: {e}): leave out what it does not take."
        ) from e
    return module.eval()


def pickle_module(spec: EncoderSpec) -> bytes:
    """Pickle a given module by value, so that classes of a notebook or `__main__` travel too."""
    try:
        return bytes(cloudpickle.dumps(module_of(spec)))
    except Exception as e:
        raise EncoderError(f"module {spec.name} can't be sent to workers ({e}): make it picklable.") from e


def unpickle(spec: EncoderSpec) -> nn.Module:
    """Build a given module from what the client handed to this process."""
    data = SHARED.get(spec.key, lambda: _absent(spec))
    try:
        module: nn.Module = cloudpickle.loads(data)
    except Exception as e:
        raise EncoderError(
            f"module {spec.name} can't be built on this worker ({type(e).__name__}: {e}): "
            "install what defines it on the workers too."
        ) from e
    return module.eval()


def _absent(spec: EncoderSpec) -> bytes:
    raise EncoderError(
        f"this worker does not have module {spec.name}: it joined a client that never handed it over. "
        "Call dfx.features with the client open, or dfx.cluster.share(encoder, client)."
    )


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


def probe(spec: EncoderSpec, shape_yx: tuple[int, int], channels: int = 3) -> tuple[int, str]:
    """Width and dtype of the features of patches of a shape, from two black patches.

    A named network is probed without memory or weights (torch's meta device). A process probes once.
    """
    return PROBES.get((spec, shape_yx, channels), lambda: _probe(spec, shape_yx, channels))


def _probe(spec: EncoderSpec, shape_yx: tuple[int, int], channels: int) -> tuple[int, str]:
    if spec.kind == "timm":
        with torch.device("meta"):
            module = timm_model(spec)
            with torch.inference_mode():
                size = spec.input_size or shape_yx
                out = module(torch.empty(2, 3, *size))
        return int(pool(out, spec, 2).shape[1]), "float32"
    rows = network(spec, "cpu")(np.zeros((2, *shape_yx, channels), np.uint8), batch_size=2)
    return rows.shape[1], str(rows.dtype)


class Network:
    """A network on a device. Safe to use from several threads: one runs forward at a time."""

    def __init__(self, spec: EncoderSpec, module: nn.Module, device: torch.device) -> None:
        self.spec = spec
        self.device = device
        self.module = module if device.type == "cpu" else copy.deepcopy(module).to(device)
        self._lock = threading.Lock()
        self._mean = self._colours(spec.mean)
        self._std = self._colours(spec.std)

    def _colours(self, values: Triple | None) -> torch.Tensor | None:
        return None if values is None else torch.tensor(values, device=self.device).view(1, 3, 1, 1)

    @torch.inference_mode()
    def __call__(
        self, patches: NDArray[np.uint8], *, batch_size: int, threads: int | None = None
    ) -> NDArray[np.floating[Any]]:
        """Encode uint8 patches (N, rows, columns, 3) to (N, D), `batch_size` at a time.

        `threads` is how many torch may use on a CPU (None: as the process has it).
        """
        rows = []
        for start in range(0, len(patches), batch_size):
            batch = patches[start : start + batch_size]
            try:
                rows.append(
                    self._honour(batch, threads) if self.spec.kind == "tiatoolbox" else self._run(batch, threads)
                )
            except EncoderError:
                raise
            except Exception as e:  # whatever a network raises
                raise EncoderError(
                    f"encoder {self.spec.name} failed on {len(batch)} patches of {batch.shape[1]} x {batch.shape[2]} "
                    f"on {self.device} ({type(e).__name__}: {e})."
                ) from e
        return np.concatenate(rows)

    def _run(self, batch: NDArray[np.uint8], threads: int | None) -> NDArray[np.floating[Any]]:
        x = torch.from_numpy(np.ascontiguousarray(batch)).to(self.device).permute(0, 3, 1, 2)
        x = x.to(torch.float32).div_(255)
        if self.spec.input_size is not None and tuple(x.shape[2:]) != self.spec.input_size:
            x = F.interpolate(x, self.spec.input_size, mode=self.spec.interpolation, antialias=True).clamp_(0, 1)
        if self._mean is not None:
            x = x - self._mean
        if self._std is not None:
            x = x / self._std
        with self._lock, torch_threads(threads if self.device.type == "cpu" else None), self._autocast():
            out = pool(self.module(x), self.spec, len(batch))
        return to_numpy(out if self.spec.kind == "module" and self.spec.precision == "float32" else out.float())

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.spec.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.spec.precision))

    def _honour(self, batch: NDArray[np.uint8], threads: int | None) -> NDArray[np.floating[Any]]:
        """Run a TIAToolbox model as that package does: `preproc_func` a patch, `infer_batch` a batch of NHWC."""
        prepare = getattr(self.module, "preproc_func", None)
        ready = [np.asarray(prepare(patch)) for patch in batch] if callable(prepare) else list(batch)
        with self._lock, torch_threads(threads if self.device.type == "cpu" else None):
            out = self.module.infer_batch(self.module, torch.from_numpy(np.stack(ready)), device=str(self.device))  # type: ignore[operator]
        return to_numpy(rows_of(out, len(batch), self.spec.name))


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
