"""Weights files: any prefix that fits, any container, any number of shards; no code, and nothing that fits by half."""

from __future__ import annotations

import argparse
import json
import logging
import os
import pathlib
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import dfx
from dfx.encoders import hub
from dfx.encoders.fitting import load_into
from dfx.encoders.modules import module_of
from dfx.errors import EncoderError

State = dict[str, torch.Tensor]
HEAD = {"dino_head.mlp.0.weight": torch.zeros(2, 2)}


class Small(nn.Module):
    """Has parameters and counters at two depths, and a component that is called as one of Lightning's prefixes is."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.BatchNorm2d(4))
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2)])
        self.norm = nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.model(x).mean((2, 3))
        for block in self.blocks:
            x = x + block(x)
        out: torch.Tensor = self.norm(x)
        return out


def state_of(seed: int = 0) -> State:
    torch.manual_seed(seed)
    return {
        key: torch.full_like(value, seed + 7) if key.endswith("tracked") else torch.rand(value.shape) + 0.1
        for key, value in Small().state_dict().items()
    }


SAVED, OTHER = state_of(1), state_of(2)


def under(prefix: str, state: State = SAVED) -> State:
    return {prefix + key: value for key, value in state.items()}


def within(component: str) -> State:
    """As names are where a wrapper is around each block."""
    return {key.replace("blocks.0.", f"blocks.0.{component}."): value for key, value in SAVED.items()}


def loaded(content: Any, path: Path) -> State:
    torch.save(content, path)
    module = Small()
    load_into(module, path, "Small")
    return module.state_dict()


def same(one: State, two: State) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


PREFIXES = [
    "",
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "model.",
    "model.model.",
    "encoder.",
    "backbone.",
    "trunk.",
]
PREFIXES += [
    "teacher.backbone.",
    "visual.trunk.",
    "model._fsdp_wrapped_module.",
    "net.module._orig_mod.body.0.",
    "a..b.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_prefix_under_which_all_names_fit_is_taken_off(prefix: str, suffix: str, tmp_path: Path) -> None:
    module, path = Small(), tmp_path / f"w.{suffix}"
    save_file(under(prefix), path) if suffix == "safetensors" else torch.save(under(prefix), path)
    load_into(module, path, "Small")
    assert same(module.state_dict(), SAVED)


OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(9, 9)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
LIGHTNING = {
    "epoch": 3,
    "pytorch-lightning_version": "2.5",
    "optimizer_states": [OPTIMIZER],
    "hyper_parameters": {"a": 1},
}


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": SAVED, "epoch": 3, "best": torch.tensor(0.5), "args": argparse.Namespace(lr=0.1)},
        {"model_state_dict": SAVED, "optimizer_state_dict": OPTIMIZER},
        {"model": under("module."), "optimizer": {"state": {key: {"exp_avg": v} for key, v in SAVED.items()}}},
        {**LIGHTNING, "state_dict": {**under("model."), "head.weight": torch.zeros(3, 3)}},
        {**LIGHTNING, "state_dict": {**under("ema_model.module."), "ema_model.n_averaged": torch.tensor(4)}},
        {"n_averaged": torch.tensor(4), **under("module.")},
        {"student": {**under("module.backbone.", OTHER)}, "teacher": {**under("backbone."), **HEAD}},
        {"model": {**under("teacher.backbone."), **under("student.backbone.", OTHER), **HEAD}},
        {"state_dict": SAVED, "copy": {"of": {"it": SAVED}}},
        {"state_dict": {"model": {"blocks": {k.removeprefix("blocks."): v for k, v in SAVED.items() if "blocks" in k}}
            | {k: v for k, v in SAVED.items() if "blocks" not in k}}},
        within("_checkpoint_wrapped_module"),
        {"model": {f"_fsdp_wrapped_module.{key}": v for key, v in within("_fsdp_wrapped_module._orig_mod").items()}},
        {key: nn.Parameter(v, requires_grad=v.is_floating_point()) for key, v in SAVED.items()},
    ],
    ids=lambda content: "-".join(content)[:40],
)  # fmt: skip
def test_containers_and_wrappers_are_seen_through(content: Any, tmp_path: Path) -> None:
    assert same(loaded(content, tmp_path / "w.pt"), SAVED)


@pytest.mark.parametrize(
    "names",
    [
        ("student", "teacher"),
        ("state_dict", "state_dict_ema"),
        ("model", "model_ema"),
        ("encoder", "target_encoder"),
        ("teacher", "teacher_ema"),
        ("ema.student", "teacher"),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_of_two_that_fit_the_averaged_weights_are_taken_and_named(
    names: tuple[str, str], turned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = {names[0]: OTHER, names[1]: SAVED}
    content = dict(reversed(content.items())) if turned else content
    with caplog.at_level(logging.WARNING):
        assert same(loaded(content, tmp_path / "w.pt"), SAVED)
    assert f"'{names[1]}.' is taken" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        {"student": SAVED, "momentum_encoder": OTHER},
        {**SAVED, **under("backup.", OTHER)},
        {**SAVED, **under("module.", OTHER)},
        {"teacher": {"a": SAVED, "b": OTHER}},
        {"online_encoder": SAVED, "target_encoder": OTHER},
        {"student": SAVED, "momentum": {key: value.half() for key, value in SAVED.items()}},
    ],
    ids=["siblings", "bare", "wrapper", "teachers", "byol", "half"],
)
def test_two_that_fit_with_other_values_are_refused_by_name(content: Any, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="fit 'Small' under 2 prefixes with different values") as caught:
        loaded(content, tmp_path / "w.pt")
    assert "in a file of its own" in str(caught.value)
    for name in {"student", "backup", "teacher.a", "teacher.b", "online_encoder"} & {
        *content, *(f"{key}.{inner}" for key, value in content.items() if isinstance(value, dict) for inner in value)
    }:  # fmt: skip
        assert f"'{name}.'" in str(caught.value)


def test_a_near_miss_names_its_prefix_and_what_does_not_fit(tmp_path: Path) -> None:
    near = under("net.backbone.")
    del near["net.backbone.norm.weight"]
    near["net.backbone.norm.bias"] = torch.zeros(5)
    near["net.backbone.cls_token"] = torch.zeros(1)
    for content in (near, {"state_dict": near, "other": {"norm.weight": torch.zeros(4)}}):
        with pytest.raises(EncoderError) as caught:
            loaded(content, tmp_path / "w.pt")
        said = str(caught.value)
        assert "net.backbone.', " in said
        for part in (
            "under the prefix '",
            "names missing: 1 of 17 (norm.weight)",
            "tensors of another shape: 1 (norm.bias: (5,), not (4,))",
            "tensors without a place: 1 (cls_token)",
            "Give the file of this architecture",
        ):
            assert part in said
    fits = under("net.backbone.") | {"net.backbone.cls_token": torch.zeros(1)}
    with pytest.raises(
        EncoderError, match=r"under the prefix 'net\.backbone\.', tensors without a place: 1 \(cls_token\)"
    ):
        loaded(fits, tmp_path / "w.pt")


def test_a_part_of_a_network_is_not_taken_for_it(tmp_path: Path) -> None:
    """A network of which the file's is larger fits nowhere, and a layer's names alone are no network's."""
    with pytest.raises(EncoderError, match=r"tensors without a place: 1 \(blocks\.2\.0\.weight\)"):
        loaded(SAVED | {"blocks.2.0.weight": torch.zeros(8, 4)}, tmp_path / "w.pt")
    linear = nn.Linear(8, 4)
    layers = save({key: value for key, value in SAVED.items() if ".2." in key}, tmp_path / "v.pt")
    with pytest.raises(EncoderError, match="under 2 prefixes with different values"):
        load_into(linear, layers, "Linear")


def save(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


class Wrapped(nn.Module):
    """Has `module` in its own names."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.module = inner


@pytest.mark.parametrize("prefix", ["module.", "", "module.module.", "state.module."])
def test_a_network_that_has_a_wrappers_name_keeps_it(prefix: str, tmp_path: Path) -> None:
    network = Wrapped(Small())
    load_into(network, save(under(prefix), tmp_path / "w.pt"), "Wrapped")
    assert same(network.module.state_dict(), SAVED)


def test_names_that_only_a_wrapper_tells_apart_are_not_confused(tmp_path: Path) -> None:
    network = nn.ModuleDict({"a": nn.Linear(2, 2), "module": nn.ModuleDict({"a": nn.Linear(2, 2)})})
    state = {key: torch.rand(value.shape) for key, value in network.state_dict().items()}
    for prefix in ("", "model."):
        load_into(network, save(under(prefix, state), tmp_path / "w.pt"), "Dict")
        assert same(network.state_dict(), state)


def test_files_of_old_torch_and_hooks_of_the_network_still_fit(tmp_path: Path) -> None:
    old = {f"model.{key}": value for key, value in SAVED.items() if not key.endswith("tracked")}
    got = loaded(old, tmp_path / "old.pt")
    assert all(torch.equal(got[key.removeprefix("model.")], value) for key, value in old.items())
    network = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    plain = {"weight_g": torch.rand(2, 1), "weight_v": torch.rand(2, 3), "bias": torch.rand(2)}
    load_into(network, save(under("head.", plain), tmp_path / "norm.pt"), "Linear")
    assert torch.equal(network.parametrizations.weight.original0, plain["weight_g"])  # type: ignore[union-attr, index]


# Formats


def compressed(path: Path) -> None:
    """Packs a file of torch anew, as other tools do."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(path.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    path.with_suffix(".zip").rename(path)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w", "w.ckpt"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "compressed"])
def test_the_content_of_a_file_and_not_its_name_tells_its_format(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if kind == "safetensors":
        save_file(under("model."), path)
    else:
        torch.save(under("model."), path, _use_new_zipfile_serialization=kind != "legacy")
    if kind == "compressed":
        compressed(path)
    module = Small()
    load_into(module, path, "Small")
    assert same(module.state_dict(), SAVED)


def test_half_precision_is_cast(tmp_path: Path) -> None:
    got = loaded(under("model.", {key: value.half() for key, value in SAVED.items()}), tmp_path / "w.pt")
    assert all(value.dtype == Small().state_dict()[key].dtype for key, value in got.items())
    assert all(torch.equal(value.half(), SAVED[key].half()) for key, value in got.items())


class Attack:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["DFX_TEST_ATTACK"],)


@pytest.mark.parametrize("kind", ["zip", "legacy", "shard", "compressed"])
def test_no_format_runs_code(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFX_TEST_ATTACK", str(tmp_path / "pwned"))
    path = tmp_path / "w.safetensors"
    torch.save({**SAVED, "hyper_parameters": Attack()}, path, _use_new_zipfile_serialization=kind != "legacy")
    if kind == "compressed":
        compressed(path)
    if kind == "shard":
        path = index(tmp_path, dict.fromkeys(SAVED, "w.safetensors"))
    with pytest.raises(EncoderError, match=r"only tensors are taken from a file; save module\.state_dict"):
        dfx.load_encoder(Small(), weights=path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "extra", [pathlib.PurePosixPath("a"), np.float64(1), nn.Linear(2, 2)], ids=["path", "numpy", "module"]
)
def test_objects_in_a_checkpoint_are_named_with_the_remedy(extra: Any, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"hold \w+.*, and only tensors .* If you trust the origin"):
        loaded({"state_dict": SAVED, "hyper_parameters": {"x": extra}}, tmp_path / "w.ckpt")


def test_dicts_in_circles_and_of_endless_depth_end(tmp_path: Path) -> None:
    circle: dict[str, Any] = {"state_dict": SAVED}
    circle["again"] = circle
    assert same(loaded(circle, tmp_path / "circle.pt"), SAVED)
    many: dict[str, Any] = {"w": torch.zeros(1)}
    for _ in range(12):
        many = {str(n): many for n in range(30)}
    with pytest.raises(EncoderError, match="not those of 'Small'"):
        loaded(many, tmp_path / "many.pt")
    with pytest.raises(EncoderError, match=r"two tensors under 'a\.b\.c'"):
        loaded({"a": {"b.c": torch.zeros(1)}, "a.b": {"c": torch.ones(1)}}, tmp_path / "twice.pt")


# Shards


def index(folder: Path, shards: dict[str, Any], name: str = "model.safetensors.index.json") -> Path:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": shards}))
    return folder / name


def sharded(folder: Path, state: State, kind: str) -> Path:
    folder.mkdir(exist_ok=True)
    stem, suffix = kind.split(".")
    place = {key: f"{stem}-0000{1 + n % 2}-of-00002.{suffix}" for n, key in enumerate(state)}
    for shard in set(place.values()):
        part = {key: value for key, value in state.items() if place[key] == shard}
        save_file(part, folder / shard) if suffix == "safetensors" else torch.save(part, folder / shard)
    return index(folder, place, f"{kind}.index.json")


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_shards_are_read_by_their_index_or_its_folder(kind: str, prefix: str, tmp_path: Path) -> None:
    path = sharded(tmp_path / "w", under(prefix), kind)
    for given in (path, path.parent):
        assert same(module_of(dfx.load_encoder(Small(), weights=given)).state_dict(), SAVED)
    shard = f"{kind.partition('.')[0]}-00001-of-00002.{kind.partition('.')[2]}"
    with pytest.raises(EncoderError, match=rf"Give the index of all shards, .*{kind}\.index\.json"):
        dfx.load_encoder(Small(), weights=path.parent / shard)
    (path.parent / shard).unlink()
    with pytest.raises(EncoderError, match=rf"lack 1 of 2 shards \({shard}\)"):
        dfx.load_encoder(Small(), weights=path)


def test_the_digest_covers_all_shards_wherever_they_lie(tmp_path: Path) -> None:
    state = timm.create_model("test_vit").state_dict()
    path = sharded(tmp_path / "a", under("model.", state), "model.safetensors")
    spec = dfx.load_encoder("test_vit", weights=path)
    assert dfx.load_encoder("test_vit", weights=path.parent).weights_digest == spec.weights_digest
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert dfx.load_encoder("test_vit", weights=tmp_path / "b").weights_digest == spec.weights_digest
    last = sorted(state)[-1]
    sharded(tmp_path / "b", under("model.", state | {last: state[last] + 1}), "model.safetensors")
    assert dfx.load_encoder("test_vit", weights=tmp_path / "b").weights_digest != spec.weights_digest


@pytest.mark.parametrize("shard", ["../w.safetensors", "a/../../w.safetensors", "/etc/passwd"])
def test_an_index_names_nothing_outside_its_folder(shard: str, tmp_path: Path) -> None:
    save_file(SAVED, tmp_path / "w.safetensors")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").mkdir()
    path = index(tmp_path / "in", dict.fromkeys(SAVED, shard))
    for given in (path, path.parent):
        with pytest.raises(EncoderError, match="outside their folder"):
            dfx.load_encoder("test_vit", weights=given)
        with pytest.raises(EncoderError, match="outside their folder"):
            dfx.load_encoder(Small(), weights=given)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000, "\x00"])
def test_a_damaged_index_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(EncoderError, match=r"weights .*index\.json"):
        dfx.load_encoder(Small(), weights=path)


def test_shards_that_lack_a_tensor_of_their_index_are_refused(tmp_path: Path) -> None:
    path = sharded(tmp_path, SAVED, "model.safetensors")
    place = json.loads(path.read_text())["weight_map"]
    index(tmp_path, place | {"more": next(iter(place.values()))})
    with pytest.raises(EncoderError, match=r"their shards lack \(more\)"):
        dfx.load_encoder(Small(), weights=path)


# Named encoders


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.", "encoder.", "teacher.backbone."])
def test_named_encoders_of_timm_take_prefixed_files_with_old_names_and_heads(prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(4)
    whole = timm.create_model("test_vit", num_classes=7)
    state = {key: torch.rand(value.shape) for key, value in whole.state_dict().items()}
    linear = state | {"patch_embed.proj.weight": state["patch_embed.proj.weight"].flatten(1)}  # which timm converts
    for content in (state, linear):
        path = save({"state_dict": {**under(prefix, content), **HEAD}}, tmp_path / "w.ckpt")
        got = module_of(dfx.load_encoder("test_vit", weights=path)).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in got.items())


def test_offline_weights_that_do_not_fit_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFX_WEIGHTS", str(tmp_path))
    save({"model": SAVED}, tmp_path / "test_vit.pt")
    with pytest.raises(EncoderError, match="not those of 'test_vit'"):
        dfx.load_encoder("test_vit")


@pytest.mark.parametrize("how", ["prefix", "nested", "shards", "mislabelled"])
def test_named_encoders_of_transformers_take_them_too(how: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    layers = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32, "patch_size": 32}
    config = transformers.ViTConfig(hidden_size=768, image_size=224, **layers)
    model = transformers.ViTModel(config, add_pooling_layer=False)
    state = {key: torch.rand(value.shape) for key, value in model.state_dict().items()}
    model.config.save_pretrained(tmp_path)
    if how == "prefix":
        save_file(under("teacher.backbone.", state), tmp_path / "model.safetensors")
    elif how == "shards":
        sharded(tmp_path, under("_orig_mod.", state), "model.safetensors")
    elif how == "mislabelled":
        save_file(state, tmp_path / "pytorch_model.bin")
    else:
        torch.save({"state_dict": under("model.", state), "epoch": 3}, tmp_path / "pytorch_model.bin")
    spec = dfx.load_encoder("phikon", weights=tmp_path)
    got = module_of(spec).network.state_dict()  # type: ignore[union-attr, operator]
    assert same(got, state)


def test_a_shard_is_fetched_with_its_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    sharded(tmp_path / "repository", SAVED, "model.safetensors")
    asked = []

    def fetch(repository: str, name: str, **_: Any) -> str:
        asked.append(name)
        if not (tmp_path / "repository" / name).is_file():
            raise errors.LocalEntryNotFoundError(name)
        return str(tmp_path / "repository" / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    wanted = hub.Wanted("x", (hub.FILES,), "owner/x")
    assert hub.fetched(wanted) == tmp_path / "repository" / "model.safetensors.index.json"
    assert asked[-2:] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
