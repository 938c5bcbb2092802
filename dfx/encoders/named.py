"""Named encoders: from a name to a spec, and from a spec to its network with its weights."""

from __future__ import annotations

import contextlib
import difflib
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfx.encoders import hub
from dfx.encoders.cards import Card, find
from dfx.encoders.spec import POOLINGS, EncoderSpec, Pooling
from dfx.errors import CallError, EncoderError

SEED = 0
"""Of untrained weights, so that every worker has the same."""
UNTRAINED = ("timm", "keep")
"""Libraries that build a network from its name alone."""
CONFIG = {"transformers": ("config.json",), "open_clip": ("open_clip_config.json",)}
"""Files that describe the layers, of libraries that don't know them by name."""


def named_spec(name: str, weights: str | Path | None, *, trusted: bool, revision: str | None) -> EncoderSpec:
    """Describe a named encoder; finds and hashes its weights."""
    card = find(name)
    if card is None or card.architecture is None:
        return timm_spec(name if card is None else card.name, weights, revision)
    wanted = wanted_by(card.name, card.hub, revision)
    if card.code:
        check_trust(card, trusted=trusted, pinned=weights is not None or pinned(wanted))
    if weights == "random" and card.library not in UNTRAINED:
        raise CallError(
            f"'{card.name}' can't be built untrained: its layers are described by files beside its weights."
        )
    source, digest = located(wanted, weights)
    return EncoderSpec(
        name=card.name,
        kind=card.library,
        weights=source,
        weights_digest=digest,
        mean=card.mean,
        std=card.std,
        input_size=card.input_size,
        resize=card.resize,
        interpolation=card.interpolation,
        pooling=pooling_of(card),
        precision=card.precision,
        trusted=card.code and trusted,
    )


def pooling_of(card: Card) -> Pooling | None:
    """Give how a card's tokens or maps are pooled; None: the network does that by itself."""
    return card.pooling if card.pooling in POOLINGS else None


def timm_spec(name: str, weights: str | Path | None, revision: str | None) -> EncoderSpec:
    """Describe a timm model by its own name."""
    config = timm_config(name)
    if weights is None and not (config.has_weights and config.hf_hub_id):
        raise EncoderError(
            f"'{name}' has no published weights: pass weights=PATH, or weights='random' to run it untrained."
        )
    source, digest = located(wanted_by(name, config.hf_hub_id, revision), weights)
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


def timm_config(name: str) -> Any:
    """Give what timm publishes of a model's weights; raises `EncoderError` for a name that nobody knows."""
    import timm

    config = None
    if timm.is_model(name):
        with contextlib.suppress(RuntimeError):  # an unknown tag of a known architecture
            config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    if config is None:
        from dfx.encoders.catalogue import CARDS

        known = [card.name for card in CARDS] + timm.list_models()
        close = difflib.get_close_matches(name.lower(), known, n=3)
        raise EncoderError(
            f"'{name}' is no encoder that dfx or timm {timm.__version__} knows"
            f"{': did you mean ' + ', '.join(close) + '?' if close else '.'} `dfx encoders` lists names; "
            "a torch.nn.Module of your own can be given instead."
        )
    return config


def pinned(wanted: hub.Wanted) -> bool:
    """Whether only one state of a repository can be meant: a commit, or the offline folder's."""
    if wanted.revision is None:
        return hub.offline(wanted) is not None
    return re.fullmatch("[0-9a-f]{40}", wanted.revision) is not None


def check_trust(card: Card, *, trusted: bool, pinned: bool) -> None:
    """Refuse to run a repository's code unless the user asks for one state of it, which workers then have too."""
    if not (trusted and pinned):
        raise EncoderError(
            f"'{card.name}' is built by code of its repository, {card.home}: read it, then pass trust_remote_code=True "
            "and revision=COMMIT, its 40 digits, or weights=FOLDER, to load_encoder."
        )


def wanted_by(name: str, repository: str | None, revision: str | None) -> hub.Wanted:
    """Say what a named encoder's weights are."""
    card = find(name)
    if card is None:
        return hub.Wanted(name, (hub.FILES,), repository, revision, untrained=True)
    config = CONFIG.get(card.library)
    parts = (card.files or hub.FILES,) if config is None else (config, card.files or hub.FILES)
    others = () if card.shares is None else (card.shares,)
    untrained = card.library in UNTRAINED
    return hub.Wanted(name, parts, repository, revision, card.code, others, card.home, untrained)


def located(wanted: hub.Wanted, weights: str | Path | None) -> tuple[str, str]:
    """Find weights: what is to be built from, as workers find it too, and its digest."""
    if weights == "random":
        return "random", f"random-{SEED}"
    path = None if weights is None else hub.given(wanted, weights)
    if path is None and wanted.revision is None:  # nobody knows of which revision the offline folder's are
        path = hub.offline(wanted)
    if path is not None:
        return str(path), hub.digest(wanted, path)
    at = f"@{wanted.revision}" if wanted.revision else ""
    return f"hub:{wanted.repository}{at}", hub.digest(wanted, hub.fetched(wanted))


def located_again(spec: EncoderSpec) -> tuple[hub.Wanted, Path]:
    """Find a spec's weights in this process."""
    published = spec.weights.startswith("hub:")
    repository, _, revision = spec.weights.removeprefix("hub:").partition("@")
    wanted = wanted_by(spec.name, repository if published else None, revision or None if published else None)
    if not published and Path(spec.weights).exists():
        return wanted, hub.given(wanted, spec.weights)
    path = hub.offline(wanted)  # a worker may have its own folder; the digest tells whether it has the same
    if path is None:
        path = hub.fetched(wanted) if published else hub.given(wanted, spec.weights)
    return wanted, path


def build(spec: EncoderSpec) -> nn.Module:
    """Build a named encoder in main memory, in evaluation mode: from images to (N, D).

    Raises `EncoderError` where its weights are not those that the spec was made with.
    """
    from dfx.encoders.libraries import trained, untrained  # timm takes seconds and 200 MB; a given module needs none

    path = None
    if spec.weights != "random":
        wanted, path = located_again(spec)
        if hub.digest(wanted, path) != spec.weights_digest:
            raise EncoderError(f"weights {path} are not what this run was planned with: restore them, or run anew.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        module = untrained(spec, None) if path is None else trained(spec, path)
    assert module is not None
    return module.eval()


def outline(spec: EncoderSpec) -> nn.Module | None:
    """Build a named encoder without memory or weights (torch's meta device); None where its library can't."""
    from dfx.encoders.libraries import untrained

    described = spec.kind in CONFIG and spec.weights != "random"
    with torch.device("meta"):
        module = untrained(spec, located_again(spec)[1] if described else None)
    return None if module is None else module.eval()


def check_width(spec: EncoderSpec, dim: int) -> None:
    """Refuse weights of another size than a card's, which a library that reads its layers from a file would build."""
    card = find(spec.name)
    if card is None or card.architecture is None or spec.pooling != pooling_of(card) or dim == card.dim:
        return
    raise EncoderError(
        f"weights {spec.weights} are not those of '{spec.name}': they give {dim} numbers a patch, not {card.dim}. "
        "Give the files of this architecture."
    )
