"""Named encoders as data: one card each. The values are those of the weights' published configuration."""

from __future__ import annotations

from dataclasses import dataclass

from dfx.encoders.spec import Precision, Triple

IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: tuple[Triple, Triple] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Card:
    """What users should know of an encoder before they choose it."""

    name: str
    """What `load_encoder` takes."""
    source: str
    """Library and identifier of the weights."""
    input_size: tuple[int, int]
    """(rows, columns) of the pixels that the network sees."""
    mpp: float | None
    """Microns per pixel that it was trained at; None: not trained on slides."""
    mean: Triple
    """Subtracted from RGB in [0, 1]."""
    std: Triple
    """Divides what is left."""
    dim: int
    """Numbers per patch."""
    pooling: str
    """How the network's maps or tokens become one vector."""
    precision: Precision
    """In which it computes unless told otherwise."""
    license: str
    """Of the weights, as their source states it."""
    gated: bool
    """Whether the weights can be downloaded only after accepting terms."""


def _timm(
    name: str,
    tag: str,
    dim: int,
    pooling: str,
    norm: tuple[Triple, Triple] = IMAGENET,
    size: int = 224,
    license: str = "apache-2.0",
) -> Card:
    return Card(name, f"timm:{name}.{tag}", (size, size), None, *norm, dim, pooling, "float32", license, False)


CARDS: tuple[Card, ...] = (
    _timm("convnext_base", "fb_in22k_ft_in1k", 1024, "mean"),
    _timm("densenet121", "ra_in1k", 1024, "mean"),
    _timm("efficientnet_b0", "ra_in1k", 1280, "mean"),
    _timm("resnet18", "a1_in1k", 512, "mean"),
    _timm("resnet50", "a1_in1k", 2048, "mean"),
    _timm("swin_tiny_patch4_window7_224", "ms_in1k", 768, "mean", license="mit"),
    _timm("vit_base_patch14_dinov2", "lvd142m", 768, "cls", size=518),
    _timm("vit_large_patch14_dinov2", "lvd142m", 1024, "cls", size=518),
    _timm("vit_small_patch16_224", "augreg_in21k_ft_in1k", 384, "cls", norm=HALF),
    _timm("vit_tiny_patch16_224", "augreg_in21k_ft_in1k", 192, "cls", norm=HALF),
)


def list_encoders() -> tuple[Card, ...]:
    """Give the cards of the named encoders. Every other timm model name works too."""
    return CARDS
