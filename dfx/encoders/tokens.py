"""Which tokens of a given vision transformer are not those of patches.

A network says so by a number (`num_prefix_tokens`, `num_register_tokens`), or by the names of its parameters
(`cls_token`, `register_tokens`). How many patches it has follows from its patch size, or from the convolution that cuts
the image into patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import nn

from dfx.errors import EncoderError

CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")
OTHER_TOKENS = ("dist_token", "distillation_token", "reg_token", "reg_tokens", "register_tokens", "storage_tokens")
"""Parameters of class tokens, and of other tokens that come before those of patches, by the names that networks use."""


@dataclass(frozen=True)
class TokenLayout:
    """The tokens that a network gives before its patch tokens, as it states them: class token and registers."""

    network: nn.Module
    """The network that says so."""
    prefix: int | None
    """How many there are; None: it has patches, and says nothing of other tokens."""
    has_class: bool
    """Whether the first is a class token."""
    within: bool
    """Whether some of them may be dropped: by a module around the network, or where it does not give a number."""

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
        counts = patch_counts(self.network, shape_yx) if self.within else []
        if prefix is None:
            if tokens not in counts:
                return 1 if "cls" in pooling else 0
            prefix = 0
        elif self.within:
            fitting = [tokens - count for count in counts if 0 <= tokens - count <= prefix]
            if counts and not fitting:
                raise EncoderError(
                    f"encoder {name} gives {tokens} tokens, but the {type(self.network).__name__} in it has "
                    f"{' or '.join(map(str, counts))} patches and {prefix} tokens before them: "
                    "pool inside the module."
                )
            prefix = fitting[0] if fitting else prefix
        if "cls" in pooling and not (self.has_class and prefix in (1, self.prefix) and prefix):
            raise EncoderError(f"encoder {name} gives no class token: use pooling='mean', or pool inside the module.")
        if prefix >= tokens:
            raise EncoderError(f"encoder {name} gives {tokens} tokens, and no patch token: use pooling='cls'.")
        return prefix


def token_layout(module: nn.Module, name: str) -> TokenLayout | None:
    """Returns what a module, or the networks in it, say of their tokens; None where nothing has patches or tokens.

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
        return TokenLayout(network, prefix or 0, has_class, network is not module or number_of(network) is None)
    return TokenLayout(module, None, False, within=True) if patch_counts(module, (1, 1)) else None


def networks_with_tokens(module: nn.Module, seen: set[nn.Module]) -> list[nn.Module]:
    """Returns the outermost networks in a module, or the module itself, that state how many tokens come first."""
    if prefix_of(module) is not None:
        return [module]
    new = [child for child in module.children() if child not in seen]
    seen.update(new)
    return [network for child in new for network in networks_with_tokens(child, seen)]


def prefix_of(network: nn.Module) -> int | None:
    """Returns the number of tokens before those of patches; None: unknown."""
    said = number_of(network)
    if said is not None:
        return said
    own = [value for name, value in network.named_parameters(recurse=False) if name in CLASS_TOKENS + OTHER_TOKENS]
    return sum(value.shape[-2] if value.ndim > 1 else 1 for value in own) or None


def number_of(network: nn.Module) -> int | None:
    """Returns the number of tokens before those of patches, as timm, transformers and DINOv2 have it; None: unknown."""
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
    named = [getattr(network, name) for name in CLASS_TOKENS if hasattr(network, name)]
    return any(value is not None for value in named) if named else bool(number_of(network))


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
    if not found and not is_count(count):
        sides = (
            c.stride for c in network.modules() if isinstance(c, nn.Conv2d) and c.kernel_size == c.stride != (1, 1)
        )
        found = [(shape_yx[0] // side[0]) * (shape_yx[1] // side[1]) for side in sides][:1]
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
