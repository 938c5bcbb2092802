"""Given modules: a copy runs as the module does, in any process, and the module itself is left alone."""

from __future__ import annotations

import importlib
import io
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import distributed
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import dfx
from dfx.encoders import copying, encode, modules, weights
from dfx.encoders.spec import SHARED
from dfx.errors import EncoderError

SEEN: dict[str, torch.Tensor] = {}


@pytest.fixture
def patches() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3)).astype(np.uint8)


def wanted(module: nn.Module, patches: NDArray[np.uint8]) -> NDArray[Any]:
    """What a module gives by torch alone, in batches of two."""
    x = torch.from_numpy(patches).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        return torch.cat([module.eval()(x[i : i + 2]) for i in range(0, len(x), 2)]).float().numpy()


# Hooks


class Hooked(nn.Module):
    """Takes its features from the middle of a network, by a hook."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        middle, end = nn.Conv2d(3, 8, 16, 16), nn.Conv2d(8, 2, 1)
        self.net = nn.Sequential(middle, nn.ReLU(), end, nn.AdaptiveAvgPool2d(1))
        self.feat: Any = None
        self.take = self.hook()

    def hook(self) -> Callable[[], torch.Tensor]:
        self.net[1].register_forward_hook(lambda m, i, o: setattr(self, "feat", o))
        return lambda: self.feat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.net(x)
        return self.take().mean((2, 3))


class ByMethod(Hooked):
    def keep(self, module: nn.Module, inputs: Any, out: torch.Tensor) -> None:
        self.feat = out

    def hook(self) -> Any:
        self.handle = self.net[1].register_forward_hook(self.keep)
        return lambda: self.feat


class ByDefault(Hooked):
    def hook(self) -> Any:
        def keep(m: nn.Module, i: Any, o: torch.Tensor, owner: Any = self) -> None:
            owner.feat = o

        self.net[1].register_forward_hook(keep)
        return lambda: self.feat


class ByDict(Hooked):
    def hook(self) -> Any:
        self.feats: dict[str, torch.Tensor] = {}
        feats = self.feats
        self.net[1].register_forward_hook(lambda m, i, o: feats.__setitem__("x", o))
        return lambda: self.feats["x"]


class ByList(Hooked):
    def hook(self) -> Any:
        got: list[torch.Tensor] = []
        append = got.append
        self.net[1].register_forward_hook(lambda m, i, o: append(o))
        return got.pop


class ByNonlocal(Hooked):
    def hook(self) -> Any:
        got: Any = None

        def keep(m: nn.Module, i: Any, o: torch.Tensor) -> None:
            nonlocal got
            got = o

        self.net[1].register_forward_hook(keep)
        return lambda: got


class ByGlobal(Hooked):
    def hook(self) -> Any:
        self.net[1].register_forward_hook(lambda m, i, o: SEEN.__setitem__("x", o))
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.net(x)
        return SEEN["x"].mean((2, 3))


class ByWeakReference(Hooked):
    def hook(self) -> Any:
        owner = weakref.ref(self)
        self.net[1].register_forward_hook(lambda m, i, o: setattr(owner(), "feat", o))
        return lambda: self.feat


class ByProxy(Hooked):
    def hook(self) -> Any:
        owner = weakref.proxy(self)
        self.net[1].register_forward_hook(lambda m, i, o: setattr(owner, "feat", o))
        return lambda: self.feat


class ByWeakMethod(Hooked):
    def keep(self, module: nn.Module, inputs: Any, out: torch.Tensor) -> None:
        self.feat = out

    def hook(self) -> Any:
        keep = weakref.WeakMethod(self.keep)
        self.net[1].register_forward_hook(lambda *args: keep()(*args))  # type: ignore[misc]
        return lambda: self.feat


class ByForward(Hooked):
    def hook(self) -> Any:
        before = self.net[1].forward

        def keep(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
            self.feat = before(x)
            return self.feat

        self.net[1].forward = MethodType(keep, self.net[1])
        return lambda: self.feat


class Recorder:
    def __call__(self, module: nn.Module, inputs: Any, out: torch.Tensor) -> None:
        self.out = out


class ByWeaklyHeldObject(Hooked):
    def hook(self) -> Any:
        self.recorder = Recorder()
        recorder = weakref.ref(self.recorder)
        self.net[1].register_forward_hook(lambda *args: recorder()(*args))  # type: ignore[misc]
        return lambda: self.recorder.out


class ByWeakDict(Hooked):
    def hook(self) -> Any:
        self.recorder = Recorder()
        self.known = weakref.WeakValueDictionary(recorder=self.recorder)
        self.owners = weakref.WeakKeyDictionary({self.recorder: 1})
        self.net[1].register_forward_hook(lambda *args: self.known["recorder"](*args))
        return lambda: next(iter(self.owners)).out


class ByObject(Hooked):
    def hook(self) -> Any:
        recorder = Recorder()
        self.net[1].register_forward_hook(recorder.__call__)
        return lambda: recorder.out


def by_outer_variable() -> nn.Module:
    feats: dict[str, torch.Tensor] = {}

    class ByOuter(Hooked):
        def hook(self) -> Any:
            self.net[1].register_forward_hook(lambda m, i, o: feats.__setitem__("x", o))
            return None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.net(x)
            return feats["x"].mean((2, 3))

    return ByOuter()


HOOKED: list[Callable[[], nn.Module]] = [
    *(Hooked, ByMethod, ByDefault, ByDict, ByList, ByNonlocal, ByGlobal, ByForward, ByObject),
    *(ByWeakReference, ByProxy, ByWeakMethod, ByWeaklyHeldObject, ByWeakDict),
    by_outer_variable,
]


@pytest.mark.parametrize("tried", [False, True])
@pytest.mark.parametrize("make", HOOKED, ids=lambda make: make.__name__)
def test_features_that_a_hook_takes_are_those_of_the_batch(
    make: Callable[[], nn.Module], tried: bool, patches: NDArray[np.uint8]
) -> None:
    """A copy whose hooks write into the original would give the features of the batch that its user tried."""
    want, module = wanted(make(), patches), make()
    if tried:
        module(torch.rand(2, 3, 64, 64))
    kept = getattr(module, "feat", None)
    encoder = dfx.load_encoder(module)
    sent = copying.loads(copying.dumps(module))  # loaded before the copy runs
    assert np.allclose(encode(encoder, patches, batch_size=2), want, atol=1e-5)
    assert np.allclose(wanted(sent, patches), want, atol=1e-5)
    assert np.allclose(wanted(copying.loads(copying.dumps(encoder.module)), patches), want, atol=1e-5)
    assert getattr(module, "feat", None) is kept


def test_hooks_work_in_worker_processes(processes: distributed.Client, patches: NDArray[np.uint8]) -> None:
    with processes.as_current():
        for make in (Hooked, ByMethod, ByGlobal, by_outer_variable):
            module = make()
            module(torch.rand(2, 3, 64, 64))
            encoder = dfx.load_encoder(module)
            dfx.cluster.share(encoder)
            got = processes.submit(encode, encoder, patches, batch_size=2, pure=False).result()
            assert np.allclose(got, wanted(make(), patches), atol=1e-5)


def test_two_specs_of_one_module_do_not_mix_their_batches(patches: NDArray[np.uint8]) -> None:
    """They share the module, and so the place where its hook puts what it takes."""
    module = Hooked()
    specs = [dfx.load_encoder(module, mean=(value,) * 3) for value in (0.0, 0.5)]
    assert specs[0].module is specs[1].module
    check_together(specs, patches)


def test_two_modules_whose_hooks_share_a_global_variable_do_not_mix_their_batches(patches: NDArray[np.uint8]) -> None:
    modules = [ByGlobal(), ByGlobal()]
    modules[1].load_state_dict({key: 2 * value for key, value in modules[0].state_dict().items()})
    check_together([dfx.load_encoder(module) for module in modules], patches)


def check_together(specs: list[dfx.EncoderSpec], patches: NDArray[np.uint8]) -> None:
    """Encoders that run in two threads must give the features that each gives alone."""
    want = [encode(spec, patches, batch_size=1) for spec in specs]
    assert not np.allclose(*want)
    got: dict[int, list[NDArray[Any]]] = {0: [], 1: []}

    def run(n: int) -> None:
        got[n] = [encode(specs[n], patches, batch_size=1, threads=1) for _ in range(60)]

    threads = [threading.Thread(target=run, args=(n,)) for n in got]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found, want[n]) for n in got for found in got[n])


# Modules as people have them


class Caching(nn.Module):
    """Keeps its last output, which autograd made."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 16, stride=16)
        self.last: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = self.conv(x)
        return self.last.mean((2, 3))


def tried(module: nn.Module) -> nn.Module:
    module(torch.rand(2, 3, 64, 64, requires_grad=True)).sum().backward()
    return module


def stack(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 8, 16, stride=16)


def traced_by_fx() -> nn.Module:
    module = torch.fx.symbolic_trace(stack(conv()))
    module.register_forward_hook(lambda m, i, o: 2 * o)
    return module


def compiled_forward() -> nn.Module:
    module = Inner(stack(conv()))
    module.part.forward = torch.compile(module.part.forward, backend="eager")  # type: ignore[method-assign]
    return module


def in_place() -> nn.Module:
    module = stack(conv())
    module.compile(backend="eager")
    return module


class Inner(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x) * 2


def quantised() -> nn.Module:
    plain = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 8)).eval()
    return torch.ao.quantization.quantize_dynamic(plain, {nn.Linear})


KINDS: dict[str, Callable[[], nn.Module]] = {
    "weight norm that was used": lambda: tried(stack(torch.nn.utils.weight_norm(conv()))),
    "parametrised": lambda: stack(torch.nn.utils.parametrizations.weight_norm(conv())),
    "spectral norm that was used": lambda: tried(stack(torch.nn.utils.spectral_norm(conv()))),
    "kept activation": lambda: tried(Caching()),
    "scripted": lambda: torch.jit.script(stack(conv()).eval()),
    "scripted part": lambda: Inner(torch.jit.script(stack(conv()).eval())),
    "traced": lambda: torch.jit.trace(stack(conv()).eval(), torch.zeros(1, 3, 64, 64)),
    "compiled": lambda: torch.compile(stack(conv()), backend="eager"),
    "compiled part": lambda: Inner(torch.compile(stack(conv()), backend="eager")),
    "compiled forward": compiled_forward,
    "compiled in place": in_place,
    "data parallel": lambda: nn.DataParallel(stack(conv())),
    "traced by fx": traced_by_fx,
    "quantised": quantised,
    "in training": lambda: stack(conv(), nn.BatchNorm2d(8), nn.Dropout(0.5)).train(),
    "recurrent": lambda: nn.Sequential(nn.Flatten(2), nn.Flatten(0, 0), Last(nn.LSTM(4096, 8, batch_first=True))),
}


class Last(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)[0][:, -1]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_any_module_that_can_be_copied_runs_as_it_does_alone(kind: str, patches: NDArray[np.uint8]) -> None:
    torch.manual_seed(1)
    module = KINDS[kind]()
    training = module.training
    encoder = dfx.load_encoder(module)
    assert module.training == training
    assert encoder.token == dfx.load_encoder(module).token
    got = encode(encoder, patches, batch_size=2)
    sent = copying.loads(modules.pickle_module(encoder)).eval()
    assert np.allclose(got, wanted(module, patches), atol=1e-5)
    assert np.allclose(wanted(sent, patches), got, atol=1e-5)


def test_a_module_is_left_as_it_is() -> None:
    module = tried(nn.Sequential(conv(), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    encoder = dfx.load_encoder(module)
    encode(encoder, np.full((2, 64, 64, 3), 200, np.uint8))
    assert all(part.training for part in module.modules())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert all(parameter.grad is grads[name] is not None for name, parameter in module.named_parameters())
    assert all(parameter.grad is None for parameter in encoder.module.parameters())  # which would double its size
    places = {t.data_ptr() for t in module.state_dict().values()} & {
        t.data_ptr() for t in encoder.module.state_dict().values()
    }
    assert not places


def test_tensors_that_share_memory_do_so_in_the_copy() -> None:
    module = nn.Linear(4, 4)
    module.register_buffer("rows", module.weight.detach()[1:])
    for copy in (copying.copied(module), copying.loads(copying.dumps(module))):
        copy.weight.data.fill_(7)
        assert (copy.rows == 7).all()
    assert not (module.rows == 7).any()


def test_a_class_in_a_function_keeps_what_its_code_sees(patches: NDArray[np.uint8]) -> None:
    """In this process, code and what it closes over are those of the caller, who may count calls by them."""
    calls: list[int] = []

    class Counted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(len(x))
            return x.mean((2, 3))

    encode(dfx.load_encoder(Counted()), patches, batch_size=2)
    assert calls == [2, 2, 1]


class Holding(nn.Module):
    def __init__(self, thing: Any) -> None:
        super().__init__()
        self.net = nn.Linear(3, 3)
        self.net.thing = thing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.mean((2, 3)))


def test_what_can_not_be_copied_is_named_with_its_remedy(tmp_path: Path) -> None:
    file = io.FileIO(tmp_path / "log", "w")
    with file:
        for thing in (threading.Lock(), file, iter(n for n in range(3))):
            with pytest.raises(EncoderError, match=r"Holding can't be copied: its net\.thing .*in forward"):
                dfx.load_encoder(Holding(thing))
    lazy = nn.Sequential(nn.LazyConv2d(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(EncoderError, match=r"'0\.weight' has no values yet; call it on a batch"):
        dfx.load_encoder(lazy)
    with pytest.raises(EncoderError, match=r"'weight' is on the meta device; load its weights"):
        dfx.load_encoder(nn.Linear(3, 3, device="meta"))


class Losing(nn.Module):
    """Leaves its scale out of what is pickled."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.cache: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "scale"} | {"cache": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache = x
        return x.mean((2, 3)) * self.scale


def test_a_class_that_pickles_itself_loses_no_value_in_silence(patches: NDArray[np.uint8]) -> None:
    assert encode(dfx.load_encoder(nn.Sequential(tried(Losing()))), patches).shape == (5, 3)
    with pytest.raises(EncoderError, match=r"way of being pickled .*changes 'scale'\. Let that keep"):
        dfx.load_encoder(nn.Sequential(Losing(3.0)))


LAYOUTS = {
    "COO": torch.Tensor.to_sparse,
    "COO, not coalesced": lambda x: torch.sparse_coo_tensor([[0, 0], [0, 0]], x[:2, 0], (3, 3), check_invariants=True),
    "CSR": torch.Tensor.to_sparse_csr,
    "CSC": torch.Tensor.to_sparse_csc,
    "BSR": lambda x: x.to_sparse_bsr((1, 1)),
    "BSC": lambda x: x.to_sparse_bsc((1, 1)),
    "conjugate": lambda x: x.to(torch.complex64).conj(),
}


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta:UserWarning")
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_tensors_of_all_layouts_are_copied(
    make: Callable[[Any], torch.Tensor], patches: NDArray[np.uint8], tmp_path: Path
) -> None:
    torch.save({"weight": torch.ones(1)}, tmp_path / "dense.pt")
    held = make(torch.eye(3))
    module = nn.Linear(3, 3)
    module.register_buffer("held", held)
    for pickled in (copying.copied(module), copying.loads(copying.dumps(module))):
        copy: Any = pickled.held
        assert copy.layout == held.layout
        assert copy.is_conj() == held.is_conj()
        assert held.layout != torch.sparse_coo or copy.is_coalesced() == held.is_coalesced()
        assert torch.equal(copy.to_dense(), held.to_dense())
    # torch checks tensors of another module's copy with the next file of weights, and warns of them.
    assert weights.read_state_dict(tmp_path / "dense.pt").keys() == {"weight"}
    specs = [dfx.load_encoder(Holding(make(torch.eye(3) * n))) for n in (1, 2)]
    module = nn.Linear(3, 3)
    digests = set()
    for n in (1, 2):
        module.register_buffer("held", make(torch.eye(3) * n))
        digests.add(dfx.load_encoder(module).weights_digest)
    assert len(digests) == 2
    assert encode(specs[0], patches).shape == (5, 3)


def test_what_can_not_be_sent_runs_here_and_is_named_when_sent(
    patches: NDArray[np.uint8], processes: distributed.Client
) -> None:
    lock = threading.Lock()

    class Locked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with lock:
                return x.mean((2, 3))

    encoder = dfx.load_encoder(Locked())
    assert encode(encoder, patches).shape == (5, 3)
    with pytest.raises(EncoderError, match=r"Locked can't be sent to workers.*lock"):
        dfx.cluster.share(encoder, processes)


# Keys


def define(factor: int) -> type[nn.Module]:
    """A class as a script has it that is edited and run again."""
    space: dict[str, Any] = {"nn": nn, "__name__": "__main__"}
    lines = "class Net(nn.Module):\n def forward(self, x):\n  return pool(x)\n"
    exec(f"def pool(x):\n return x.mean((2, 3)) * {factor}\n{lines}", space)
    found: type[nn.Module] = space["Net"]
    return found


def test_a_module_is_known_by_its_content(patches: NDArray[np.uint8]) -> None:
    module = Holding("a")
    first = dfx.load_encoder(module)
    again = dfx.load_encoder(module, mean=(0.5, 0.5, 0.5))
    assert again.module is first.module
    assert again.key == first.key
    module.net.thing = "b"
    second = dfx.load_encoder(module)
    assert second.key != first.key
    with torch.no_grad():
        module.net.weight.add_(1)
    third = dfx.load_encoder(module)
    module.net._private = 1
    fourth = dfx.load_encoder(module)
    module.net.register_forward_hook(lambda m, i, o: o * 2)
    fifth = dfx.load_encoder(module)
    assert len({spec.key for spec in (first, second, third, fourth, fifth)}) == 5
    assert np.allclose(encode(fifth, patches), 2 * encode(third, patches), atol=1e-5)
    assert not np.allclose(encode(third, patches), encode(first, patches), atol=1e-2)
    assert define(1).__name__ == define(2).__name__
    assert dfx.load_encoder(define(1)()).key == dfx.load_encoder(define(1)()).key != dfx.load_encoder(define(2)()).key


def test_a_class_that_is_imported_anew_is_another_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patches: NDArray[np.uint8]
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    text = "from torch import nn\nclass Net(nn.Module):\n def forward(self, x):\n  return x.mean((2, 3)) * {}\n"
    got, encoders = [], []
    for factor in (1, 3):
        (tmp_path / "edited_module.py").write_text(text.format(factor))
        importlib.invalidate_caches()
        net = (
            importlib.import_module("edited_module") if factor == 1 else importlib.reload(sys.modules["edited_module"])
        )
        encoders.append(dfx.load_encoder(net.Net()))
        got.append(encode(encoders[-1], patches))
    monkeypatch.delitem(sys.modules, "edited_module")
    assert np.allclose(got[1], 3 * got[0])


def test_an_edited_script_runs_its_new_code_on_workers_that_have_the_old(
    processes: distributed.Client, patches: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers have equal process ids, and equal scripts have classes of equal names."""
    monkeypatch.setattr("os.getpid", lambda: 7)
    for factor in (1, 5):
        encoder = dfx.load_encoder(define(factor)())
        dfx.cluster.share(encoder, processes)
        for worker in processes.scheduler_info()["workers"]:
            got = processes.submit(encode, encoder, patches, workers=[worker], pure=False).result()
            assert np.allclose(got, patches.mean((1, 2)) / 255 * factor, atol=1e-4)


def test_a_class_that_changed_between_two_loads_runs_as_it_was_on_workers(
    processes: distributed.Client, patches: NDArray[np.uint8]
) -> None:
    net = define(1)
    module = net()
    first = dfx.load_encoder(module)
    dfx.cluster.share(first, processes)
    net.forward = lambda self, x: x.amax((2, 3))  # type: ignore[method-assign]
    second = dfx.load_encoder(module)
    dfx.cluster.share(second, processes)
    (worker, *_) = processes.scheduler_info()["workers"]
    for encoder, want in ((second, patches.max((1, 2)) / 255), (first, patches.mean((1, 2)) / 255)):
        got = processes.submit(encode, encoder, patches, workers=[worker], pure=False).result()
        assert np.allclose(got, want, atol=1e-4)


def test_a_module_that_is_given_again_is_sent_once(processes: distributed.Client) -> None:
    def count() -> int:
        return int(processes.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.worker_plugins)))

    module = Holding("sent once")
    before, here = count(), len(SHARED._things)
    for pooling in (None, "mean"):
        dfx.cluster.share(dfx.load_encoder(module, pooling=pooling), processes)
    assert count() == before + 1
    assert len(SHARED._things) == here  # the bytes are not kept here


# Data types


@pytest.mark.parametrize(
    ("dtype", "stored", "near"),
    [(torch.float16, "float16", 1e-2), (torch.bfloat16, "float32", 5e-2), (torch.float64, "float64", 1e-4)],
)
def test_a_module_of_another_precision_runs_in_it(
    dtype: torch.dtype, stored: str, near: float, patches: NDArray[np.uint8]
) -> None:
    torch.manual_seed(2)
    module = stack(conv(), nn.BatchNorm2d(8))
    want = wanted(module, patches)
    encoder = dfx.load_encoder(module.to(dtype))
    got = encode(encoder, patches, batch_size=2)
    assert got.dtype == stored
    assert np.allclose(got, want, atol=near)
    if dtype != torch.float64:
        named = str(dtype).removeprefix("torch.")
        assert np.allclose(encode(dfx.load_encoder(module, precision=named), patches), want, atol=near)


def test_a_module_of_several_precisions_that_fails_says_what_to_do(patches: NDArray[np.uint8]) -> None:
    module = nn.Sequential(conv().half(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(EncoderError, match=r"parameters of float16: give module\.float\(\), or .*precision="):
        encode(dfx.load_encoder(module), patches)
    assert encode(dfx.load_encoder(module, precision="bfloat16"), patches).shape == (5, 4)
    assert encode(dfx.load_encoder(module.float()), patches).shape == (5, 4)
    module = nn.Sequential(conv().double(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(EncoderError, match=r"parameters of float64: give module\.float\(\)\.$"):
        encode(dfx.load_encoder(module, precision="bfloat16"), patches)


def test_a_module_whose_values_are_buffers_runs_in_their_precision(patches: NDArray[np.uint8]) -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.rand(8, 3, 16, 16).bfloat16())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(x, self.weight, stride=16).mean((2, 3))

    assert encode(dfx.load_encoder(Buffered()), patches).shape == (5, 8)
