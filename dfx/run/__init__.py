"""Many slides through one cluster: plan, open the store, submit blocks through the window, finish."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import distributed

from dfx import cluster, html, memory
from dfx.encoders import BEHAVIOURS, EncoderSpec, Segmenter, measure, unusual_mpp
from dfx.errors import DfxError, EncoderError, RunError
from dfx.grid import whole_pair
from dfx.plan import Options
from dfx.run import health
from dfx.run.driver import Driver
from dfx.run.events import BlockDone, Event, SlideDone, SlideFailed, Stopping, Throttled, Timed
from dfx.run.item import Item
from dfx.run.job import labelled, one_or_named
from dfx.run.planning import Expected, GridOptions, Planned, Request
from dfx.store import Place, check_ours, open_features, place_of

__all__ = [
    "TIMEOUT",
    "BlockDone",
    "Event",
    "GridOptions",
    "Item",
    "Planned",
    "RunResult",
    "SlideDone",
    "SlideFailed",
    "Stopping",
    "Throttled",
    "Timed",
    "one_or_named",
    "raise_failures",
    "run_slides",
]

log = logging.getLogger(__name__)

LONGEST = 120
"""Bytes of a slide's stem that go into a name; file systems take 255 with what is added."""
AT_ONCE = 16
"""Places of stores that are looked at together."""
TIMEOUT = 3600.0
"""Seconds after which a block is given up, unless told otherwise."""


class RunResult(dict[Any, Any]):
    """Input (as given) -> its output, for each slide that is done."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: dict[Any, DfxError] = {}
        """Input -> what went wrong with it."""
        self.cache: Path | None = None
        """Temporary folder that lazy arrays read from; it goes with this result."""

    def _repr_html_(self) -> str:
        failed = {f"{given}: failed": error for given, error in self.failures.items()}
        arrays = {given: "arrays" if isinstance(output, dict) else output for given, output in self.items()}
        return html.table(f"{len(self)} done, {len(self.failures)} failed", arrays | failed)

    def make_cache(self) -> Path:
        """Give the temporary folder, made when first needed."""
        if self.cache is None:
            self.cache = Path(tempfile.mkdtemp(prefix="dfx-"))
            weakref.finalize(self, shutil.rmtree, self.cache, ignore_errors=True)
        return self.cache


def run_slides(
    items: Sequence[Item],
    encoders: Sequence[EncoderSpec],
    where: GridOptions,
    options: Options,
    client: distributed.Client,
    *,
    save_dir: Place | None,
    overwrite: bool = False,
    in_memory: bool = False,
    block_timeout: float = TIMEOUT,
    notify: Callable[[Event], None] = lambda event: None,
) -> RunResult:
    """Extract the features of many slides.

    Every tile is decoded once for all encoders. `in_memory` gives `{"features", "coordinates"}` a slide,
    numpy while they fit under `options.memory_threshold` percent, else lazy arrays over a store in `save_dir` (or
    a temporary folder). `block_timeout`: seconds after which a block is given up. Slides that fail
    are in `failures` of the result; nothing is raised for them. Raises `CallError` for a cluster that doesn't fit (see
    `cluster.admitted`), `ClusterLost` when it can't go on.
    """
    result = RunResult()
    names = output_names(items)
    threshold = options.memory_threshold or 100
    # What was damaged is noted in a store.
    kept = in_memory and options.on_bad_tile == "fail"
    promised: dict[Any, int] = {}
    if in_memory and save_dir is not None:
        log.warning("output_type='dict' writes nothing to %s while features fit in memory: 'zarr' does.", save_dir)
    if save_dir is not None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(check_ours, (save_dir / name for name in names.values())))

    def place_of_item(item: Item) -> Place:
        return (save_dir or place_of(result.make_cache())) / names[item.identity]

    def keeps(planned: Planned) -> bool:
        if not memory.fits(planned.nbytes + sum(promised.values()), threshold):
            return False
        promised[planned.item.identity] = planned.nbytes  # until it is filled, it is not resident
        return True

    outputs: dict[Any, Any] = {}
    warned: set[str] = set()
    health.await_workers(client)
    with cluster.admitted(client, options.device) as device:
        for encoder in [*encoders, *(item.mask.encoder for item in items if isinstance(item.mask, Segmenter))]:
            cluster.share(encoder, client)
        same = replace(options, device=device)
        requests = (
            (item, Request(item, tuple(encoders), where, same, None if kept else place_of_item(item), overwrite))
            for item in items
        )
        driver = Driver(
            client,
            requests,
            keeps=keeps,
            cache=place_of_item,
            timeout=block_timeout,
            expected=expected_of(encoders, where, client),
        )
        for event in driver.events():
            if isinstance(event, Planned):
                for encoder in encoders:
                    warn_of_mpp(event, encoder, warned)
                if event.doubt:
                    warnings.warn(event.doubt, stacklevel=2)
                warn_of_random(event, warned)
                if not event.patches:
                    address = event.item.address
                    warnings.warn(f"{address} has no patch under its mask: its features are empty.", stacklevel=2)
            elif isinstance(event, SlideDone):
                promised.pop(event.item.identity, None)
                event = replace(event, output=in_arrays(event) if in_memory else event.output.output)
                outputs[event.item.identity] = event.output
                log.info("%s is done", event.item.address)
            elif isinstance(event, SlideFailed):
                promised.pop(event.item.identity, None)
                result.failures.update(dict.fromkeys(event.item.given, event.error))
                log.info("%s failed: %s", event.item.address, event.error)
            elif isinstance(event, Throttled):
                log.info("%s", event.reason)
            notify(event)
    for item in items:  # in the order given, whichever was done first
        if item.identity in outputs:
            result.update(dict.fromkeys(item.given, outputs[item.identity]))
    return result


def warn_of_mpp(planned: Planned, encoder: EncoderSpec, warned: set[str]) -> None:
    """Warn, once a run, where patches are far from the resolution that an encoder was trained at."""
    unusual = "" if encoder.name in warned or not encoder.named else unusual_mpp(encoder.name, planned.mpp)
    if unusual:
        warned.add(encoder.name)
        warnings.warn(f"{planned.item.address}: {unusual}", UserWarning, stacklevel=3)


def warn_of_random(planned: Planned, warned: set[str]) -> None:
    """Warn, once a run, of encoders whose features differ from run to run."""
    for name, behaviour in zip(planned.names, planned.behaviours, strict=True):
        if behaviour is not None and not behaviour.deterministic and f"random {name}" not in warned:
            warned.add(f"random {name}")
            warnings.warn(
                f"the features of {name} differ from run to run (dropout or sampling in forward?): its stores say so, "
                "and are not resumed unless allow_nondeterministic=True.",
                UserWarning,
                stacklevel=3,
            )


def expected_of(encoders: Sequence[EncoderSpec], where: GridOptions, client: distributed.Client) -> Expected:
    """Give what encoders must give on every worker, as far as this process knows: given modules, since it has them.

    Of named encoders, the first slide that is planned decides. Workers of this process are this process.
    """
    BEHAVIOURS.clear()  # a module may call functions that were changed since the last run
    if client.scheduler.address.startswith("inproc://") or all(encoder.named for encoder in encoders):
        return {}
    shape = whole_pair(where.shape, "patch_input_shape")
    try:
        return {shape: tuple(None if encoder.named else measure(encoder, "cpu", shape) for encoder in encoders)}
    except EncoderError:  # a module that needs a GPU; one that fails everywhere fails as slides are planned
        return {}


def in_arrays(event: SlideDone) -> dict[str, Any]:
    """Give a slide's output as arrays: in memory already, or lazy over its store."""
    if isinstance(event.output, dict):
        return event.output
    found = open_features(event.output)
    features = [open_features(event.output, name).features for name in found.encoders]
    damaged = found.attrs.get("damaged_tiles")
    return (
        {
            "features": one_or_named(found.encoders, features),
            "coordinates": found.coordinates,
        }
        | labelled(event.item)
        | ({"damaged_tiles": damaged} if damaged else {})
    )


def output_names(items: Sequence[Item]) -> dict[Any, str]:
    """Name each slide's store, by `Item.identity`: its stem, with as much more as makes it unique in the run.

    A name depends on the inputs alone, never on their order, so that a second run finds the first's.
    """

    def names(item: Item) -> Iterator[str]:
        path = Path(item.address.partition("?versionId=")[0])
        digest = hashlib.sha256(os.fsencode(Path(item.address)) + repr(item.identity[1:]).encode()).hexdigest()[:8]
        ending = path.suffix.lstrip(".").lower()
        stem = os.fsencode(path.stem).decode("utf-8", "replace")
        if len(os.fsencode(path.stem)) > LONGEST or "\ufffd" in stem:  # what zarr and file systems take
            stem = f"{stem.encode()[:LONGEST].decode('utf-8', 'ignore')}-{digest}"
        yield stem
        yield f"{stem}-{ending}"
        yield f"{stem}-{path.parent.name[-80:]}"
        yield f"{stem}-{digest}"

    candidates = {item.identity: list(names(item)) for item in items}
    chosen = dict.fromkeys(candidates, 0)
    while True:
        groups: dict[str, list[Any]] = {}
        for identity, n in chosen.items():
            groups.setdefault(candidates[identity][n].casefold(), []).append(identity)
        clashes = [group for group in groups.values() if len(group) > 1]
        movable = [i for group in clashes for i in group if chosen[i] + 1 < len(candidates[i])]
        if not movable:
            return {identity: f"{candidates[identity][n]}.zarr" for identity, n in chosen.items()}
        for identity in movable:
            chosen[identity] += 1


def raise_failures(result: RunResult, on_error: Literal["raise", "skip"]) -> RunResult:
    """Give the result, or raise one `RunError` that lists what failed."""
    if not result.failures or on_error == "skip":
        return result
    lines = [f"  {error}" for error in dict.fromkeys(result.failures.values())]  # each names its slide or store
    count = f"{len(lines)} of {len(lines) + len(result)} slides failed{', the others are done' if result else ''}"
    raise RunError("\n".join([f"{count}:", *lines]), result)
