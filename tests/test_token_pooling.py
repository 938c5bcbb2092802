"""Pooling the tokens of given transformers: registers and class tokens are not patches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

import dfx
from dfx.encoders import encode, output
from dfx.errors import EncoderError

SIDE, PATCHES = 32, 16


@pytest.fixture
def patches() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3)).astype(np.uint8)


def vit(registers: int = 4, *, class_token: bool = True, **others: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.models.VisionTransformer(
        **{"img_size": SIDE} | others,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        reg_tokens=registers,
        class_token=class_token,
        num_classes=0,
        global_pool="",
    ).eval()


class Within(nn.Module):
    """A network as an attribute, of whose tokens some are dropped."""

    def __init__(self, net: nn.Module, keep: Any = slice(None), size: int | None = None) -> None:
        super().__init__()
        self.backbone = net
        self.keep = keep
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.size is not None:
            x = F.interpolate(x, self.size)
        out = self.backbone(x)
        tokens: torch.Tensor = out if isinstance(out, torch.Tensor) else out.last_hidden_state
        return tokens[:, self.keep]


def dinov2(registers: int) -> nn.Module:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8}
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)).eval()


def transformer(name: str, **others: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8}
    config = getattr(transformers, f"{name}Config")(**sizes, intermediate_size=64, **others)
    return getattr(transformers, f"{name}Model")(config).eval()


class Named(nn.Module):
    """Has tokens before those of patches by the names of its parameters alone."""

    def __init__(self, drop: int = 0, **tokens: int) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, 32, 8, 8)
        self.drop = drop
        self.names = list(tokens)
        for name, count in tokens.items():
            setattr(self, name, nn.Parameter(torch.randn(1, count, 32)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = [getattr(self, name).expand(len(x), -1, -1) for name in self.names]
        return torch.cat([*tokens, self.cut(x).flatten(2).transpose(1, 2)], dim=1)[:, self.drop :]


class Says(nn.Module):
    """Gives tokens, and says no more than how many come first."""

    num_prefix_tokens = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2).transpose(1, 2)


MODULES = {
    "no registers": (lambda: vit(0), 1),
    "registers": (lambda: vit(4), 5),
    "in a sequence": (lambda: nn.Sequential(vit(4), nn.LayerNorm(32)), 5),
    "in a wrapper": (lambda: Within(vit(2)), 3),
    "in a wrapper of a wrapper": (lambda: nn.Sequential(Within(vit(2)), nn.Identity()), 3),
    "any size": (lambda: Within(vit(4, dynamic_img_size=True, img_size=64)), 5),
    "resized within": (lambda: Within(vit(4), size=SIDE), 5),
    "registers dropped within": (lambda: Within(vit(4), [0, *range(5, 5 + PATCHES)]), 1),
    "transformers": (lambda: Within(dinov2(4)), 5),
    "transformers without a number": (lambda: Within(transformer("ViT")), 1),
    "transformers with a distilled token": (lambda: Within(transformer("DeiT")), 2),
    "transformers of CLIP": (lambda: Within(transformer("CLIPVision")), 1),
    "named tokens": (lambda: Named(cls_token=1, register_tokens=4), 5),
    "a named token in a wrapper": (lambda: Within(Named(class_token=1)), 1),
    "data parallel": (lambda: nn.DataParallel(vit(4)), 5),
    "a network that only says so": (lambda: nn.Sequential(Says(), nn.Identity()), 3),
}


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls+mean"])
@pytest.mark.parametrize("kind", MODULES)
def test_the_mean_is_over_the_tokens_of_patches(kind: str, pooling: str, patches: NDArray[np.uint8]) -> None:
    make, prefix = MODULES[kind]
    module = make().eval()
    with torch.inference_mode():
        tokens = module(torch.from_numpy(patches).permute(0, 3, 1, 2).float() / 255)
    parts = {"cls": tokens[:, 0], "mean": tokens[:, prefix:].mean(1)}
    want = torch.cat([parts[part] for part in pooling.split("+")], dim=1).numpy()
    assert np.allclose(encode(dfx.load_encoder(module, pooling=pooling), patches), want, atol=1e-5)


def test_a_wrapper_that_gives_patches_only_loses_none_of_them(patches: NDArray[np.uint8]) -> None:
    module = Within(vit(4), slice(5, None))
    with torch.inference_mode():
        tokens = module(torch.from_numpy(patches).permute(0, 3, 1, 2).float() / 255)
    want = tokens.mean(1).numpy()
    assert np.allclose(encode(dfx.load_encoder(module, pooling="mean"), patches), want, atol=1e-5)
    for pooling in ("cls", "cls+mean"):
        with pytest.raises(EncoderError, match="gives no class token: use pooling='mean'"):
            encode(dfx.load_encoder(module, pooling=pooling), patches)


@pytest.mark.parametrize("pooling", ["cls", "cls+mean"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Within(transformer("SiglipVision")),
        lambda: Named(),
        lambda: Named(reg_tokens=2),
        lambda: Named(drop=1, cls_token=1),
    ],
)
def test_a_network_of_patches_alone_has_no_class_token(make: Any, pooling: str, patches: NDArray[np.uint8]) -> None:
    module = make()
    with pytest.raises(EncoderError, match="gives no class token"):
        encode(dfx.load_encoder(module, pooling=pooling), patches)
    with torch.inference_mode():
        tokens = module(torch.from_numpy(patches).permute(0, 3, 1, 2).float() / 255)
    found = encode(dfx.load_encoder(module, pooling="mean"), patches)
    assert np.allclose(found, tokens[:, -PATCHES:].mean(1).numpy(), atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "cls+mean"])
@pytest.mark.parametrize("registers", [0, 4])
def test_the_first_register_or_patch_is_no_class_token(
    registers: int, pooling: str, patches: NDArray[np.uint8]
) -> None:
    module = vit(registers, class_token=False)
    with pytest.raises(EncoderError, match="gives no class token"):
        encode(dfx.load_encoder(module, pooling=pooling), patches)
    assert encode(dfx.load_encoder(module, pooling="mean"), patches).shape == (3, 32)


@pytest.mark.parametrize("pooling", ["cls", "cls+mean"])
def test_a_named_network_without_class_token_gives_none(pooling: str) -> None:
    encoder = dfx.load_encoder("vit_medium_patch16_reg4_gap_256", weights="random", pooling=pooling)
    with pytest.raises(EncoderError, match="can't build"):
        output(encoder, (256, 256))


def test_tokens_that_can_not_be_told_apart_are_refused(patches: NDArray[np.uint8]) -> None:
    class Two(nn.Module):
        def __init__(self, one: nn.Module, other: nn.Module) -> None:
            super().__init__()
            self.one, self.other = one, other

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.one(x), self.other(x)], dim=1)

    with pytest.raises(EncoderError, match=r"gives 42 tokens, .* 16 patches and 5 tokens before them: pool inside"):
        encode(dfx.load_encoder(Two(vit(4), vit(4)), pooling="mean"), patches)
    with pytest.raises(EncoderError, match="have 1 and 5 tokens before the patch tokens: pool inside"):
        encode(dfx.load_encoder(Two(vit(4), vit(0)), pooling="mean"), patches)
    with pytest.raises(EncoderError, match="and no patch token"):
        encode(dfx.load_encoder(nn.Sequential(Says(), nn.AdaptiveAvgPool2d((3, 3))), pooling="mean"), patches)
