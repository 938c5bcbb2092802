"""Given modules: copied, described, sent to workers; and any spec's network in main memory."""

from __future__ import annotations

import copy
import itertools
import os
import weakref

import cloudpickle
from torch import nn

from dfx.encoders import named
from dfx.encoders.digest import module_digest
from dfx.encoders.spec import SHARED, EncoderSpec, Kept
from dfx.errors import EncoderError

MODULES: Kept[nn.Module] = Kept(8)
"""Networks in main memory, in evaluation mode."""
GIVEN: weakref.WeakValueDictionary[tuple[str, str], nn.Module] = weakref.WeakValueDictionary()
"""Modules given in this process; they live as long as the specs, extractors and arrays that hold them."""

_tokens: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_counter = itertools.count()


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


def module_of(spec: EncoderSpec) -> nn.Module:
    """Give a spec's network in main memory, building it the first time."""
    given = GIVEN.get((spec.token, spec.weights_digest))
    if given is not None:
        return given
    return MODULES.get(spec.key, lambda: named.build(spec) if spec.named else unpickle(spec))


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
