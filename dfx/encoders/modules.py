"""Given modules: copied, described, sent to workers; and any spec's network in main memory."""

from __future__ import annotations

import uuid
import weakref
from pathlib import Path

from torch import nn

from dfx.encoders import copying, named
from dfx.encoders.digest import module_digest
from dfx.encoders.fitting import load_into
from dfx.encoders.spec import SHARED, EncoderSpec, Kept
from dfx.errors import EncoderError

MODULES: Kept[nn.Module] = Kept(8)
"""Networks in main memory, in evaluation mode."""
GIVEN: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()
"""Copies of modules given in this process, by token; they live as long as specs, extractors and arrays."""


def module_spec(module: nn.Module, weights: Path | None = None) -> EncoderSpec:
    """Returns the description of a module, and keeps a copy of it as it is now; the module is left as it is.

    A module that is given twice, unchanged, is copied once.

    Parameters
    ----------
    module
        Any module whose parameters have values.
    weights
        A file whose values the copy gets.

    Raises
    ------
    EncoderError
        For a module that can't be copied, or weights that are not the module's.
    """
    name = type(module).__name__
    check_values(module, name)
    inner = copying.bare(module)
    if weights is not None:
        inner = copy_of(inner, name)
        load_into(inner, weights, name)
    token = token_of(inner)
    own = GIVEN.get(token)
    if own is None:
        own = GIVEN[token] = copy_of(inner, name) if weights is None else inner
    return EncoderSpec(
        name=name,
        kind="tiatoolbox" if hasattr(module, "infer_batch") else "module",
        weights="given",
        weights_digest=module_digest(module if weights is None else inner),
        token=token,
        module=own,
    )


def check_values(module: nn.Module, name: str) -> None:
    """Refuse a module that has parameters without values."""
    for key, value in [*module.named_parameters(), *module.named_buffers()]:
        if nn.parameter.is_lazy(value):
            raise EncoderError(f"module {name} can't be copied: '{key}' has no values yet; call it on a batch first.")
        if value.is_meta:
            raise EncoderError(f"module {name} can't be copied: '{key}' is on the meta device; load its weights first.")


def copy_of(module: nn.Module, name: str) -> nn.Module:
    """Returns a copy in main memory and evaluation mode; raises `EncoderError` that names the cause."""
    try:
        own = copying.copied(module)
    except copying.ChangedCopy as e:
        raise EncoderError(
            f"module {name} can't be copied: {e}. Let that keep all that forward uses, or remove it."
        ) from e
    except Exception as e:  # whatever a module's attributes raise
        at = copying.unpicklable(module, copying.check_copied)
        raise EncoderError(
            f"module {name} can't be copied{f': its {at}' if at else ''} ({type(e).__name__}: {e}). "
            "Create such a thing (a lock, an open file, a generator) in forward, or leave it out of the module."
        ) from e
    try:
        return own.eval()
    except NotImplementedError as e:  # programs of torch.export
        raise EncoderError(f"module {name} has no evaluation mode ({e}): give the module that it was made of.") from e


def token_of(module: nn.Module) -> str:
    """Returns a token that identifies the content of a module in all processes.

    If a class was loaded again, its earlier and later modules have different tokens, even if their bytes are equal: the
    bytes hold the class by name only.
    """
    try:
        token = copying.content_digest(module)
    except Exception:  # it can still run in this process; sending it raises an error that names the cause
        return uuid.uuid4().hex
    kept = GIVEN.get(token)
    if kept is not None:
        now, then = copying.importable_classes(module), copying.importable_classes(kept)
        if any(then.get(key, cls) is not cls for key, cls in now.items()):
            return uuid.uuid4().hex
    return token


def module_of(spec: EncoderSpec) -> nn.Module:
    """Returns a spec's network in main memory, building it the first time."""
    given = GIVEN.get(spec.token)
    if given is not None:
        return given
    return MODULES.get(spec.key, lambda: named.build(spec) if spec.named else unpickle(spec))


def pickle_module(spec: EncoderSpec) -> bytes:
    """Returns a given module as bytes, with classes of a notebook or `__main__` by value."""
    module = module_of(spec)
    try:
        return copying.dumps(module)
    except Exception as e:  # whatever a module's attributes raise
        at = copying.unpicklable(module, copying.dumps)
        raise EncoderError(
            f"module {spec.name} can't be sent to workers{f': its {at}' if at else ''} ({type(e).__name__}: {e}): "
            "make that picklable, or use workers of this process."
        ) from e


def unpickle(spec: EncoderSpec) -> nn.Module:
    """Returns a given module, built from the bytes that the client handed to this process."""
    data = SHARED.get(spec.key, lambda: _absent(spec))
    try:
        return copying.loads(data).eval()
    except Exception as e:
        raise EncoderError(
            f"module {spec.name} can't be built on this worker ({type(e).__name__}: {e}): "
            "install what defines it on the workers too."
        ) from e


def _absent(spec: EncoderSpec) -> bytes:
    raise EncoderError(
        f"this worker does not have module {spec.name}: it joined a client that never handed it over. "
        "Call dfx.features with the client open, or dfx.cluster.share(encoder, client)."
    )
