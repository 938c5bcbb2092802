"""From a name or a module to a spec, and from a spec to its network in main memory."""

from __future__ import annotations

import contextlib
import copy
import difflib
import itertools
import os
import weakref
from pathlib import Path

import cloudpickle
import torch
from torch import nn

from dfx.encoders import weights as files
from dfx.encoders.digest import module_digest
from dfx.encoders.spec import SHARED, EncoderSpec, Kept
from dfx.errors import EncoderError

MODULES: Kept[nn.Module] = Kept(8)
"""Networks in main memory, in evaluation mode."""
GIVEN: weakref.WeakValueDictionary[tuple[str, str], nn.Module] = weakref.WeakValueDictionary()
"""Modules given in this process; they live as long as the specs, extractors and arrays that hold them."""

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
