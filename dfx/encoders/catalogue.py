"""The named encoders: one card each. No code, only what their authors publish.

Values are those of each model's own card, usage code or paper. Where tools that use the model disagree, that is
followed all the same, and the disagreement noted beside it. Precision is what the model's card runs it in, or else
what TRIDENT does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

from dfx.encoders.cards import Card
from dfx.encoders.spec import Library, Precision, Triple


class Look(NamedTuple):
    """How patches are to look to a network."""

    mean: Triple
    std: Triple
    interpolation: str = "bicubic"

    @property
    def linear(self) -> Look:
        """The same, resized bilinearly."""
        return self._replace(interpolation="bilinear")


IMAGENET = Look((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = Look((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = Look((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
OPTIMUS = Look((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
HIBOU = Look((0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816))
LUNIT = Look((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464))

NC_ND = "cc-by-nc-nd-4.0"
SCALE = {"init_values": 1e-5}  # there is a LayerScale; its values come with the weights
SWIGLU = {**SCALE, "mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}
VIRCHOW = {**SWIGLU, "mlp_ratio": 5.3375}
UNI2 = {**SWIGLU, "depth": 24, "num_heads": 24, "embed_dim": 1536, "mlp_ratio": 2.66667 * 2, "reg_tokens": 8}
MULTI = (0.25, 2.0)
KAIKO = "kaiko_ai_towards_large_pathology_fms"
FILES_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
F16: Precision = "float16"


def _card(
    name: str,
    source: str,
    architecture: str | None,
    dim: int,
    license: str,
    look: Look = IMAGENET,
    build: Mapping[str, Any] | None = None,
    precision: Precision = "float32",
    *,
    gated: bool = False,
    size: int = 224,
    resize: int | None = None,
    mpp: float | None = 0.5,
    mpp_range: tuple[float, float] | None = None,
    pooling: str = "cls",
    files: tuple[str, ...] = (),
    code: bool = False,
    page: str = "",
) -> Card:
    library, _, hub = source.partition(":")
    return Card(
        name=name,
        library=cast(Library, library),
        hub=hub or None,
        input_size=(size, size),
        mpp=mpp,
        mean=look.mean,
        std=look.std,
        dim=dim,
        pooling=pooling,
        precision=precision,
        license=license,
        gated=gated,
        mpp_range=mpp_range,
        interpolation=look.interpolation,
        resize=None if resize is None else (resize, resize),
        architecture=architecture,
        build=build or {},
        files=files,
        code=code,
        page=page,
    )


def _gated(
    name: str,
    source: str,
    architecture: str,
    dim: int,
    license: str,
    look: Look,
    build: Mapping[str, Any],
    precision: Precision = "float32",
) -> Card:
    return _card(name, source, architecture, dim, license, look, build, precision, gated=True)


def _kaiko(name: str, model: str, dim: int) -> Card:
    # The weights' configuration has ImageNet's mean and std; the card's usage code has 0.5.
    source = f"timm:1aurent/{model}.{KAIKO}"
    return _card(name, source, model, dim, "kaiko-non-commercial", HALF.linear, mpp_range=MULTI)


def _lunit(name: str, model: str, tag: str, dim: int, pooling: str) -> Card:
    # Mean and std are those of the authors' release notes (lunit-io/benchmark-ssl-pathology). The configuration of
    # this mirror has timm's defaults instead, which TRIDENT and raw2features take: ImageNet's, for S/16 0.5.
    # The mirror's ResNets have other running statistics than the authors' files, which weights= takes as well.
    source = f"timm:1aurent/{model}.{tag}"
    return _card(name, source, model, dim, "lunit-non-commercial", LUNIT, mpp_range=(0.25, 0.5), pooling=pooling)


def _swin(name: str, source: str, mpp_range: tuple[float, float] | None = None, page: str = "") -> Card:
    swin, stem = "swin_tiny_patch4_window7_224", {"embed_layer": "ConvStem"}
    return _card(
        name, source, swin, 768, "gpl-3.0", build=stem, mpp=1.0, mpp_range=mpp_range, pooling="mean", page=page
    )


def _figures(
    name: str, source: str, architecture: str, dim: int, license: str, look: Look = CLIP, files: tuple[str, ...] = ()
) -> Card:
    """Trained on figures or posts with their texts: no resolution is theirs."""
    return _card(name, source, architecture, dim, license, look, mpp=None, pooling="own", files=files)


def _general(
    name: str, tag: str, dim: int, pooling: str, look: Look = IMAGENET, size: int = 224, license: str = "apache-2.0"
) -> Card:
    return _card(name, f"timm:timm/{name}.{tag}", None, dim, license, look, size=size, mpp=None, pooling=pooling)


def _variant(card: Card, name: str, pooling: str, dim: int, build: Mapping[str, Any] | None = None) -> Card:
    return replace(card, name=name, pooling=pooling, dim=dim, build=build or card.build, shares=card.name)


_virchow = replace(
    _gated("virchow", "timm:paige-ai/Virchow", "vit_huge_patch14_224", 2560, "apache-2.0", IMAGENET, VIRCHOW, F16),
    pooling="cls+mean",
)
_virchow2 = replace(
    _virchow,
    name="virchow2",
    hub="paige-ai/Virchow2",
    license=NC_ND,
    mpp_range=MULTI,
    build={**VIRCHOW, "reg_tokens": 4},
)
# H0-mini's card recommends the class token; slide2vec's default is both.
_mini = {**SWIGLU, "mlp_ratio": 5.33334}
_h0_mini = _gated("h0-mini", "timm:bioptimus/H0-mini", "vit_base_patch14_reg4_dinov2", 768, NC_ND, OPTIMUS, _mini, F16)
# Midnight's card recommends both tokens; TRIDENT's default is the class token.
_midnight = _card(
    "midnight-12k",
    "transformers:kaiko-ai/midnight",
    "Dinov2Model",
    3072,
    "mit",
    HALF.linear,
    precision=F16,
    mpp_range=MULTI,
    pooling="cls+mean",
)
# MUSK's README has ms_aug=True for linear probes; TRIDENT and raw2features leave it out.
_musk = replace(
    _gated("musk", "musk:xiangjx/musk", "musk_large_patch16_384", 1024, NC_ND, HALF, {}, F16),
    input_size=(384, 384),
    mpp_range=(0.25, 1.0),
    pooling="own",
)

PATHOLOGY: tuple[Card, ...] = (
    _gated("uni", "timm:MahmoodLab/UNI", "vit_large_patch16_224", 1024, NC_ND, IMAGENET.linear, SCALE, F16),
    _gated(
        "uni2-h",
        "timm:MahmoodLab/UNI2-h",
        "vit_giant_patch14_224",
        1536,
        NC_ND,
        IMAGENET.linear,
        {**UNI2, "no_embed_class": True},
        "bfloat16",
    ),
    replace(
        _gated("conch", "conch:MahmoodLab/CONCH", "conch_ViT-B-16", 512, NC_ND, CLIP, {}),
        input_size=(448, 448),
        pooling="own",
    ),
    _virchow,
    _variant(_virchow, "virchow-cls", "cls", 1280),
    _virchow2,
    _variant(_virchow2, "virchow2-cls", "cls", 1280),
    _card(
        "prov-gigapath",
        "timm:prov-gigapath/prov-gigapath",
        "vit_giant_patch14_dinov2",
        1536,
        "apache-2.0",
        build={"patch_size": 16},  # whatever the layers' name says
        precision=F16,
        gated=True,
        resize=256,
    ),
    _card(
        "gigapath-flash",
        "timm:prov-gigapath/prov-gigapath-flash",
        "vit_small_patch16_224",
        384,
        "apache-2.0",
        build={**SWIGLU, "mlp_ratio": 2048 / 384},
        precision=F16,
        gated=True,
        resize=256,
    ),
    _gated(
        "h-optimus-0",
        "timm:bioptimus/H-optimus-0",
        "vit_giant_patch14_reg4_dinov2",
        1536,
        "apache-2.0",
        OPTIMUS,
        SCALE,
        F16,
    ),
    _gated(
        "h-optimus-1", "timm:bioptimus/H-optimus-1", "vit_giant_patch14_reg4_dinov2", 1536, NC_ND, OPTIMUS, SCALE, F16
    ),
    _h0_mini,
    _variant(_h0_mini, "h0-mini-cls+mean", "cls+mean", 1536),
    _card(
        "phikon",
        "transformers:owkin/phikon",
        "ViTModel",
        768,
        "owkin-non-commercial",
        IMAGENET.linear,
        {"add_pooling_layer": False},
    ),
    _card("phikon-v2", "transformers:owkin/phikon-v2", "Dinov2Model", 1024, "owkin-non-commercial"),
    # Their code needs transformers below 5.
    _card("hibou-b", "transformers:histai/hibou-b", "AutoModel", 768, "apache-2.0", HIBOU, gated=True, code=True),
    _card("hibou-l", "transformers:histai/hibou-L", "AutoModel", 1024, "apache-2.0", HIBOU, gated=True, code=True),
    _midnight,
    _variant(_midnight, "midnight-12k-cls", "cls", 1536),
    _kaiko("kaiko-vit-s8", "vit_small_patch8_224", 384),
    _kaiko("kaiko-vit-s16", "vit_small_patch16_224", 384),
    _kaiko("kaiko-vit-b8", "vit_base_patch8_224", 768),
    _kaiko("kaiko-vit-b16", "vit_base_patch16_224", 768),
    _kaiko("kaiko-vit-l14", "vit_large_patch14_reg4_dinov2", 1024),
    _lunit("lunit-vit-s8", "vit_small_patch8_224", "lunit_dino", 384, "cls"),
    _lunit("lunit-vit-s16", "vit_small_patch16_224", "lunit_dino", 384, "cls"),
    _lunit("lunit-resnet50-bt", "resnet50", "lunit_bt", 2048, "mean"),
    _lunit("lunit-resnet50-swav", "resnet50", "lunit_swav", 2048, "mean"),
    _lunit("lunit-resnet50-mocov2", "resnet50", "lunit_mocov2", 2048, "mean"),
    # The two licences are the authors' own statements, on the hub and in their repository.
    _card(
        "gpfm",
        "timm:majiabo/GPFM",
        "vit_large_patch14_dinov2",
        1024,
        f"mit or {NC_ND}",
        build=SCALE,
        files=("GPFM.pth",),
    ),
    # The weights' configuration has 0.5 for mean and std, an unchanged default; the card's usage code has ImageNet's.
    _gated("mstar", "timm:Wangyh/mSTAR", "vit_large_patch16_224", 1024, NC_ND, IMAGENET.linear, SCALE),
    _musk,
    _variant(_musk, "musk-ms", "own", 2048, {"ms_aug": True}),
    # Trained at no published resolution.
    _card("keep", "keep:Astaxanthin/KEEP", "vit_large_patch16_224", 768, "mit", mpp=None, pooling="own"),
    # Pretrained at 20x, recommended by its authors at 1.0 mpp; commonly run at 0.5.
    _swin("ctranspath", "timm:1aurent/swin_tiny_patch4_window7_224.CTransPath", (0.5, 1.0)),
    _swin("chief", "timm:", page="https://github.com/hms-dbmi/CHIEF"),
    _card(
        "retccl",
        "timm:jamesdolezal/RetCCL",
        "resnet50",
        2048,
        "gpl-3.0",
        IMAGENET.linear,
        size=256,
        mpp=1.0,
        pooling="mean",
        files=("retccl.pth",),
    ),
    _gated(
        "pathorchestra",
        "timm:AI4Pathology/PathOrchestra",
        "vit_large_patch16_224",
        1024,
        NC_ND,
        IMAGENET.linear,
        SCALE,
    ),
    _card("sp22m", "timm:MountSinaiCompPath/SP22M", "vit_small_patch16_224", 384, "cc-by-nc-sa-4.0"),
    _card(
        "hipt-256",
        "timm:",
        "vit_small_patch16_224",
        384,
        "apache-2.0 with commons clause",
        HALF,
        size=256,
        page="https://github.com/mahmoodlab/HIPT",
    ),
    _figures("plip", "transformers:vinid/plip", "CLIPVisionModelWithProjection", 512, "mit"),
    _figures("quiltnet", "open_clip:wisdomik/QuiltNet-B-32", "ViT-B-32", 512, "mit", files=FILES_CLIP),
    _figures(
        "biomedclip",
        "open_clip:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
        "vit_base_patch16_224",
        512,
        "mit",
        files=FILES_CLIP,
    ),
    replace(
        _figures("medsiglip", "transformers:google/medsiglip-448", "SiglipVisionModel", 1152, "hai-def", HALF.linear),
        input_size=(448, 448),
        gated=True,
    ),
)

GENERAL: tuple[Card, ...] = (
    _general("convnext_base", "fb_in22k_ft_in1k", 1024, "mean"),
    _general("densenet121", "ra_in1k", 1024, "mean"),
    _general("efficientnet_b0", "ra_in1k", 1280, "mean"),
    _general("resnet18", "a1_in1k", 512, "mean"),
    _general("resnet50", "a1_in1k", 2048, "mean"),
    _general("swin_tiny_patch4_window7_224", "ms_in1k", 768, "mean", license="mit"),
    _general("vit_small_patch14_dinov2", "lvd142m", 384, "cls", size=518),
    _general("vit_base_patch14_dinov2", "lvd142m", 768, "cls", size=518),
    _general("vit_large_patch14_dinov2", "lvd142m", 1024, "cls", size=518),
    _general("vit_small_patch16_224", "augreg_in21k_ft_in1k", 384, "cls", HALF),
    _general("vit_tiny_patch16_224", "augreg_in21k_ft_in1k", 192, "cls", HALF),
)

CARDS: tuple[Card, ...] = PATHOLOGY + GENERAL
