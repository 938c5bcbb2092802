"""Encoders are told apart by what they give, whatever their code, their weights' files or their versions say."""

from __future__ import annotations

import functools
import hashlib
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import distributed
import nets
import numpy as np
import pytest
import torch
import zarr
from clusters import WORKER, dask, scheduler, until
from conftest import WSI
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

import dfx
from dfx import arrays, cli
from dfx.encoders import BEHAVIOURS, Behaviour, behaviour, measure, modules, named
from dfx.errors import ClusterLost, EncoderError, RunError, WorkerMismatch
from dfx.plan import Options
from dfx.slides.synthetic import write_slide

DIGESTS = ["9c0a3e8682ce", "62e24e6b9cc2", "eff66c08eea5"]
"""Of the patches of scheme 1: where they change, so must `behaviour.SCHEME`."""
PROJECTED = [[-58.8525, -89.9086, 179.2445], [42.1082, -31.4026, 40.397], [74.0129, -38.3181, 46.9307]]
ALL: dict[str, Any] = WSI | {"auto_get_mask": False, "block_size": 50}


@pytest.fixture(autouse=True)
def _nothing_measured() -> None:
    BEHAVIOURS.clear()


def of(module: nn.Module, shape: tuple[int, int] = (64, 64), **options: Any) -> Behaviour:
    """Measure a module anew."""
    BEHAVIOURS.clear()
    return measure(dfx.load_encoder(module, **options), "cpu", shape)


def extractor_of(*encoders: Any) -> dfx.DeepFeatureExtractor:
    return dfx.DeepFeatureExtractor(list(encoders) if len(encoders) > 1 else encoders[0], verbose=False)


# Patches and projection


def test_patches_and_projection_are_the_same_on_every_machine_for_ever() -> None:
    digests = [
        hashlib.sha256(behaviour.synthetic_patches(shape, channels).tobytes()).hexdigest()[:12]
        for shape, channels in (((224, 224), 3), ((64, 48), 4), ((1, 1), 3))
    ]
    assert digests == DIGESTS
    rows = np.arange(3 * 20000, dtype=np.float64).reshape(3, -1) % 257
    assert np.allclose(behaviour.project(rows)[:, [0, 1, 31]], PROJECTED, rtol=1e-6)


def test_no_patch_looks_the_same_turned_mirrored_or_recoloured() -> None:
    for patch in behaviour.synthetic_patches((32, 32)):
        others = [np.rot90(patch, k) for k in (1, 2, 3)] + [patch[::-1], patch[:, ::-1], patch.swapaxes(0, 1)]
        others += [patch[..., order] for order in ([1, 0, 2], [2, 1, 0], [0, 2, 1])]
        assert all(np.abs(patch.astype(int) - other).mean() > 3 for other in others)


def test_a_behaviour_survives_a_store_and_a_task() -> None:
    one = of(nets.Means(), (40, 56))
    assert behaviour.read_behaviour(one.describe()) == one == cloudpickle.loads(cloudpickle.dumps(one))
    for damage in ({"scheme": 99}, {"shape": None}, {"projection": [[1.0]]}, {"precision": None, "projection": "x"}):
        assert behaviour.read_behaviour(one.describe() | damage) is None
    assert behaviour.read_behaviour(None) is None


# Modules that a digest of their code takes for equal


def conv() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(3, 4, 8, stride=8)


class Pooled(nn.Module):
    """Tokens of a convolution, pooled by a function that a private attribute holds."""

    def __init__(self, pool: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.net = conv()
        self._pool = pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._pool(self.net(x).flatten(2))


class Mode(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.net = conv()
        self._mode = mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.net(x).flatten(2)
        return {"cls": tokens[..., 0], "last": tokens[..., -1], "mean": tokens.mean(-1)}[self._mode]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = conv()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).mean((2, 3))


def hooked(function: Callable[..., Any], *, before: bool = False) -> nn.Module:
    module = Plain()
    if before:
        module.net.register_forward_pre_hook(lambda _, inputs: (function(inputs[0]),))
    else:
        module.net.register_forward_hook(lambda _, __, out: function(out))
    return module


def constant() -> float:
    return 1.0


class Calls(Plain):
    """Calls a function by its global name."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * constant()


class Lut(nn.Module):
    """Keeps a table in a plain private attribute."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._table = torch.rand(12, 5, generator=torch.Generator().manual_seed(seed))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(x, 2).flatten(1) @ self._table


def quantised(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 8)).eval()
    torch.backends.quantized.engine = "x86" if "x86" in torch.backends.quantized.supported_engines else "qnnpack"
    return torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)  # type: ignore[no-any-return]


def resized(mode: str) -> nn.Module:
    return hooked(functools.partial(F.interpolate, scale_factor=0.5, mode=mode, align_corners=False), before=True)


PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "private attribute": (lambda: Mode("cls"), lambda: Mode("mean")),
    "private attribute, first or last": (lambda: Mode("cls"), lambda: Mode("last")),
    "builtin function": (lambda: hooked(torch.sigmoid), lambda: hooked(torch.tanh)),
    "argument of a partial": (
        lambda: Pooled(functools.partial(torch.quantile, q=0.1, dim=-1)),
        lambda: Pooled(functools.partial(torch.quantile, q=0.2, dim=-1)),
    ),
    "function": (lambda: Pooled(lambda t: t.mean(-1)), lambda: Pooled(lambda t: t.amax(-1))),
    "hook": (lambda: hooked(torch.relu), lambda: hooked(lambda out: out * 0 + 1)),
    "hook or none": (lambda: hooked(torch.relu), Plain),
    "hook before": (lambda: hooked(lambda x: x.flip(1), before=True), Plain),
    "mirrored": (lambda: hooked(lambda x: x.flip(3), before=True), Plain),
    "turned": (lambda: hooked(lambda x: x.rot90(1, (2, 3)), before=True), Plain),
    "interpolation": (lambda: resized("bilinear"), lambda: resized("bicubic")),
    "small shift": (lambda: hooked(lambda out: out * 1.001), Plain),
    "clamped at the brightest": (lambda: hooked(lambda x: x.clamp(max=0.98), before=True), Plain),
    "tensor in an attribute": (lambda: Lut(1), lambda: Lut(2)),
}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("shape", [(32, 32), (224, 224)], ids=str)
def test_modules_that_compute_differently_are_told_apart(kind: str, shape: tuple[int, int]) -> None:
    one, other = (of(make(), shape) for make in PAIRS[kind])
    again = of(PAIRS[kind][0](), shape)
    assert behaviour.behaviour_difference(one, other)
    assert not behaviour.behaviour_difference(one, again)


@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated, and in use
def test_packed_weights_are_told_apart() -> None:
    assert behaviour.behaviour_difference(of(quantised(1)), of(quantised(2)))
    assert not behaviour.behaviour_difference(of(quantised(1)), of(quantised(1)))


def test_a_function_that_forward_calls_by_a_global_name_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = of(Calls())
    monkeypatch.setitem(globals(), "constant", lambda: 1.01)
    assert behaviour.behaviour_difference(before, of(Calls()))


# Equal where it should be


def test_another_process_and_number_of_threads_give_the_same(resnet18: dfx.EncoderSpec) -> None:
    code = """import sys, torch, dfx
from dfx.encoders import measure
torch.set_num_threads(4)
sys.stdout.write(measure(dfx.load_encoder("resnet18", weights="random"), "cpu", (64, 64), threads=4).data.hex())"""
    there = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    here = measure(resnet18, "cpu", (64, 64), threads=1)
    other = Behaviour((64, 64), bytes.fromhex(there), "cpu", "float32")
    assert behaviour.distance(here, other) < 0.1 * behaviour.TOLERANCES["float32"]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_less_precision_is_the_same_network_within_its_tolerance_and_another_network_is_not(
    precision: str, resnet18: dfx.EncoderSpec
) -> None:
    exact = measure(resnet18, "cpu", (64, 64))
    coarse = measure(dfx.load_encoder("resnet18", weights="random", precision=precision), "cpu", (64, 64))
    assert (exact.precision, coarse.precision) == ("float32", precision)
    assert behaviour.distance(exact, coarse) > behaviour.TOLERANCES["float32"]
    assert not behaviour.behaviour_difference(exact, coarse)
    other = measure(dfx.load_encoder("resnet34", weights="random"), "cpu", (64, 64))
    assert f"where {100 * coarse.tolerance:g} % is allowed" in behaviour.behaviour_difference(coarse, other)


def test_the_larger_tolerance_holds_where_kinds_of_device_meet() -> None:
    one = of(nets.Means())
    near = (one.projection * (1 + 5e-3)).astype("<f4").tobytes()
    for precision, same in (("float32", False), ("tf32", True), ("float16", True), ("bfloat16", True)):
        other = Behaviour((64, 64), near, "cuda", precision)
        assert bool(behaviour.behaviour_difference(one, other)) is not same
        assert behaviour.behaviour_difference(one, other) == behaviour.behaviour_difference(other, one).replace(
            f"({precision} on cuda and float32 on cpu)", f"(float32 on cpu and {precision} on cuda)"
        )


def test_weights_of_half_precision_have_its_tolerance() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 4).bfloat16()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(nets.Means()(x.float()).bfloat16())

    assert of(Half()).precision == "bfloat16"
    assert of(nets.Means()).precision == "float32"


def test_float32_on_a_gpu_is_tf32_unless_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from dfx.encoders import network

    encoder = network.network(dfx.load_encoder(nets.Means()), "cpu")
    monkeypatch.setattr(encoder, "device", torch.device("cuda"))
    for capability, on, found in (((8, 0), True, "tf32"), ((8, 0), False, "float32"), ((7, 0), True, "float32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        monkeypatch.setattr(network, "tf32_is_on", lambda on=on: on)
        assert encoder.arithmetic == found
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert encoder.arithmetic == "bfloat16"


# Resuming


def interrupted(encoder: Any, slide: Path, folder: Path, client: distributed.Client, **options: Any) -> Path:
    """Give a store with some of its blocks."""
    extractor_of(*encoder if isinstance(encoder, tuple) else (encoder,)).run(
        [slide], save_dir=folder, client=client, **ALL | options
    )
    path = folder / f"{slide.stem}.zarr"
    gone = sorted(path.glob("features/**/c/*/0"))[1::2]
    assert len(gone) > 2
    for chunk in gone:
        chunk.unlink()
    group = zarr.open_group(path, mode="r+")
    group.attrs["dfx"] = dict(group.attrs["dfx"]) | {"status": "running"}  # type: ignore[arg-type]
    return path


def change(path: Path, changed: Callable[[dict[str, Any]], None]) -> None:
    """Change what a store says of itself."""
    group = zarr.open_group(path, mode="r+")
    said = dict(group.attrs["dfx"])  # type: ignore[arg-type]
    changed(said)
    group.attrs["dfx"] = said


def test_a_store_is_not_resumed_with_a_network_that_only_its_features_give_away(
    made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    path = interrupted(Mode("cls"), made_slide, tmp_path, client)
    half = {chunk: chunk.read_bytes() for chunk in path.glob("features/c/*/0")}
    with pytest.raises(
        RunError, match=r"another run \(Mode: its features of synthetic patches differ by .* %.*overwrite"
    ):
        extractor_of(Mode("mean")).run([made_slide], save_dir=tmp_path, client=client, **ALL)
    assert {chunk: chunk.read_bytes() for chunk in path.glob("features/c/*/0")} == half
    extractor_of(Mode("cls")).run([made_slide], save_dir=tmp_path, client=client, **ALL)
    whole = extractor_of(Mode("cls")).run([made_slide], client=client, **ALL | {"output_type": "dict"})
    features = dfx.open_features(path).features.compute(scheduler="sync")
    assert np.allclose(features, whole[made_slide]["features"], atol=1e-6)  # type: ignore[index]
    with pytest.raises(RunError, match="differ by"):  # nor is a complete one taken for another network's
        extractor_of(Mode("mean")).run([made_slide], save_dir=tmp_path, client=client, **ALL)


def test_a_digest_of_code_does_not_decide_where_features_are_the_same(
    made_slide: Path, tmp_path: Path, client: distributed.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = interrupted(Plain(), made_slide, tmp_path, client)
    monkeypatch.setattr(modules, "module_digest", lambda module: "f" * 64)  # as after an upgrade of Python
    extractor_of(Plain()).run([made_slide], save_dir=tmp_path, client=client, **ALL)
    assert dfx.open_features(path).attrs["status"] == "complete"


def test_stores_of_version_0_1_are_compared_by_the_digest_of_code(
    made_slide: Path, tmp_path: Path, client: distributed.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = interrupted(Plain(), made_slide, tmp_path, client)
    change(path, lambda said: said["encoder"].pop("behaviour"))
    with monkeypatch.context() as patch:
        patch.setattr(modules, "module_digest", lambda module: "f" * 64)
        with pytest.raises(RunError, match=r"encoder weights_digest: stored .*, asked ffffffffffff"):
            extractor_of(Plain()).run([made_slide], save_dir=tmp_path, client=client, **ALL)
    extractor_of(Plain()).run([made_slide], save_dir=tmp_path, client=client, **ALL)
    assert dfx.open_features(path).attrs["status"] == "complete"


def test_an_upgrade_that_changes_features_or_other_weights_of_the_same_name_are_noticed(
    made_slide: Path, tmp_path: Path, client: distributed.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = dfx.load_encoder("test_resnet", weights="random")
    path = interrupted(encoder, made_slide, tmp_path, client)
    change(path, lambda said: said["encoder"]["behaviour"]["libraries"].update(timm="0.0.1"))
    build = named.build

    def other(spec: dfx.EncoderSpec) -> nn.Module:
        module = build(spec)
        with torch.no_grad():
            next(module.parameters()).mul_(1.02)
        return module

    from dfx.encoders import network

    monkeypatch.setattr(named, "build", other)
    modules.MODULES.clear()
    network.NETWORKS.clear()
    with pytest.raises(RunError, match=r"test_resnet: its features .* differ .*; timm 0\.0\.1 then, \d.* now"):
        extractor_of(encoder).run([made_slide], save_dir=tmp_path, client=client, **ALL)
    modules.MODULES.clear()
    network.NETWORKS.clear()


def test_each_of_several_encoders_has_its_own(made_slide: Path, tmp_path: Path, client: distributed.Client) -> None:
    path = interrupted((nets.Means(), Mode("cls")), made_slide, tmp_path, client)
    said = zarr.open_group(path).attrs["dfx"]["encoders"]  # type: ignore[index,call-overload]
    assert said["Means"]["behaviour"]["projection"] != said["Mode"]["behaviour"]["projection"]  # type: ignore[index,call-overload]
    with pytest.raises(RunError, match=r"another run \(Mode: its features[^;]*\):"):
        extractor_of(nets.Means(), Mode("mean")).run([made_slide], save_dir=tmp_path, client=client, **ALL)
    extractor_of(nets.Means(), Mode("cls")).run([made_slide], save_dir=tmp_path, client=client, **ALL)


# Random networks


class Dropping(nn.Module):
    """Leaves dropout on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(F.adaptive_avg_pool2d(x, 4).flatten(1), 0.5, training=True)


def test_a_random_network_is_recorded_and_resumed_only_when_asked(
    made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    with pytest.warns(UserWarning, match="features of Dropping differ from run to run"):
        path = interrupted(Dropping(), made_slide, tmp_path, client)
    assert zarr.open_group(path).attrs["dfx"]["encoder"]["behaviour"]["deterministic"] is False  # type: ignore[index,call-overload]
    with pytest.raises(RunError, match=r"half done, .* Dropping differ from run to run .*allow_nondeterministic=True"):
        extractor_of(Dropping()).run([made_slide], save_dir=tmp_path, client=client, **ALL)
    with pytest.warns(UserWarning, match="differ from run to run"):
        extractor_of(Dropping()).run([made_slide], save_dir=tmp_path, client=client, allow_nondeterministic=True, **ALL)
    with pytest.warns(UserWarning, match="differ from run to run"):  # nothing is left to be mixed
        extractor_of(Dropping()).run([made_slide], save_dir=tmp_path, client=client, **ALL)


@pytest.mark.parametrize("flag", [[], ["--allow-nondeterministic"]])
def test_the_command_line_passes_it_on(flag: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run(self: dfx.DeepFeatureExtractor, slides: Any, **options: Any) -> dict[str, Any]:
        seen.update(options)
        return {}

    monkeypatch.setattr(dfx.DeepFeatureExtractor, "run", run)
    line = (
        "extract a.svs --encoder test_resnet --weights random --resolution 1 --units mpp --patch 64 --out out --quiet"
    )
    assert cli.main([*line.split(), *flag]) == 0
    assert seen["allow_nondeterministic"] is bool(flag)


def test_a_network_that_became_random_is_another_network(
    made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    class Switched(nn.Module):
        def __init__(self, *, on: bool) -> None:
            super().__init__()
            self._on = on

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(F.adaptive_avg_pool2d(x, 4).flatten(1), 0.5, training=self._on)

    interrupted(Switched(on=False), made_slide, tmp_path, client)
    with pytest.raises(RunError, match=r"Switched: its features were the same in two runs .* and are not now"):
        extractor_of(Switched(on=True)).run([made_slide], save_dir=tmp_path, client=client, **ALL)


# Features that are not finite


@pytest.mark.parametrize(
    ("factor", "precision", "remedy"),
    [(1e38, None, r"not finite .*\(in float32 on cpu\): check its weights"), (1e4, "float16", "precision='bfloat16'")],
)
def test_features_that_are_not_finite_refuse_the_encoder(
    factor: float, precision: str | None, remedy: str, made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(48, 4, bias=False)
            nn.init.constant_(self.net.weight, factor)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(F.adaptive_avg_pool2d(x, 4).flatten(1))

    encoder = dfx.load_encoder(Large(), precision=precision)
    with pytest.raises(RunError, match=remedy):
        extractor_of(encoder).run([made_slide], save_dir=tmp_path, client=client, **ALL)
    assert not (tmp_path / "made.zarr").exists()
    with pytest.raises(EncoderError, match=remedy):
        measure(encoder, "cpu", (64, 64))


# Cost


def test_a_process_measures_once_however_many_slides_are_planned(
    made_slide: Path, tmp_path: Path, client: distributed.Client
) -> None:
    calls: list[int] = []

    class Counted(nets.Means):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) == behaviour.PATCHES:
                calls.append(len(x))
            return super().forward(x)

    slides = [write_slide(tmp_path / f"{n}.svs", 256, 256, seed=n) for n in range(4)]
    extractor_of(Counted()).run(slides, save_dir=tmp_path / "out", client=client, **ALL)
    assert calls == [behaviour.PATCHES] * 2


def test_a_slide_without_patches_builds_no_encoder(slide: dfx.Slide, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "measure", None)
    grid = dfx.PatchGrid.over(slide, shape=64, resolution=0.5, units="mpp", mask=np.zeros((5, 5)))
    plan = arrays.make_plan(slide, grid, [dfx.load_encoder(nets.Means())], Options())
    assert arrays.measured(plan, "cpu") is plan


# Workers


def rows_of(store: Any) -> NDArray[Any]:
    return np.asarray(dfx.open_features(store).features.compute(scheduler="sync"))


@pytest.fixture
def address(tmp_path: Path) -> Any:
    with scheduler(tmp_path) as address:
        yield address


def test_a_worker_that_gives_other_features_gets_no_blocks_and_no_slide_fails(
    tmp_path: Path, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "dfx")  # a command that ran in this process before has silenced it
    slides = [write_slide(tmp_path / f"{n}.svs", 512, 512, seed=n) for n in range(3)]
    good = extractor_of(nets.Odd()).run(slides, **ALL | {"output_type": "dict"})
    run = ALL | {"block_size": 8, "save_dir": tmp_path / "out"}
    with (
        dask("worker", address, *WORKER, "--name", "fits"),
        dask("worker", address, *WORKER, "--name", "odd", env={"DFX_TEST_ODD": "1"}),
        distributed.Client(address, set_as_default=False) as client,
    ):
        client.wait_for_workers(2, timeout=60)
        workers = client.scheduler_info(n_workers=-1)["workers"]
        (odd,) = (address for address, said in workers.items() if said["name"] == "odd")
        encoder = dfx.load_encoder(nets.Odd())
        lazy = dfx.features(dfx.open_slide(slides[0]), grid_of(slides[0]), encoder, block_size=8)
        dfx.cluster.share(encoder, client)
        with pytest.raises(WorkerMismatch, match=f"worker {odd} differs .*Odd: its features .* differ by 0.99 %"):
            client.compute(lazy, workers=[odd]).result()
        got = extractor_of(encoder).run(slides, client=client, **run)
        assert not got.failures  # type: ignore[union-attr]
        for slide in slides:
            assert np.allclose(rows_of(got[slide]), good[slide]["features"], atol=1e-6)  # type: ignore[index]
        assert odd not in client.scheduler_info(n_workers=-1)["workers"]
        assert f"worker {odd} differs from the process that planned the run: Odd: " in caplog.text


def grid_of(slide: Path) -> dfx.PatchGrid:
    return dfx.PatchGrid.over(dfx.open_slide(slide), shape=64, resolution=0.5, units="mpp", mask=None)


def test_named_encoders_that_differ_between_workers_are_not_mixed(tmp_path: Path, address: str) -> None:
    slides = [write_slide(tmp_path / f"{n}.svs", 512, 512, seed=n) for n in range(3)]
    encoder = dfx.load_encoder("test_resnet", weights="random")
    expected = extractor_of(encoder).run(slides, **ALL | {"output_type": "dict"})
    (tmp_path / "odd.py").write_text(
        "from torch import nn\nnn.ReLU.forward = lambda self, x, was=nn.ReLU.forward: 1.1 * was(self, x)\n"
    )
    with (
        dask("worker", address, *WORKER),
        dask("worker", address, *WORKER, "--preload", tmp_path / "odd.py"),
        distributed.Client(address, set_as_default=False) as client,
    ):
        client.wait_for_workers(2, timeout=60)
        got = extractor_of(encoder).run(slides, client=client, **ALL | {"block_size": 8, "save_dir": tmp_path / "out"})
        same = [
            np.isclose(rows_of(got[slide]), expected[slide]["features"], atol=1e-4).all(1)  # type: ignore[index]
            for slide in slides
        ]
        assert np.concatenate(same).all() or not np.concatenate(same).any()  # the first that planned decides
        until(lambda: len(client.scheduler_info(n_workers=-1)["workers"]) == 1)


def test_a_run_says_so_when_no_worker_fits_and_loose_patches_are_not_encoded(
    made_slide: Path, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfx.run.health.PATIENCE", 2)
    with (
        dask("worker", address, *WORKER, env={"DFX_TEST_ODD": "1"}),
        distributed.Client(address, set_as_default=False) as client,
    ):
        client.wait_for_workers(1, timeout=60)
        (odd,) = client.scheduler_info(n_workers=-1)["workers"]
        with pytest.raises(WorkerMismatch, match=f"worker {odd} differs .*: Odd: its features"):
            extractor_of(nets.Odd()).run(np.zeros((4, 32, 32, 3), np.uint8), client=client)
        with pytest.raises(
            ClusterLost, match=rf"no worker of the cluster fits, 1 gave other .*{odd}: Odd: its features"
        ):
            extractor_of(nets.Odd()).run([made_slide], save_dir=tmp_path / "out", client=client, **ALL)
        assert not (tmp_path / "out" / "made.zarr").exists()
