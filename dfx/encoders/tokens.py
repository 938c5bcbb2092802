"""Finds the tokens of a given vision transformer that do not belong to patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import nn

from dfx.errors import EncoderError


@dataclass(frozen=True)
class TokenLayout:
    """The tokens that a network gives before its patch tokens, as it states them: class token and registers."""

    network: nn.Module
    """The network that states this."""
    prefix: int
    """Number of these tokens."""
    has_class: bool
    """Whether the first is a class token."""
    within: bool
    """Whether the network is within the given module, which may drop some of these tokens."""

    def prefix_in(self, tokens: int, name: str, pooling: str, shape_yx: Sequence[int]) -> int:
        """Returns the number of tokens of an output before its patch tokens.

        Parameters
        ----------
        tokens
            Number of tokens of the output.
        name, pooling
            Name and pooling of the encoder.
        shape_yx
            Rows and columns of the images that the module got.

        Raises
        ------
        EncoderError
            If patch tokens can't be told from others, or if the pooling needs a class token that is missing.
        """
        prefix = self.prefix
        if self.within:
            counts = patch_counts(self.network, shape_yx)
            fitting = [tokens - count for count in counts if 0 <= tokens - count <= self.prefix]
            if counts and not fitting:
                raise EncoderError(
                    f"encoder {name} gives {tokens} tokens, but the {type(self.network).__name__} in it has "
                    f"{' or '.join(map(str, counts))} patches and {self.prefix} tokens before them: "
                    "pool inside the module."
                )
            prefix = fitting[0] if fitting else prefix
        if "cls" in pooling and not (self.has_class and prefix in (1, self.prefix) and prefix):
            raise EncoderError(f"encoder {name} gives no class token: use pooling='mean', or pool inside the module.")
        if prefix >= tokens:
            raise EncoderError(f"encoder {name} gives {tokens} tokens, and no patch token: use pooling='cls'.")
        return prefix


def token_layout(module: nn.Module, name: str) -> TokenLayout | None:
    """Returns the token layout that a module, or the networks in it, state; None if it is not stated.

    Raises `EncoderError` for networks that disagree.
    """
    found = networks_with_tokens(module, set())
    whole = [network for network in found if patch_counts(network, (1, 1))]
    if not whole and len(found) > 1:  # attention layers, of which a network has many
        return None
    networks = {(prefix_of(network), has_class_token(network)): network for network in whole or found}
    if len(networks) > 1:
        raise EncoderError(
            f"the networks in encoder {name} have {' and '.join(sorted(str(prefix) for prefix, _ in networks))} tokens "
            "before the patch tokens: pool inside the module."
        )
    for (prefix, has_class), network in networks.items():
        return TokenLayout(network, prefix or 0, has_class, network is not module)
    return None


def networks_with_tokens(module: nn.Module, seen: set[nn.Module]) -> list[nn.Module]:
    """Returns the outermost networks in a module, or the module itself, that state how many tokens come first."""
    if prefix_of(module) is not None:
        return [module]
    new = [child for child in module.children() if child not in seen]
    seen.update(new)
    return [network for child in new for network in networks_with_tokens(child, seen)]


def prefix_of(network: nn.Module) -> int | None:
    """Returns the number of tokens before the patch tokens, as timm, transformers and DINOv2 state it, or None."""
    count = getattr(network, "num_prefix_tokens", None)
    if is_count(count):
        return count
    for owner in (network, getattr(network, "config", None)):
        count = getattr(owner, "num_register_tokens", None)
        if is_count(count):
            return 1 + count
    return None


def has_class_token(network: nn.Module) -> bool:
    """Whether the first token of a network is a class token."""
    said = getattr(network, "has_class_token", None)
    if isinstance(said, bool):
        return said
    return network.cls_token is not None if hasattr(network, "cls_token") else bool(prefix_of(network))


def patch_counts(network: nn.Module, shape_yx: Sequence[int]) -> list[int]:
    """Returns the numbers of patches that a network may have: for images of a shape, or of the size it is built for."""
    embed, config = getattr(network, "patch_embed", None), getattr(network, "config", None)
    found: list[int] = []
    for owner in (embed, network, config):
        side = pair(getattr(owner, "patch_size", None))
        if side is not None:
            sizes = [tuple(shape_yx), *(pair(getattr(owner, name, None)) for name in ("img_size", "image_size"))]
            found += [(size[0] // side[0]) * (size[1] // side[1]) for size in sizes if size]
    count = getattr(embed, "num_patches", None)
    return list(dict.fromkeys([*found, count] if is_count(count) else found))


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value is a number of things."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def pair(value: Any) -> tuple[int, int] | None:
    """Returns a size as (rows, columns); None for a value that is not a size."""
    if is_count(value) and value:
        return value, value
    if isinstance(value, list | tuple) and len(value) == 2 and all(is_count(v) and v for v in value):
        return int(value[0]), int(value[1])
    return None
