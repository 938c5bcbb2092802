"""Named encoders: what cards say is what is built; weights of files, folders, the hub; nobody's code unasked."""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch.nn import functional as F

import dfx
from dfx import cli
from dfx.encoders import Card, encode, footprint, layers, named, output
from dfx.encoders.cards import find, plain
from dfx.encoders.catalogue import PATHOLOGY
from dfx.encoders.modules import module_of
from dfx.encoders.network import Network
from dfx.encoders.prepare import Prepare
from dfx.errors import CallError, EncoderError

BUILT = [card for card in PATHOLOGY if card.library in ("timm", "keep")]
PUBLISHED = {  # millions of parameters of the image network, as papers and model cards have them
    "uni": 303.4,
    "uni2-h": 681.4,
    "virchow": 631.2,
    "virchow2": 631.2,
    "prov-gigapath": 1134.9,
    "gigapath-flash": 21.7,
    "h-optimus-0": 1134.8,
    "h0-mini": 85.7,
    "kaiko-vit-b8": 85.8,
    "kaiko-vit-l14": 304.4,
    "lunit-vit-s8": 21.7,
    "lunit-resnet50-bt": 23.5,
    "gpfm": 304.4,
    "ctranspath": 27.5,
}


@pytest.fixture
def patches() -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (3, 256, 256, 3)).astype(np.uint8)


@pytest.fixture(autouse=True)
def _no_weights_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DFX_WEIGHTS", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no cache"))


# Cards


def test_there_are_many_cards_and_each_says_all_that_is_to_be_known() -> None:
    cards = dfx.list_encoders()
    assert len(PATHOLOGY) >= 35
    assert len({plain(card.name) for card in cards}) == len(cards)
    for card in cards:
        assert card.name == card.name.lower()
        assert " " not in card.name
        assert card.dim > 0
        assert card.license
        assert card.hub or card.page
        assert min(card.std) > 0
        assert card.shares is None or find(card.shares) in cards


def test_the_command_shows_a_row_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["encoders"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "dim", "input", "mpp", "pooling", "precision", "license", "gated", "source"]
    for card, row in zip(dfx.list_encoders(), rows, strict=False):
        assert row.split()[:2] == [card.name, str(card.dim)]
        assert row.split()[-2:] == ["yes" if card.gated else "no", card.source]


@pytest.mark.parametrize("card", BUILT, ids=lambda c: c.name)
def test_what_a_card_builds_has_its_width_and_the_published_size(card: Card) -> None:
    """On torch's meta device: no memory, no weights."""
    spec = dfx.load_encoder(card.name, weights="random")
    assert output(spec, (256, 256)) == (card.dim, np.float32)
    assert (spec.mean, spec.std, spec.input_size, spec.resize) == (card.mean, card.std, card.input_size, card.resize)
    assert (spec.precision, spec.cpu_precision) == (card.precision, "float32")
    if card.name in PUBLISHED:
        count = footprint(spec, (256, 256))[0] / 4e6
        assert count == pytest.approx(PUBLISHED[card.name], rel=0.015)  # buffers are counted too


@pytest.mark.parametrize(
    ("name", "pooling", "prefix"),
    [
        ("virchow", None, 1),
        ("virchow2", None, 5),
        ("h0-mini-cls+mean", None, 5),
        ("h0-mini", "cls+mean", 5),
        ("uni", "mean", 1),
    ],
)
def test_register_tokens_are_left_out_of_the_mean(name: str, pooling: str | None, prefix: int) -> None:
    module = named.outline(dfx.load_encoder(name, weights="random", pooling=pooling))
    assert isinstance(module, layers.Tokens)
    assert module.prefix == prefix
    assert module.pooling == (pooling or "cls+mean")


@pytest.mark.parametrize(
    "name",
    ["kaiko-vit-s16", "kaiko-vit-b16", "ctranspath", "retccl"],
)
def test_small_ones_run(name: str, patches: NDArray[np.uint8]) -> None:
    card = find(name)
    assert card is not None
    got = encode(dfx.load_encoder(name, weights="random"), patches[:2])
    assert got.shape == (2, card.dim)
    assert got.dtype == np.float32
    assert np.isfinite(got).all()
    assert not np.allclose(got[0], got[1])


def test_class_and_mean_are_those_of_the_networks_tokens(patches: NDArray[np.uint8]) -> None:
    spec = dfx.load_encoder("h0-mini-cls+mean", weights="random")
    module = module_of(spec)
    with torch.inference_mode():
        tokens = module.network(Prepare(spec, torch.device("cpu"))(patches[:2]))  # type: ignore[operator]
    want = np.concatenate([tokens[:, 0].numpy(), tokens[:, 1 + 4 :].numpy().mean(1)], axis=1)
    assert tokens.shape == (2, 1 + 4 + 16 * 16, 768)
    assert np.allclose(encode(spec, patches[:2]), want, atol=1e-4)


@pytest.mark.parametrize("side", [256, 224, 300])
def test_patches_are_resized_and_their_middle_cut_out_as_the_card_says(side: int) -> None:
    spec = dfx.load_encoder("gigapath-flash", weights="random")
    patch = np.random.default_rng(2).integers(0, 256, (1, side, side, 3)).astype(np.uint8)
    x = torch.from_numpy(patch.transpose(0, 3, 1, 2).copy()).float() / 255
    if side != 256:
        x = F.interpolate(x, (256, 256), mode="bicubic", antialias=True).clamp(0, 1)
    x = x[:, :, 16:240, 16:240]
    want = (x - torch.tensor(spec.mean).view(1, 3, 1, 1)) / torch.tensor(spec.std).view(1, 3, 1, 1)
    assert torch.allclose(Prepare(spec, torch.device("cpu"))(patch), want, atol=1e-5)


def test_a_size_that_is_asked_for_cuts_nothing_off() -> None:
    spec = dfx.load_encoder("gigapath-flash", weights="random", input_size=256)
    assert (spec.input_size, spec.resize) == ((256, 256), None)
    assert output(spec, (256, 256)) == (384, np.float32)


@pytest.mark.parametrize(
    ("given", "name"),
    {
        # TIAToolbox's
        "UNI": "uni",
        "UNI2": "uni2-h",
        "prov-gigapath": "prov-gigapath",
        "H-optimus-0": "h-optimus-0",
        "H-optimus-1": "h-optimus-1",
        "H0-mini": "h0-mini",
        "Virchow": "virchow",
        "Virchow2": "virchow2",
        "kaiko": "kaiko-vit-l14",
        # TRIDENT's
        "uni_v1": "uni",
        "uni_v2": "uni2-h",
        "conch_v1": "conch",
        "virchow2-cls": "virchow2-cls",
        "hoptimus0": "h-optimus-0",
        "hoptimus1": "h-optimus-1",
        "gigapath": "prov-gigapath",
        "gigapath-flash": "gigapath-flash",
        "phikon_v2": "phikon-v2",
        "kaiko-vits8": "kaiko-vit-s8",
        "kaiko-vitb16": "kaiko-vit-b16",
        "lunit-vits8": "lunit-vit-s8",
        "midnight12k": "midnight-12k",
        "ctranspath": "ctranspath",
        "resnet50": "resnet50",
        "musk": "musk",
        "keep": "keep",
        "gpfm": "gpfm",
        "hibou_l": "hibou-l",
    }.items(),
)
def test_names_of_other_tools_are_understood(given: str, name: str) -> None:
    card = find(given)
    assert card is not None
    assert card.name == name


def test_a_name_that_is_written_otherwise_is_the_same_encoder() -> None:
    assert dfx.load_encoder("Kaiko_ViT_S16", weights="random") == dfx.load_encoder("kaiko-vit-s16", weights="random")


# Precision


def test_a_cpu_computes_in_float32_unless_asked(patches: NDArray[np.uint8]) -> None:
    spec = dfx.load_encoder("gigapath-flash", weights="random")
    asked = dfx.load_encoder("gigapath-flash", weights="random", precision="bfloat16")
    assert spec.describe()["precision"] == "float16"
    assert spec.describe()["cpu_precision"] == "float32"
    assert (asked.precision, asked.cpu_precision) == ("bfloat16", "bfloat16")
    full, half = encode(spec, patches[:1]), encode(asked, patches[:1])
    module = module_of(spec)
    with torch.inference_mode():
        want = module(Prepare(spec, torch.device("cpu"))(patches[:1])).numpy()
    assert np.allclose(full, want, atol=1e-5)
    assert half.dtype == np.float32
    assert 0 < np.abs(full - half).max() < 0.2
    assert Network(asked, module, torch.device("cpu")).precision == "bfloat16"


# Weights


@pytest.fixture
def flash(tmp_path: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    module = named.outline(dfx.load_encoder("gigapath-flash", weights="random"))
    assert module is not None
    return {name: torch.randn(value.shape) * 0.02 for name, value in module.state_dict().items()}


def test_weights_are_taken_from_the_offline_folder_under_the_encoders_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flash: dict[str, torch.Tensor], patches: NDArray[np.uint8]
) -> None:
    monkeypatch.setenv("DFX_WEIGHTS", str(tmp_path))
    with pytest.raises(EncoderError, match="DFX_WEIGHTS as gigapath-flash"):
        dfx.load_encoder("gigapath-flash")
    save_file(flash, tmp_path / "gigapath-flash.safetensors")
    spec = dfx.load_encoder("gigapath-flash")
    assert spec.weights == str(tmp_path / "gigapath-flash.safetensors")
    assert len(spec.weights_digest) == 64
    want = encode(dfx.load_encoder("gigapath-flash", weights=tmp_path / "gigapath-flash.safetensors"), patches[:1])
    assert np.array_equal(encode(spec, patches[:1]), want)
    # A worker has it elsewhere.
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "gigapath-flash").mkdir()
    torch.save(flash, tmp_path / "node" / "gigapath-flash" / "pytorch_model.bin")
    monkeypatch.setenv("DFX_WEIGHTS", str(tmp_path / "node"))
    as_bin = dfx.load_encoder("gigapath-flash")
    assert as_bin.weights == str(tmp_path / "node" / "gigapath-flash" / "pytorch_model.bin")
    (tmp_path / "gigapath-flash.safetensors").rename(tmp_path / "node" / "gigapath-flash.safetensors")
    monkeypatch.setenv("DFX_WEIGHTS", str(tmp_path / "nowhere"))
    with pytest.raises(EncoderError, match="are not a file or folder"):
        named.build(spec)
    (tmp_path / "other").mkdir()
    save_file(flash, tmp_path / "other" / "gigapath-flash.safetensors")
    monkeypatch.setenv("DFX_WEIGHTS", str(tmp_path / "other"))
    assert named.build(spec)
    save_file({key: value + 1 for key, value in flash.items()}, tmp_path / "other" / "gigapath-flash.safetensors")
    with pytest.raises(EncoderError, match="not what this run was planned with"):
        named.build(spec)


def test_variants_share_their_weights_in_the_offline_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patches: NDArray[np.uint8]
) -> None:
    small_vit("midnight-12k").save_pretrained(tmp_path / "midnight-12k")
    monkeypatch.setenv("DFX_WEIGHTS", str(tmp_path))
    both, cls = dfx.load_encoder("midnight-12k"), dfx.load_encoder("midnight-12k-cls")
    assert both.weights == cls.weights == str(tmp_path / "midnight-12k")
    assert np.array_equal(encode(both, patches[:1])[:, :1536], encode(cls, patches[:1]))


def test_a_dino_checkpoint_is_taken_with_its_arguments_and_its_head(tmp_path: Path, patches: NDArray[np.uint8]) -> None:
    network = timm.create_model("vit_small_patch16_224", num_classes=0)  # of 224, run at 256
    state = {f"module.backbone.{key}": value for key, value in network.state_dict().items()}
    state["module.head.mlp.0.weight"] = torch.zeros(3)
    arguments = argparse.Namespace(arch="vit_small", lr=0.1)
    torch.save({"student": {}, "teacher": state, "args": arguments}, tmp_path / "vit256.pth")
    spec = dfx.load_encoder("hipt-256", weights=tmp_path / "vit256.pth")
    whole = timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    whole.load_state_dict(network.state_dict())
    with torch.inference_mode():
        want = whole(Prepare(spec, torch.device("cpu"))(patches[:1])).numpy()
    assert np.allclose(encode(spec, patches[:1]), want, atol=1e-4)


def test_original_swin_checkpoints_are_taken_by_their_old_names(tmp_path: Path, patches: NDArray[np.uint8]) -> None:
    """CTransPath and CHIEF were saved by timm 0.5: another place for downsampling, and buffers."""
    torch.manual_seed(5)
    module = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, embed_layer=layers.ConvStem)
    state = {}
    for key, value in module.state_dict().items():
        parts = key.split(".")
        if parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) - 1)
        state[".".join(parts)] = value
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    torch.save({"model": state}, tmp_path / "chief.pth")
    spec = dfx.load_encoder("chief", weights=tmp_path / "chief.pth")
    with torch.inference_mode():
        want = module.eval()(Prepare(spec, torch.device("cpu"))(patches[:1])).numpy()
    assert np.allclose(encode(spec, patches[:1]), want, atol=1e-4)


def test_keep_takes_the_images_half_of_its_file() -> None:
    with torch.device("meta"):
        module = layers.Keep()
    saved = {key.replace(".gamma", ".weight"): value for key, value in module.state_dict().items()}
    saved["text.embeddings.weight"] = torch.zeros(1)
    found = layers.checkpoint_filter_fn(saved, module)
    assert found.keys() == module.state_dict().keys()


# Models of transformers and open_clip


def small_vit(name: str) -> transformers.PreTrainedModel:
    """A model of one layer that has the width of a card."""
    torch.manual_seed(3)
    small = {"num_hidden_layers": 1, "num_attention_heads": 4}
    text = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 99, **small}
    vision = {"intermediate_size": 32, "patch_size": 32, **small}
    if name == "phikon":
        config = transformers.ViTConfig(hidden_size=768, image_size=224, **vision)
        return transformers.ViTModel(config, add_pooling_layer=False)
    if name in ("phikon-v2", "midnight-12k"):
        width = 1024 if name == "phikon-v2" else 1536
        return transformers.Dinov2Model(transformers.Dinov2Config(hidden_size=width, image_size=224, **vision))
    if name == "plip":
        vision |= {"hidden_size": 64, "image_size": 224}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=512)
        return transformers.CLIPModel(config)
    vision |= {"hidden_size": 1152, "image_size": 448}
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))


def wanted_of(name: str, model: Any, x: torch.Tensor) -> torch.Tensor:
    """What a model's own usage code gives."""
    if name == "plip":
        return model.visual_projection(model.vision_model(pixel_values=x).pooler_output)  # type: ignore[no-any-return]
    if name == "medsiglip":
        return model.vision_model(pixel_values=x).pooler_output  # type: ignore[no-any-return]
    tokens = model(pixel_values=x).last_hidden_state
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1) if name == "midnight-12k" else tokens[:, 0]


@pytest.mark.parametrize("name", ["phikon", "phikon-v2", "midnight-12k", "plip", "medsiglip"])
def test_a_folder_of_transformers_gives_what_the_model_itself_gives(
    name: str, tmp_path: Path, patches: NDArray[np.uint8]
) -> None:
    model = small_vit(name).eval()
    model.save_pretrained(tmp_path)
    spec = dfx.load_encoder(name, weights=tmp_path)
    card = find(name)
    assert card is not None
    assert spec.weights == str(tmp_path)
    assert output(spec, (256, 256)) == (card.dim, np.float32)
    with torch.inference_mode():
        want = wanted_of(name, model, Prepare(spec, torch.device("cpu"))(patches[:2])).numpy()
    assert np.allclose(encode(spec, patches[:2]), want, atol=1e-4)


def test_a_folder_of_another_size_or_with_a_hole_is_refused(tmp_path: Path) -> None:
    small_vit("phikon-v2").save_pretrained(tmp_path / "phikon-v2")
    with pytest.raises(EncoderError, match="2048 numbers a patch, not 3072"):
        output(dfx.load_encoder("midnight-12k", weights=tmp_path / "phikon-v2"), (224, 224))
    with pytest.raises(EncoderError, match="not those of 'phikon'"):
        dfx.load_encoder("phikon", weights=tmp_path / "phikon-v2")
    (tmp_path / "phikon-v2" / "model.safetensors").unlink()
    with pytest.raises(EncoderError, match=r"no config\.json and model\.safetensors or pytorch_model\.bin"):
        dfx.load_encoder("phikon-v2", weights=tmp_path / "phikon-v2")
    with pytest.raises(EncoderError, match="one file"):
        dfx.load_encoder("phikon-v2", weights=tmp_path / "phikon-v2" / "config.json")


def test_other_processes_build_the_same(
    tmp_path: Path, patches: NDArray[np.uint8], processes: distributed.Client
) -> None:
    small_vit("phikon-v2").save_pretrained(tmp_path)
    spec = dfx.load_encoder("phikon-v2", weights=tmp_path)
    assert pickle.loads(pickle.dumps(spec)) == spec
    found = dfx.DeepFeatureExtractor(spec, verbose=False).run(patches, client=processes)
    assert isinstance(found, dict)
    assert np.allclose(found["features"], encode(spec, patches), atol=1e-4)


@pytest.mark.parametrize("name", ["quiltnet", "biomedclip"])
def test_a_folder_of_open_clip_gives_what_its_model_gives(
    name: str, tmp_path: Path, patches: NDArray[np.uint8]
) -> None:
    torch.manual_seed(4)
    text = {"width": 32, "heads": 2, "layers": 1, "vocab_size": 99, "context_length": 8}
    vision: dict[str, Any] = {"image_size": 224, "width": 64, "layers": 1, "patch_size": 32}
    if name == "biomedclip":
        vision = {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear"}
    config = {"embed_dim": 512, "vision_cfg": vision, "text_cfg": text}
    model = open_clip.CustomTextCLIP(**config).eval()
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    spec = dfx.load_encoder(name, weights=tmp_path)
    assert output(spec, (256, 256)) == (512, np.float32)
    with torch.inference_mode():
        want = model.encode_image(Prepare(spec, torch.device("cpu"))(patches[:2])).numpy()
    assert np.allclose(encode(spec, patches[:2]), want, atol=1e-4)


@pytest.mark.parametrize("name", ["phikon", "quiltnet", "conch"])
def test_what_needs_its_files_to_be_built_is_not_built_untrained(name: str) -> None:
    with pytest.raises(CallError, match="can't be built untrained"):
        dfx.load_encoder(name, weights="random")


@pytest.mark.parametrize("name", ["conch", "musk"])
def test_a_package_that_is_missing_is_named_with_how_to_install_it(name: str, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(EncoderError, match=r"pip install .*git\+https://github.com/"):
        dfx.load_encoder(name, weights=tmp_path / "model.safetensors")


def test_pooling_of_a_network_that_has_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CallError, match="leave out pooling"):
        dfx.load_encoder("keep", weights="random", pooling="mean")


# The hub


class Hub(BaseHTTPRequestHandler):
    """Answers as huggingface.co does: files of one repository, another gated, a third unknown."""

    files: dict[str, bytes]

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        owner, repository, _, revision, *path = (*self.path.strip("/").split("/"), "", "", "")
        headers = {"X-Repo-Commit": "1" * 40}
        status, body = 200, self.files.get("/".join(path).strip("/"))
        if (owner, repository) == ("MahmoodLab", "UNI"):
            status, body, headers["X-Error-Code"] = 403, b"", "GatedRepo"
        elif (owner, repository) != ("prov-gigapath", "prov-gigapath-flash"):
            status, body, headers["X-Error-Code"] = 401, b"", "RepoNotFound"
        elif body is None or revision not in ("main", "1" * 40):
            status, body, headers["X-Error-Code"] = 404, b"", "EntryNotFound"
        else:
            headers["ETag"] = f'"{len(body)}"'
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, flash: dict[str, torch.Tensor]) -> Iterator[str]:
    torch.save(flash, tmp_path / "served.bin")
    Hub.files = {"pytorch_model.bin": (tmp_path / "served.bin").read_bytes()}
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def said_by(script: str, tmp_path: Path, **environment: str) -> str:
    """What a process of its own prints: the hub's library reads its environment when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(filter(None, sys.path)), "HF_HOME": str(tmp_path / "hf")}
        | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_weights_come_from_the_hub_and_gated_ones_name_the_page_and_the_command(hub: str, tmp_path: Path) -> None:
    script = """
import dfx
from dfx.errors import EncoderError
def tell(name, **options):
    try:
        spec = dfx.load_encoder(name, **options)
        print(spec.name, spec.weights, len(spec.weights_digest))
    except EncoderError as e:
        print(f"{name}: {e}")
tell("gigapath-flash")
tell("gigapath-flash", revision="1" * 40)
tell("uni")
tell("mstar")
"""
    plain, pinned, gated, unknown = said_by(script, tmp_path, HF_ENDPOINT=hub).splitlines()
    assert plain == "gigapath-flash hub:prov-gigapath/prov-gigapath-flash 64"
    assert pinned == f"gigapath-flash hub:prov-gigapath/prov-gigapath-flash@{'1' * 40} 64"
    for part in ("gated", f"{hub}/MahmoodLab/UNI", "hf auth login", "HF_TOKEN", "weights=PATH", "DFX_WEIGHTS"):
        assert part in gated
    for part in ("Wangyh/mSTAR could not be downloaded", "weights=PATH"):
        assert part in unknown


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("uni", ("HF_HUB_OFFLINE", "model.safetensors", "MahmoodLab/UNI", "weights=PATH", "DFX_WEIGHTS as uni.")),
        ("gpfm", ("GPFM.pth", "majiabo/GPFM")),
        ("phikon", ("config.json and model.safetensors", "owkin/phikon", "weights=FOLDER", "DFX_WEIGHTS as phikon/")),
        ("chief", ("not on the hub", "https://github.com/hms-dbmi/CHIEF", "weights=PATH", "DFX_WEIGHTS as chief.")),
    ],
)
def test_without_network_the_files_and_where_to_put_them_are_named(name: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(EncoderError) as caught:
        dfx.load_encoder(name)
    for part in parts:
        assert part in str(caught.value)


# Code of a repository


CODE = """
import pathlib, torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

class Config(PretrainedConfig):
    model_type = "tests-own"

class Model(PreTrainedModel):
    config_class = Config
    def __init__(self, config):
        super().__init__(config)
        pathlib.Path({mark!r}).touch()
        self.project = torch.nn.Linear(3, 768)
        self.post_init()
    def forward(self, pixel_values):
        return BaseModelOutput(last_hidden_state=self.project(pixel_values.flatten(2).mT[:, :9]))
"""


def repository(folder: Path) -> Path:
    """A repository whose code leaves a mark when it runs."""
    folder.mkdir()
    (folder / "model.py").write_text(CODE.format(mark=str(folder.parent / "mark")))
    auto = {"AutoConfig": "model.Config", "AutoModel": "model.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "tests-own", "auto_map": auto}))
    torch.manual_seed(0)
    weights = {"project.weight": torch.randn(768, 3), "project.bias": torch.randn(768)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "options",
    [{}, {"trust_remote_code": True}, {"revision": "1" * 40}, {"trust_remote_code": True, "revision": "main"}],
)
def test_code_of_a_repository_is_refused_unless_one_state_of_it_is_trusted(options: dict[str, Any]) -> None:
    with pytest.raises(EncoderError, match="trust_remote_code=True and revision=COMMIT"):
        dfx.load_encoder("hibou-b", **options)


def test_code_of_a_folder_runs_when_it_is_trusted_and_belongs_to_the_digest(tmp_path: Path) -> None:
    folder = repository(tmp_path / "hibou")
    with pytest.raises(EncoderError, match="trust_remote_code=True"):
        dfx.load_encoder("hibou-b", weights=folder)
    assert not (tmp_path / "mark").exists()
    script = f"""
import pickle, numpy as np, dfx
from dfx.encoders import encode, named, output
from dfx.errors import EncoderError
spec = dfx.load_encoder("hibou-b", weights={str(folder)!r}, trust_remote_code=True)
spec = pickle.loads(pickle.dumps(spec))
print(spec.trusted, output(spec, (224, 224))[0], encode(spec, np.zeros((2, 224, 224, 3), np.uint8)).shape)
with open({str(folder / "model.py")!r}, "a") as file:
    file.write("# changed")
try:
    named.build(spec)
except EncoderError as e:
    print(e)
"""
    lines = said_by(script, tmp_path).splitlines()
    assert lines[0] == "True 768 (2, 768)"
    assert "not what this run was planned with" in lines[1]
    assert (tmp_path / "mark").exists()


def test_code_that_a_folder_takes_from_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = repository(tmp_path / "hibou")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "someone/else--model.Model"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EncoderError, match="another repository, someone/else--model"):
        dfx.load_encoder("hibou-b", weights=folder, trust_remote_code=True)


# Resolution


def test_patches_far_from_what_the_encoder_was_trained_for_are_warned_of_once_a_run(
    made_slide: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.svs"
    copy.write_bytes(made_slide.read_bytes())
    extractor = dfx.DeepFeatureExtractor("lunit-resnet50-bt", weights="random", verbose=False)
    with pytest.warns(UserWarning, match="about 4 mpp, but lunit-resnet50-bt was trained at 0.25 to 0.5") as caught:
        extractor.run(
            [made_slide, copy],
            patch_mode=False,
            patch_input_shape=224,
            input_resolutions=[{"resolution": 4.0, "units": "mpp"}],
            save_dir=tmp_path / "out",
            output_type="zarr",
            auto_get_mask=False,
        )
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("resolution", "units", "warned"),
    [
        (0.54, "mpp", False),
        (0.56, "mpp", True),
        (20, "power", False),
        (5, "power", True),
        (0, "level", False),
        (1, "level", True),
        (1.0, "baseline", False),
        (0.25, "baseline", True),
    ],
)
def test_the_resolution_of_patches_is_known_in_all_units(
    resolution: float, units: Any, warned: bool, slide: dfx.Slide
) -> None:
    grid = dfx.PatchGrid.over(slide, shape=224, resolution=resolution, units=units, mask=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dfx.features(slide, grid, dfx.load_encoder("uni", weights="random"))
    assert [str(w.message) for w in caught if "trained at 0.5" in str(w.message)] != [] if warned else not caught


def test_a_slide_that_says_its_objective_alone_is_judged_by_that(made_slide: Path) -> None:
    from dataclasses import replace

    slide = replace(dfx.open_slide(made_slide), mpp=None)
    grid = dfx.PatchGrid.over(slide, shape=224, resolution=5, units="power", mask=None)
    with pytest.warns(UserWarning, match="about 2 mpp"):
        dfx.features(slide, grid, dfx.load_encoder("uni", weights="random"))
