"""What an encoder is, as data: small, picklable, tokenizable. No torch here."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from dfx.errors import CallError

Precision: TypeAlias = Literal["float32", "float16", "bfloat16"]
Pooling: TypeAlias = Literal["cls", "mean", "cls+mean"]
Library: TypeAlias = Literal["timm", "transformers", "open_clip", "conch", "musk", "keep"]
PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "bfloat16")
POOLINGS: tuple[Pooling, ...] = ("cls", "mean", "cls+mean")
Triple: TypeAlias = tuple[float, float, float]
FIXED: tuple[Library, ...] = ("open_clip", "conch", "musk", "keep")
"""Networks that end in a projection of their own."""


@dataclass(frozen=True)
class EncoderSpec:
    """All that a worker needs to build an encoder, and all that its features depend on."""

    name: str
    """Its name, or the class of a module."""
    kind: Library | Literal["module", "tiatoolbox"]
    """What builds a named one; or a given torch module, or a module with TIAToolbox's `infer_batch`."""
    weights: str
    """"random", "given" with a module, a local file or folder, or `hub:<repository>`, with `@<revision>`."""
    weights_digest: str
    """SHA-256 of the weights' file or folder, or of a given module's parameters."""
    mean: Triple | None = None
    """Subtracted from RGB in [0, 1]; None: nothing is."""
    std: Triple | None = None
    """Divides what is left; None: nothing does."""
    input_size: tuple[int, int] | None = None
    """(rows, columns) to which patches of other sizes are resized; None: patches as they are."""
    resize: tuple[int, int] | None = None
    """(rows, columns) of patches before `input_size` is cut out of their middle; None: nothing is cut off."""
    interpolation: str = "bicubic"
    """How they are resized (antialiased)."""
    pooling: Pooling | None = None
    """How tokens or maps become a vector; None: the network gives (N, D) itself."""
    precision: Precision = "float32"
    """In which the network computes on a GPU, weights and sums in float32 all the same (autocast)."""
    cpu_precision: Precision = "float32"
    """In which it computes on a CPU, where less than float32 is mostly slower."""
    compiled: bool = False
    """Whether torch compiles it on the workers."""
    trusted: bool = False
    """Whether code of its repository may run."""
    token: str = ""
    """Identifies the content of a given module: a module that was changed between two loads has two tokens."""
    module: Any = field(default=None, repr=False, compare=False)
    """A given module, in the process that it was given to; kept alive by what uses it, never pickled."""

    @property
    def key(self) -> str:
        """Under which a process keeps the network: all that its layers depend on."""
        if not self.named:
            return f"{self.name}-{self.token}"
        size = "x".join(map(str, self.input_size or ()))
        return f"{self.name}-{self.weights_digest[:16]}-{size}-{self.pooling}"

    @property
    def named(self) -> bool:
        """Whether any process can build it, from its name and weights."""
        return self.kind not in ("module", "tiatoolbox")

    def values(self) -> tuple[Any, ...]:
        """Its fields but the module, in order."""
        return tuple(getattr(self, f.name) for f in fields(self) if f.name != "module")

    def __reduce__(self) -> tuple[Any, ...]:
        return EncoderSpec, self.values()

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return "dfx.EncoderSpec", self.values()

    def describe(self) -> dict[str, Any]:
        """What of it goes into a store, as JSON values: equal exactly when features should be."""
        fields = (
            "name",
            "kind",
            "weights_digest",
            "mean",
            "std",
            "input_size",
            "resize",
            "interpolation",
            "pooling",
            "precision",
            "cpu_precision",
            "compiled",
        )
        found = {name: getattr(self, name) for name in fields}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    def with_options(
        self,
        *,
        mean: Triple | None,
        std: Triple | None,
        input_size: tuple[int, int] | None,
        pooling: str | None,
        precision: str | None,
        compile: bool,
    ) -> EncoderSpec:
        """Give the spec with what the user asked for put over it; raises `CallError`."""
        if precision is not None and precision not in PRECISIONS:
            raise CallError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}.")
        if pooling is not None and pooling not in POOLINGS:
            raise CallError(f"pooling must be one of {', '.join(POOLINGS)} or None, not {pooling!r}.")
        if self.kind in FIXED and pooling is not None:
            raise CallError(f"{self.name} pools as it was trained to: leave out pooling={pooling!r}.")
        given_any = any(v is not None for v in (mean, std, input_size, pooling, precision)) or compile
        if self.kind == "tiatoolbox" and given_any:
            raise CallError(
                f"{self.name} has infer_batch and prepares patches by itself: give no mean, std, input_size, "
                "pooling, precision or compile, or wrap its layers in a module without infer_batch."
            )
        given = {
            "mean": triple(mean, "mean"),
            "std": triple(std, "std"),
            "input_size": input_size,
            "pooling": pooling,
            "precision": precision,
            "cpu_precision": precision,
            "compiled": True if compile else None,
        }
        spec = self if input_size is None else replace(self, resize=None)
        return replace(spec, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def triple(value: Any, name: str) -> Triple | None:
    """Give three numbers, one a colour, as floats."""
    if value is None:
        return None
    try:
        r, g, b = (float(v) for v in value)
    except (TypeError, ValueError):
        raise CallError(f"{name} must be three numbers (R, G, B) for pixels in [0, 1], not {value!r}.") from None
    if not all(map(math.isfinite, (r, g, b))) or (name == "std" and min(r, g, b) <= 0):
        raise CallError(f"{name} must be finite{' and above 0' if name == 'std' else ''}, not {value!r}.")
    return r, g, b


T = TypeVar("T")


class Kept(Generic[T]):
    """The few expensive things that a process keeps under a key: bounded, locked, clearable.

    Two task threads that meet a cold cache build once, not twice (twice the device's memory).
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.RLock()
        self._things: dict[Any, T] = {}

    def get(self, key: Any, build: Callable[[], T]) -> T:
        """Give what is under `key`, building it if need be."""
        with self._lock:
            if key not in self._things:
                self.put(key, build())
            return self._things[key]

    def put(self, key: Any, thing: T) -> None:
        """Keep a thing; the oldest beyond the bound goes."""
        with self._lock:
            self._things.pop(key, None)
            self._things[key] = thing
            while len(self._things) > self._most:
                self._things.pop(next(iter(self._things)))

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._things.clear()


SHARED: Kept[bytes] = Kept(64)
"""Pickled modules that a client handed to this process, by their spec's key."""
