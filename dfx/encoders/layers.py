"""Layers that dfx puts around or into networks of the libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.layers import SwiGLUPacked
from torch import nn
from torch.nn import functional as F

from dfx.encoders.spec import Pooling


class Tokens(nn.Module):
    """Pools the tokens of a network: `prefix` of them, the class token first, come before those of patches."""

    def __init__(self, network: nn.Module, pooling: Pooling, prefix: int) -> None:
        super().__init__()
        self.network = network
        self.pooling = pooling
        self.prefix = prefix

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Give the network's tokens (N, T, D)."""
        out: torch.Tensor = self.network(x)
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give (N, D)."""
        tokens = self.tokens(x)
        parts = {"cls": tokens[:, 0], "mean": tokens[:, self.prefix :].mean(1)}
        return torch.cat([parts[part] for part in self.pooling.split("+")], dim=1)


class Hidden(Tokens):
    """The tokens of a model of transformers."""

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Give the last hidden state (N, T, D)."""
        out: torch.Tensor = self.network(pixel_values=x).last_hidden_state
        return out


class Own(nn.Module):
    """One field of what a network gives."""

    def __init__(self, network: nn.Module, *fields: str) -> None:
        super().__init__()
        self.network = network
        self.fields = fields

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give (N, D)."""
        out = self.network(pixel_values=x)
        found: torch.Tensor = next(out[field] for field in self.fields if out.get(field) is not None)
        return found


class Called(nn.Module):
    """A network that is called in its own way."""

    def __init__(self, network: nn.Module, call: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.network = network
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give (N, D)."""
        return self.call(self.network, x)


class ConvStem(nn.Module):
    """The convolutions that stand for Swin's patch embedding in CTransPath (Wang et al. 2022).

    From colours to an eighth, a quarter and all of the width, at a quarter of the size; gives (N, rows, columns, D).
    """

    def __init__(
        self,
        img_size: Any = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        norm_layer: Callable[[int], nn.Module] | None = None,
        output_fmt: str = "NHWC",
        **others: Any,  # what timm gives every patch embedding
    ) -> None:
        super().__init__()
        self.grid_size = tuple(side // patch_size for side in img_size)
        self.patch_size = (patch_size, patch_size)
        wide, half = embed_dim // 4, embed_dim // 8
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, half, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, wide, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(inplace=True),
            nn.Conv2d(wide, embed_dim, 1),
        )
        self.norm = nn.Identity() if norm_layer is None else norm_layer(embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give (N, rows, columns, D)."""
        out: torch.Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return out


class Keep(nn.Module):
    """The image's half of KEEP (Zhou et al. 2026): a ViT-L/16, a projection, unit length.

    Built here, since the repository's own code replaces a class of timm and fails with timm of today.
    """

    def __init__(self) -> None:
        super().__init__()
        self.visual = timm.create_model("vit_large_patch16_224", init_values=1e-5, num_classes=0)
        self.visual_head = nn.Sequential(nn.Linear(1024, 768), nn.GELU(), nn.Linear(768, 768))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give (N, D)."""
        return F.normalize(self.visual_head(self.visual(x)), dim=-1)


def checkpoint_filter_fn(state: dict[str, torch.Tensor], module: nn.Module) -> dict[str, torch.Tensor]:
    """Give KEEP's parameters by timm's names; those of its texts are left out. Named as timm's own such functions."""
    return {
        key.replace(".ls1.weight", ".ls1.gamma").replace(".ls2.weight", ".ls2.gamma"): value
        for key, value in state.items()
        if key.startswith(("visual.", "visual_head."))
    }


LAYERS: dict[Any, Any] = {"SwiGLUPacked": SwiGLUPacked, "SiLU": nn.SiLU, "ConvStem": ConvStem}
"""Layers that cards name."""
