"""Fits weights to their network: finds the prefix of the network's names in a file, and checks that all of them fit."""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfx.encoders.weights import INDEX, read_state_dict, some
from dfx.errors import EncoderError

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Components of names that DataParallel, torch.compile, FSDP and activation checkpointing insert, at any place."""
PREFERRED = ("teacher", "ema", "target")
"""Words of preferred prefixes: they mark averaged weights, which the authors of the training evaluate."""
UNDECIDED = "online"
"""If a prefix has this word, no prefix is preferred: BYOL's authors evaluate the online network, not its target."""

log = logging.getLogger(__name__)

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Candidate:
    """The tensors under one prefix of a file, by the network's names."""

    prefix: str
    """With its last dot; "": all tensors of the file."""
    state: State
    matched: int
    """Number of names of the network that have a tensor of the right shape."""
    missing: list[str]
    """Names of the network without a tensor."""
    misshapen: list[str]
    """Names whose tensor has another shape, with both shapes."""
    unexpected: list[str]
    """Tensors without a place in the network."""

    @property
    def unfit(self) -> tuple[int, int, int]:
        """Sort key of candidates, the best first."""
        left_over = len(self.unexpected) if self.matched else 0
        return len(self.missing) + len(self.misshapen), left_over, len(self.prefix)


def load_into(module: nn.Module, path: Path, name: str, *, others: tuple[str, ...] = ()) -> None:
    """Load a file into a network: every parameter must get a value, and only tensors of a classifier may be left over.

    A prefix of the file's names is removed if the remaining names are the network's. Tensors without it are ignored.

    Parameters
    ----------
    module
        The network. After an error its values are undefined.
    path
        A file of weights, or the index of their shards.
    name
        The network's name in errors.
    others
        Beginnings of more names that may be left over.

    Raises
    ------
    EncoderError
        For a file that does not fit under any prefix, or fits under several prefixes with different values.
    """
    spare = (*(f"{head}." for head in classifiers(module)), *others)
    found = sorted(candidates(module, read_state_dict(path), spare), key=lambda c: c.unfit)
    best = [c for c in found if c.unfit[0] == found[0].unfit[0]]
    load(module, best[0], path, name, spare)
    taken = chosen(best, path, name)
    if taken is not best[0]:
        load(module, taken, path, name, spare)
    if taken.prefix:
        log.info("weights %s: the tensors under '%s' are taken", path, taken.prefix)


def candidates(module: nn.Module, state: State, spare: tuple[str, ...]) -> list[Candidate]:
    """Returns a candidate for each prefix that has at least half of the network's (or of a smaller file's) numbers."""
    own: State = module.state_dict()
    convert = getattr(sys.modules.get(type(module).__module__), "checkpoint_filter_fn", None)
    sizes: Counter[str] = Counter()
    for name, value in state.items():
        for at in (0, *(dot.end() for dot in re.finditer(r"\.", name))):
            sizes[name[:at]] += value.numel()
    least = min(sum(value.numel() for value in tensors(own.values())), sizes[""]) / 2
    found = []
    for prefix in (prefix for prefix, size in sizes.items() if size >= least):
        inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        # If two names became equal without such components, these are part of the names.
        distinct = all(len({without_wrappers(key) for key in names}) == len(names) for names in (inner, own))
        shorten: Callable[[str], str] = without_wrappers if distinct else str
        inner = {shorten(key): value for key, value in inner.items()}
        if convert is not None:  # timm's own remapping of published checkpoints
            inner = converted(convert, inner, module)
        places = {shorten(name): name for name in own}
        found.append(candidate(prefix, {places.get(shorten(key), key): v for key, v in inner.items()}, own, spare))
    return found


def converted(convert: Callable[[State, nn.Module], State], state: State, module: nn.Module) -> State:
    """Returns a state dict with its library's current names; unchanged if the library can't convert it."""
    try:
        return dict(convert(dict(state), module))
    except (RuntimeError, KeyError, ValueError, AttributeError, IndexError, TypeError):
        return state  # of another architecture or prefix: its names are compared unchanged


def candidate(prefix: str, state: State, own: State, spare: tuple[str, ...]) -> Candidate:
    """Returns a state dict as a candidate, with the names that do not fit."""
    # Files older than torch 0.4.1 lack the counters of batch normalisation, and torch sets them.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    misshapen = [
        f"{key}: {tuple(state[key].shape)}, not {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and isinstance(value, torch.Tensor) and state[key].shape != value.shape
    ]
    matched = sum(key in state for key in own) - len(misshapen)
    unexpected = [key for key in state if key not in own and not key.startswith(spare)]
    return Candidate(prefix, state, matched, missing, misshapen, unexpected)


def load(module: nn.Module, taken: Candidate, path: Path, name: str, spare: tuple[str, ...]) -> None:
    """Load a candidate. The network's own loading decides whether it fits, since its hooks may rename or reshape."""
    count, missing, unexpected, detail = len(module.state_dict()), taken.missing, taken.unexpected, ""
    try:
        missing, unexpected = module.load_state_dict(taken.state, strict=False)
    except (RuntimeError, KeyError, ValueError, AttributeError, IndexError, TypeError) as e:
        detail = " ".join(str(e).split()) or type(e).__name__
    unexpected = [key for key in unexpected if not key.startswith(spare)]
    if not (detail or missing or unexpected):
        return
    faults = [f"names missing: {len(missing)} of {count}{some(missing)}"] if missing else []
    if detail and taken.misshapen:
        faults.append(f"tensors of another shape: {len(taken.misshapen)}{some(taken.misshapen)}")
    if unexpected:
        faults.append(f"tensors without a place: {len(unexpected)}{some(unexpected)}")
    shard = re.fullmatch(r"(.+)-\d+-of-\d+(\.\w+)", path.name)
    remedy = f"the index of all shards, {shard[1]}{shard[2]}{INDEX}" if shard else "the file of this architecture"
    raise EncoderError(
        f"weights {path} are not those of '{name}': {f'under the prefix {taken.prefix!r}, ' if taken.prefix else ''}"
        f"{'; '.join(faults) or detail}. Give {remedy}."
    )


def chosen(best: list[Candidate], path: Path, name: str) -> Candidate:
    """Returns the preferred candidate of several that fit equally well; raises `EncoderError` if no rule decides."""
    several = unlike(best)
    if len(several) == 1:
        return several[0]
    words = {c.prefix: set(re.split(r"[._]", c.prefix)) for c in best}
    preferred = best
    for word in () if any(UNDECIDED in found for found in words.values()) else PREFERRED:
        preferred = [c for c in preferred if word in words[c.prefix]] or preferred
    taken, *rest = unlike(preferred)
    names = [repr(c.prefix) if c.prefix else "no prefix" for c in several]
    if rest:
        raise EncoderError(
            f"weights {path} fit '{name}' under {len(several)} prefixes with different values{some(names)}: "
            "save the state dict that you want in a file of its own, and give that file."
        )
    log.warning("weights %s fit '%s' under several prefixes%s: '%s' is taken", path, name, some(names), taken.prefix)
    return taken


def unlike(found: Iterable[Candidate]) -> list[Candidate]:
    """Returns candidates, except those with the same values as an earlier candidate."""
    kept: list[Candidate] = []
    for one in found:
        if not any(equal(one.state, other.state) for other in kept):
            kept.append(one)
    return kept


def equal(one: State, other: State) -> bool:
    """Whether all names that two state dicts share have the same values."""
    pairs = [(one[key], other[key]) for key in one.keys() & other.keys()]
    return bool(pairs) and all(a is b or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs)


def without_wrappers(name: str) -> str:
    """Returns a name without the components that wrappers of modules insert."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    """Returns the tensors among the values of a state dict, which may also hold a module's extra state."""
    return [value for value in values if isinstance(value, torch.Tensor)]


def classifiers(module: nn.Module) -> list[str]:
    """Names of the classifying layers that a timm model had before they were removed."""
    config = getattr(module, "pretrained_cfg", None) or {}
    head = config.get("classifier")
    heads = [head] if isinstance(head, str) else list(head or ())
    return [*heads, "head_dist"] if heads == ["head"] else heads
