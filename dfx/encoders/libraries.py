"""What each library builds of a named encoder's card, brought to one shape: images to (N, D)."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from dfx.encoders import hub, tokens
from dfx.encoders.cards import Card, find
from dfx.encoders.catalogue import FILES_CLIP
from dfx.encoders.fitting import load_into
from dfx.encoders.layers import LAYERS, Called, Hidden, Keep, Own, Tokens
from dfx.encoders.spec import EncoderSpec
from dfx.encoders.weights import INDEX, read_state_dict, some
from dfx.errors import EncoderError

PIP = {
    "transformers": "dfx[hub]",
    "open_clip": "dfx[hub]",
    "conch": "git+https://github.com/Mahmoodlab/CONCH",
    "musk": "fairscale git+https://github.com/lilab-stanford/MUSK",
}
OTHER_TOWERS = ("text_model.", "text_projection.", "logit_scale", "logit_bias")
"""Of a model of images and texts: what the image's network has no place for."""


def untrained(spec: EncoderSpec, path: Path | None) -> nn.Module | None:
    """Build an encoder's layers; None where only its own package or code can.

    `path`: the folder that describes them, for the libraries that need one.
    """
    card = find(spec.name)
    if spec.kind == "keep":
        return Keep()
    if spec.kind == "timm":
        return from_timm(spec, card)
    assert card is not None
    if path is None or card.code:
        return None
    if spec.kind == "transformers":
        return pooled(spec, transformers_layers(spec, card, path))
    return open_clip_tower(spec, path) if spec.kind == "open_clip" else None


def trained(spec: EncoderSpec, path: Path) -> nn.Module:
    """Build an encoder with its weights; every parameter must get a value."""
    card = find(spec.name)
    if spec.kind in PACKAGES:
        assert card is not None
        return PACKAGES[spec.kind](spec, card, path)
    module = untrained(spec, path)
    assert module is not None
    if spec.kind == "open_clip":
        path = part_in(path, FILES_CLIP)
    load_into(module.network if isinstance(module, Tokens) else module, path, spec.name)
    return module


def part_in(folder: Path, names: tuple[str, ...]) -> Path:
    """Returns the weights file in a folder that is known to have it."""
    found = hub.part_of(folder, names)
    assert found is not None
    return found


def library(name: str, encoder: str) -> Any:
    """Import a library that is not among dfx's own; raises `EncoderError` that says how it is installed."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        package = PIP[name.partition(".")[0]]
        raise EncoderError(f"'{encoder}' needs {name} ({e}): pip install {package}, here and on the workers.") from e


def from_timm(spec: EncoderSpec, card: Card | None) -> nn.Module:
    """Build a timm model without its classifier: it then pools by itself, unless both kinds of tokens are wanted."""
    name = spec.name if card is None or card.architecture is None else card.architecture
    built = {} if card is None else {key: LAYERS.get(value, value) for key, value in card.build.items()}
    sized = {"img_size": spec.input_size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    token = {"global_pool": "token"} if spec.pooling == "cls" else {}
    try:
        module: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **built, **sized, **token)
        pools = getattr(module, "global_pool", "")
        if spec.pooling == "cls+mean" or (spec.pooling == "mean" and pools == "token"):
            module.reset_classifier(0, "")  # type: ignore[operator]  # which leaves its norm where the weights have it
            return Tokens(module, spec.pooling, prefix_of(module, spec.pooling))
        if spec.pooling == "mean":
            module.reset_classifier(0, "avg")  # type: ignore[operator]
    except (AssertionError, TypeError, ValueError, RuntimeError) as e:
        raise EncoderError(
            f"timm can't build '{spec.name}' with input_size={spec.input_size} and pooling={spec.pooling!r} "
            f"({type(e).__name__}: {e}): leave out what it does not take."
        ) from e
    return module


def prefix_of(module: nn.Module, pooling: str) -> int:
    """Returns the number of tokens before the patch tokens.

    Raises `ValueError` for a network that gives maps, or lacks the class token that the pooling needs.
    """
    prefix = tokens.prefix_of(module)
    if prefix is None:
        raise ValueError("it gives maps, not tokens")
    if "cls" in pooling and not tokens.has_class_token(module):
        raise ValueError("it has no class token")
    return prefix


def pooled(spec: EncoderSpec, module: nn.Module) -> nn.Module:
    """Bring what a model of transformers gives to (N, D)."""
    if spec.pooling is None:
        return Own(module, "image_embeds", "pooler_output")
    registers = getattr(module.config, "num_register_tokens", 0) or 0
    return Hidden(module, spec.pooling, 1 + registers)


def described(spec: EncoderSpec, path: Path) -> dict[str, Any]:
    """Read a JSON file that describes layers."""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except (OSError, ValueError) as e:
        raise EncoderError(f"{path} does not describe '{spec.name}' ({e}): download it again.") from e
    return found


def transformers_layers(spec: EncoderSpec, card: Card, folder: Path) -> nn.Module:
    """Build a model of transformers without its weights."""
    model = getattr(library("transformers", spec.name), str(card.architecture))
    try:
        config = model.config_class.from_pretrained(str(folder), local_files_only=True)
        module: nn.Module = model(config, **card.build)
    except Exception as e:  # whatever the library raises
        raise EncoderError(f"{folder} does not describe '{spec.name}' ({type(e).__name__}: {e}).") from e
    return module


def from_transformers(spec: EncoderSpec, card: Card, folder: Path) -> nn.Module:
    """Load a model of transformers out of its folder. Its repository's code runs only if the spec is trusted."""
    transformers = library("transformers", spec.name)
    auto = described(spec, folder / "config.json").get("auto_map", {})
    elsewhere = [name for name in auto.values() if "--" in str(name)]
    if spec.trusted and elsewhere:
        raise EncoderError(f"'{spec.name}' takes code of another repository, {elsewhere[0]}: that is no pinned state.")
    file = part_in(folder, card.files or hub.FILES)
    try:
        module, said = getattr(transformers, card.architecture or "AutoModel").from_pretrained(
            str(folder),
            **card.build,
            local_files_only=True,
            trust_remote_code=spec.trusted,
            use_safetensors=file.name.startswith("model.safetensors"),
            weights_only=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
        unfit = [*said["missing_keys"], *(str(key[0]) for key in said["mismatched_keys"])]
        unfit += [key for key in said["unexpected_keys"] if not key.startswith(OTHER_TOWERS)]
        if unfit and card.code:
            raise ValueError(f"{len(unfit)} parameters do not fit{some(sorted(unfit))}")
    except Exception as e:  # whatever the library raises, and a repository's code
        if card.code:
            raise EncoderError(f"weights {folder} are not those of '{spec.name}' ({type(e).__name__}: {e}).") from e
        module, unfit = transformers_layers(spec, card, folder), [str(e)]
    if unfit:  # the library reads only its own names and formats; a wrapper may have changed them
        load_into(module, file, spec.name, others=OTHER_TOWERS)
    return pooled(spec, module)


def open_clip_tower(spec: EncoderSpec, folder: Path) -> nn.Module:
    """Build the image's network of an open_clip model; its text's would need files of yet another repository."""
    model = library("open_clip.model", spec.name)
    config = described(spec, folder / "open_clip_config.json")
    try:
        config = config["model_cfg"]
        vision = config["vision_cfg"] | {"timm_model_pretrained": False}  # else timm would fetch other weights first
        # Private, and so held by a test: the public factory builds the text's network as well.
        module: nn.Module = model._build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False))
    except Exception as e:  # whatever the library raises
        raise EncoderError(f"{folder} does not describe '{spec.name}' ({type(e).__name__}: {e}).") from e
    return module


def check_single(path: Path) -> None:
    """Refuse shards, and files that hold more than tensors, before a package reads them by itself."""
    if path.name.endswith(INDEX):
        raise EncoderError(f"weights {path} are shards, which the package of this encoder can't read: give one file.")
    read_state_dict(path)


def from_conch(spec: EncoderSpec, card: Card, path: Path) -> nn.Module:
    """Load CONCH with its own package: image features before the projection for contrast, not normalised."""
    package = library("conch.open_clip_custom", spec.name)
    check_single(path)
    module, _ = package.create_model_from_pretrained(card.architecture, checkpoint_path=str(path))
    load_into(module, path, spec.name)
    return Called(module, lambda network, x: network.encode_image(x, proj_contrast=False, normalize=False))  # type: ignore[operator]


def from_musk(spec: EncoderSpec, card: Card, path: Path) -> nn.Module:
    """Load MUSK with its own package: image features without head or normalisation, as its README has them."""
    utils = library("musk.utils", spec.name)
    library("musk.modeling", spec.name)  # makes it known to timm
    check_single(path)
    module = timm.create_model(card.architecture)
    utils.load_model_and_may_interpolate(str(path), module, "model|module", "")
    given = {"with_head": False, "out_norm": False, "ms_aug": card.build.get("ms_aug", False), "return_global": True}
    return Called(module, lambda network, x: network(image=x, **given)[0])


PACKAGES: dict[str, Callable[[EncoderSpec, Card, Path], nn.Module]] = {
    "transformers": from_transformers,
    "conch": from_conch,
    "musk": from_musk,
}
"""Libraries that read their weights by themselves."""
