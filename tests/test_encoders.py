"""Encoders: named, given, TIAToolbox-like; weights that are checked; nothing silently random."""

from __future__ import annotations

import copy
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from nets import Means, means
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import dfx
from dfx.encoders import encode, modules, output
from dfx.encoders import network as net
from dfx.errors import CallError, CallTypeError, EncoderError


@pytest.fixture
def patches() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (5, 64, 48, 3)).astype(np.uint8)


def plain(module: nn.Module, x: NDArray[np.uint8], mean: Any, std: Any, size: tuple[int, int] | None) -> NDArray[Any]:
    """What an encoder is to give: torch alone, one patch at a time."""
    out = []
    with torch.inference_mode():
        for patch in x:
            t = torch.from_numpy(patch.transpose(2, 0, 1)[None].copy()).float() / 255
            if size and tuple(t.shape[2:]) != size:
                t = F.interpolate(t, size, mode="bicubic", antialias=True).clamp(0, 1)
            t = (t - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
            out.append(module(t)[0].numpy())
    return np.stack(out)


# Named encoders


@pytest.mark.parametrize("card", [c for c in dfx.list_encoders() if c.architecture is None], ids=lambda c: c.name)
def test_a_card_says_what_the_weights_configuration_says(card: Any) -> None:
    config = timm.get_pretrained_cfg(card.name)
    assert card.source == f"timm:timm/{card.name}.{config.tag}"
    assert (card.input_size, card.mean, card.std) == (tuple(config.input_size[1:]), config.mean, config.std)
    assert card.license == config.license
    spec = dfx.load_encoder(card.name, weights="random")
    assert output(spec, (96, 96)) == (card.dim, np.float32)
    assert (spec.mean, spec.std, spec.input_size) == (card.mean, card.std, card.input_size)


@pytest.mark.parametrize(("name", "dim"), [("vit_tiny_patch16_224", 192), ("convnext_atto", 320), ("resnet18", 512)])
def test_a_timm_name_gives_pooled_features_of_the_right_width(name: str, dim: int) -> None:
    spec = dfx.load_encoder(name, weights="random")
    assert output(spec, (224, 224)) == (dim, np.dtype(np.float32))
    got = encode(spec, np.zeros((3, 224, 224, 3), np.uint8), batch_size=2)
    assert got.shape == (3, dim)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_of_a_file_are_used_whole(
    suffix: str, wrapped: bool, tmp_path: Path, patches: NDArray[np.uint8]
) -> None:
    torch.manual_seed(3)
    full = timm.create_model("resnet18", pretrained=False)  # with its classifier, as published files have it
    state = {f"module.{k}" if wrapped else k: v for k, v in full.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": state, "epoch": 3} if wrapped else state, path)
    else:
        save_file(state, path)
    spec = dfx.load_encoder("resnet18", weights=path)
    assert spec.weights == str(path)
    full.reset_classifier(0)
    want = plain(full.eval(), patches, spec.mean, spec.std, (224, 224))
    got = encode(spec, patches, batch_size=2)
    assert np.allclose(got, want, atol=1e-4)
    assert not np.allclose(got, encode(dfx.load_encoder("resnet18", weights="random"), patches), atol=1e-2)


def test_a_vits_published_checkpoint_is_accepted(tmp_path: Path) -> None:
    full = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    save_file(full.state_dict(), tmp_path / "vit.safetensors")
    spec = dfx.load_encoder("vit_tiny_patch16_224", weights=str(tmp_path / "vit.safetensors"))
    assert encode(spec, np.zeros((1, 224, 224, 3), np.uint8)).shape == (1, 192)


def test_random_weights_are_asked_for_and_the_same_everywhere(patches: NDArray[np.uint8]) -> None:
    spec = dfx.load_encoder("resnet18", weights="random")
    before = torch.get_rng_state()
    first = encode(spec, patches)
    modules.MODULES.clear()
    net.NETWORKS.clear()
    torch.manual_seed(99)
    assert np.array_equal(encode(spec, patches), first)
    torch.set_rng_state(before)


def test_without_network_the_missing_file_and_the_way_out_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(EncoderError) as caught:
        dfx.load_encoder("resnet18")
    for part in ("model.safetensors", "timm/resnet18.a1_in1k", "weights=PATH", "weights='random'"):
        assert part in str(caught.value)


def test_published_weights_are_taken_from_the_hubs_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real look-up of the hub's library, in a cache laid out as it lays it out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    repository = tmp_path / "models--timm--resnet18.a1_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    full = timm.create_model("resnet18", pretrained=False)
    save_file(full.state_dict(), snapshot / "model.safetensors")
    import huggingface_hub

    original = huggingface_hub.hf_hub_download
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *a, **k: original(*a, **{"cache_dir": str(tmp_path)} | k)
    )
    spec = dfx.load_encoder("resnet18")
    assert spec.weights == "hub:timm/resnet18.a1_in1k"
    assert len(spec.weights_digest) == 64
    assert encode(spec, np.zeros((1, 224, 224, 3), np.uint8)).shape == (1, 512)


class Attack:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["DFX_TEST_ATTACK"],)


def test_a_weights_file_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFX_TEST_ATTACK", str(tmp_path / "pwned"))
    torch.save({"state_dict": Attack()}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Attack()))
    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(EncoderError, match="only tensors are taken"):
            dfx.load_encoder("resnet18", weights=tmp_path / name)
    assert not (tmp_path / "pwned").exists()


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_file(timm.create_model("resnet34").state_dict(), tmp_path / "resnet34.safetensors")
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "vit.safetensors")
    state = timm.create_model("resnet18").state_dict()
    del state["layer1.0.conv1.weight"]
    save_file(state, tmp_path / "hole.safetensors")
    (tmp_path / "text.safetensors").write_text("these are not weights")
    (tmp_path / "empty.pth").touch()
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("a", "b")
    torch.save([1, 2], tmp_path / "list.pt")
    names = ["resnet34", "vit", "hole", "text"]
    for path in [
        *(tmp_path / f"{n}.safetensors" for n in names),
        *tmp_path.glob("*.pt*"),
        tmp_path / "none.pt",
        tmp_path,
    ]:
        with pytest.raises(EncoderError) as caught:
            dfx.load_encoder("resnet18", weights=path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["resnet_19", "no-such-network", "", "RESNET18 "])
def test_an_unknown_name_is_refused_with_what_is_close(name: str) -> None:
    with pytest.raises(EncoderError, match="dfx encoders"):
        dfx.load_encoder(name, weights="random")


@pytest.mark.parametrize("given", [7, None, nn.Module, np.zeros(3), ["resnet18"]])
def test_what_is_no_encoder_is_refused(given: Any) -> None:
    with pytest.raises(CallTypeError, match=r"a name or a torch\.nn\.Module"):
        dfx.load_encoder(given)


# Given modules


def test_a_module_gets_rgb_from_0_to_1_and_is_left_as_it_was(patches: NDArray[np.uint8]) -> None:
    module = nn.Sequential(Means(), nn.Dropout(0.9)).train()
    got = encode(dfx.load_encoder(module), patches, batch_size=2)
    assert np.allclose(got, means(patches), atol=1e-5)  # evaluated, so that nothing was dropped
    assert module.training
    assert module[1].training


def test_normalisation_and_size_are_those_given(patches: NDArray[np.uint8]) -> None:
    spec = dfx.load_encoder(Means(), mean=(0.7, 0.6, 0.5), std=(0.2, 0.3, 0.4), input_size=32)
    want = plain(Means(), patches, (0.7, 0.6, 0.5), (0.2, 0.3, 0.4), (32, 32))
    assert np.allclose(encode(spec, patches), want, atol=1e-5)


class Tokens(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2).transpose(1, 2)


def test_tokens_and_maps_are_pooled_only_when_told_how(patches: NDArray[np.uint8]) -> None:
    x = patches.reshape(5, -1, 3) / 255
    for pooling, want in {
        "cls": x[:, 0],
        "mean": x.mean(1),
        "cls+mean": np.concatenate([x[:, 0], x[:, 1:].mean(1)], axis=1),
    }.items():
        assert np.allclose(encode(dfx.load_encoder(Tokens(), pooling=pooling), patches), want, atol=1e-5)
    assert np.allclose(encode(dfx.load_encoder(nn.Identity(), pooling="mean"), patches), x.mean(1), atol=1e-5)
    for module in (Tokens(), nn.Identity()):
        with pytest.raises(EncoderError, match=r"not \(2, D\).*pooling="):
            output(dfx.load_encoder(module), (64, 48))


class Wrong(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: torch.Tensor) -> Any:
        if self.what == "raises":
            raise RuntimeError("no luck")
        return {"dict": {"x": x}, "none": None, "one row": x.mean((0, 2, 3))[None], "scalar": x.mean()}[self.what]


@pytest.mark.parametrize("what", ["raises", "dict", "none", "one row", "scalar"])
def test_an_output_that_is_not_a_row_a_patch_is_refused(what: str) -> None:
    with pytest.raises(EncoderError, match="encoder Wrong"):
        output(dfx.load_encoder(Wrong(what)), (32, 32))


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) * self.factor


def test_modules_that_differ_only_in_an_attribute_are_not_confused(patches: NDArray[np.uint8]) -> None:
    one, two = dfx.load_encoder(Scale(1.0)), dfx.load_encoder(Scale(2.0))
    assert one.weights_digest != two.weights_digest
    assert one.weights_digest == dfx.load_encoder(Scale(1.0)).weights_digest
    assert np.allclose(2 * encode(one, patches), encode(two, patches))


def test_a_module_that_was_trained_on_is_another_encoder(patches: NDArray[np.uint8]) -> None:
    module = nn.Sequential(Means(), nn.Linear(6, 2))
    before = dfx.load_encoder(module)
    first = encode(before, patches)
    with torch.no_grad():
        module[1].weight.add_(1)
    after = dfx.load_encoder(module)
    assert after.weights_digest != before.weights_digest
    assert np.array_equal(encode(before, patches), first)
    assert not np.allclose(encode(after, patches), first)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.float16, "float16"), (torch.float64, "float64"), (torch.bfloat16, "float32"), (torch.int64, "float32")],
)
def test_features_keep_a_dtype_that_numpy_and_zarr_have(dtype: torch.dtype, stored: str) -> None:
    class Typed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3)).to(dtype)

    assert output(dfx.load_encoder(Typed()), (8, 8)) == (3, np.dtype(stored))


# Modules with TIAToolbox's interface


class Toolbox(nn.Module):
    """The contract of `ModelABC`: preproc_func on HWC, infer_batch static on NHWC."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def preproc_func(self, patch: NDArray[np.uint8]) -> NDArray[np.float32]:
        assert patch.ndim == 3
        return patch.astype(np.float32) / 255

    @staticmethod
    def infer_batch(model: Any, batch: torch.Tensor, *, device: str) -> Any:
        assert device == "cpu"
        assert batch.shape[3] == 3
        rows = torch.cat([batch.mean((1, 2)), (batch * batch).mean((1, 2))], dim=1).numpy()
        return {
            "array": rows,
            "list of one array": [rows],
            "tuple of two arrays": (rows, rows * 0),
            "tensor": torch.from_numpy(rows),
            "list of rows": list(rows),
            "maps": rows.reshape(len(rows), 3, 2, 1),
        }[model.form]


@pytest.mark.parametrize(
    "form", ["array", "list of one array", "tuple of two arrays", "tensor", "list of rows", "maps"]
)
@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_every_patch_has_features_whatever_infer_batch_returns(
    form: str, batch_size: int, patches: NDArray[np.uint8]
) -> None:
    got = encode(dfx.load_encoder(Toolbox(form)), patches, batch_size=batch_size)
    assert np.allclose(got, means(patches), atol=1e-5)


# The machine


def test_torch_uses_the_threads_of_the_worker_and_then_as_many_as_before(patches: NDArray[np.uint8]) -> None:
    seen: list[int] = []

    class Threads(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            return x.mean((2, 3))

    before = torch.get_num_threads()
    encode(dfx.load_encoder(Threads()), patches, threads=before + 3)
    assert set(seen) == {before + 3}
    assert torch.get_num_threads() == before


def test_a_device_that_is_not_there_is_an_error_and_no_silent_cpu(patches: NDArray[np.uint8]) -> None:
    with pytest.raises(EncoderError, match="device 'cuda:99' is not here"):
        encode(dfx.load_encoder(Means()), patches, device="cuda:99")
    with pytest.raises(EncoderError, match="no device"):
        dfx.DeepFeatureExtractor(Means(), device="warp drive")


def test_options_that_can_not_be_are_refused() -> None:
    for bad in ({"precision": "float8"}, {"pooling": "max"}, {"mean": (1, 2)}, {"std": (0, 1, 1)}):
        with pytest.raises(CallError):
            dfx.load_encoder(Means(), **bad)  # type: ignore[arg-type]


def test_a_spec_is_small_and_survives_pickling() -> None:
    spec = dfx.load_encoder("resnet18", weights="random")
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert copy.deepcopy(spec) == spec
    assert len(pickle.dumps(spec)) < 700
    assert sys.getsizeof(spec.key) < 200
