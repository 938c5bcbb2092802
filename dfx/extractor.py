"""`DeepFeatureExtractor`: the face that users of TIAToolbox know. Thin: it checks the call, then runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from dfx import cluster, loose
from dfx.arrays import make_heads, measured_modules
from dfx.call import (
    check_count,
    check_percent,
    check_seconds,
    check_workers,
    configuration,
    plain_label,
    resolution_of,
    slide_items,
    store_name,
)
from dfx.encoders import EncoderLike, EncoderSpec, check_device, load_encoder
from dfx.errors import CallError, CallTypeError
from dfx.grid import check_origin, check_ratio, whole_pair
from dfx.masks import Origin, Segment, segment_of
from dfx.plan import Options, head_names
from dfx.progress import ProgressBar
from dfx.run import TIMEOUT, Event, GridOptions, RunResult, one_or_named, raise_failures, run_slides
from dfx.store import Place, check_folder, check_ours, write_patch_mode


class DeepFeatureExtractor:
    """Extract deep features of slides or of loose patches.

    `model`: a name, a `torch.nn.Module` or what `load_encoder` gives, or a list of these: tiles are then decoded once
    for all of them; `weights` as in `load_encoder`, for a list None or one each. `batch_size`:
    patches that the network takes at a time. `num_workers`: decoding threads of the embedded cluster
    (0: one a core). `device`: "auto", or a torch device of the workers. Raises `EncoderError` for a
    model or weights that can't be used.
    """

    def __init__(
        self,
        model: EncoderLike | Sequence[EncoderLike],
        batch_size: int = 64,
        num_workers: int = 0,
        weights: str | Path | Sequence[str | Path | None] | None = None,
        *,
        device: str = "auto",
        verbose: bool = True,
    ) -> None:
        self.encoders: tuple[EncoderSpec, ...] = load_encoders(model, weights)
        self.options = Options(batch_size=batch_size, device=check_device(device))
        self.num_workers = check_workers(num_workers)
        self.verbose = bool(verbose)

    def __repr__(self) -> str:
        names = ", ".join(encoder.name for encoder in self.encoders)
        return f"DeepFeatureExtractor({names}, {self.options.device}, batch_size={self.options.batch_size})"

    def run(
        self,
        images: Sequence[Any] | NDArray[Any] | str | Path,
        *,
        masks: Sequence[Any] | NDArray[Any] | None = None,
        input_resolutions: Sequence[Mapping[str, Any]] | None = None,
        patch_input_shape: int | tuple[int, int] | None = None,
        stride_shape: int | tuple[int, int] | None = None,
        ioconfig: Any = None,
        patch_mode: bool = True,
        save_dir: str | Path | None = None,
        overwrite: bool = False,
        output_type: Literal["dict", "zarr"] = "dict",
        auto_get_mask: bool = True,
        tissue: str | Segment = "otsu",
        min_mask_ratio: float = 0.0,
        mask_origin: Origin | None = None,
        memory_threshold: float = 80,
        labels: Sequence[Any] | None = None,
        wsireader_kwargs: Mapping[str, Any] | None = None,
        storage_options: Mapping[str, Any] | None = None,
        client: Any = None,
        on_error: Literal["raise", "skip"] = "raise",
        block_size: int = 256,
        reading: Literal["exact", "fast"] = "exact",
        on_bad_tile: Literal["fail", "fill"] = "fail",
        allow_nondeterministic: bool = False,
        block_timeout: float = TIMEOUT,
        notify: Callable[[Event], None] | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        device: str | None = None,
        verbose: bool | None = None,
        output_file: str | Path | None = None,
        return_labels: bool = False,
        return_probabilities: bool = True,
        class_dict: Mapping[Any, Any] | None = None,
        scale_factor: Any = None,
    ) -> RunResult | dict[str, Any] | Path | str:
        """Extract features; nothing given here outlasts the call.

        Slides (`patch_mode=False`): `images` are paths, `Slide`s or `WSIReader`s, patterns such as "slides/*.svs", or
        a table of slides by its path (.csv, .txt; see `dfx.table.read_table`); gives input -> store (zarr), or
        input -> {"features", "coordinates", "labels"} (dict). Loose patches: `images` are a uint8
        (N, rows, columns, 3) array, a list of arrays or of image files; gives {"features", "labels"}
        or the store's path.

        - `input_resolutions`: `[{"resolution": 0.5, "units": "mpp"}]` (the first is read), units mpp, power, level or
          baseline; `patch_input_shape`, `stride_shape` (default: the patch): (rows, columns) there.
          `ioconfig`, an object or mapping with these three, goes before them.
        - `masks`: one a slide, None, an array, an image path, GeoJSON (a path or mapping) or a `Slide`; without
          one, `auto_get_mask` finds tissue, by `tissue`: "otsu", "hsv" (leaves pen marks out) or a function, as in
          `Slide.tissue_mask`; each of these may be a slide's mask too. `min_mask_ratio`: the share of a patch under the
          mask must be above this. `mask_origin`, "slide" or "bounds", is the corner at which masks of slides with
          bounds (Leica SCN, MIRAX) begin: QuPath crops these slides to their bounds. None: a slide whose mask has no
          certain origin fails.
        - `save_dir`: where stores go. One of the same plan is kept or resumed; one of another is an
          error, unless `overwrite`, which replaces stores that dfx made and nothing else.
        - `memory_threshold`: percent of a worker's memory above which batches are halved and blocks wait for
          others; also how far dict results may fill this process, before they are lazy over a store.
        - Slides, masks and `save_dir` may be any URL that fsspec reads or writes. `storage_options`: those of its
          file system, or a mapping of protocols ("s3") or URL prefixes ("s3://bucket/out") to such. They go to
          workers, and are in no message, log or store; stores are then given by their URL (str).
        - `wsireader_kwargs`: `mpp` and `power` that go before the slides' own.
        - `client`: a Dask client; None: the current one, else a cluster inside this process.
        - `on_error`: "raise" a `RunError` when the other slides are done, or "skip" (see `.failures`).
        - `block_size`: patches in a block, the unit of work and resume. `reading`: "fast" shrinks JPEG tiles
          while they are decoded where patches are shrunk by an even factor; on slides with subsampled chroma (4:2:0)
          tissue at 2x then differs from "exact" by 1.3 grey levels on average and by up to 33.
          `on_bad_tile`: "fill" leaves a tile that can't be decoded white, and names it in the store.
          `allow_nondeterministic`: also resume half-done stores of an encoder whose features differ from run to run.
          `block_timeout`: seconds after which a block that hangs is given up, and its slide with it. `notify` is called
          with each `dfx.run` event: slides planned, done and failed, blocks done. `batch_size`, `num_workers`,
          `device`, `verbose`: as in the constructor, for this call.
        - `output_file`: name of the store in patch mode. `return_probabilities`, `class_dict`,
          `scale_factor` and `return_labels` are taken for TIAToolbox's sake and change nothing:
          labels are given back when they are given.

        Raises `CallError`, `CallTypeError` or `StoreError` for a call that can't be carried out,
        before anything is read or removed; `RunError` when slides failed.
        """
        options = Options(
            block_size=block_size,
            batch_size=self.options.batch_size if batch_size is None else batch_size,
            device=self.options.device if device is None else check_device(device),
            reading=reading,
            on_bad_tile=on_bad_tile,
            memory_threshold=check_percent(memory_threshold),
            allow_nondeterministic=bool(allow_nondeterministic),
        )
        timeout = check_seconds(block_timeout)
        if notify is not None and not callable(notify):
            raise CallTypeError(f"notify must be a function of an event, not {type(notify).__name__}.")
        threads = self.num_workers if num_workers is None else check_workers(num_workers)
        if output_type not in ("dict", "zarr"):
            raise CallError(f"output_type must be 'dict' or 'zarr', not {output_type!r}.")
        if on_error not in ("raise", "skip"):
            raise CallError(f"on_error must be 'raise' or 'skip', not {on_error!r}.")
        if output_type == "zarr" and save_dir is None:
            raise CallError("output_type='zarr' needs save_dir=, the folder for the stores.")
        if storage_options is not None and not isinstance(storage_options, Mapping):
            raise CallTypeError(f"storage_options must be a mapping, not {type(storage_options).__name__}.")
        folder = None if save_dir is None else check_folder(save_dir, storage_options)
        dask_client = cluster.check_client(client)
        shape, resolutions, stride = configuration(ioconfig, patch_input_shape, input_resolutions, stride_shape)
        show = self.verbose if verbose is None else bool(verbose)

        if patch_mode:
            store = None if output_type == "dict" or folder is None else folder / store_name(output_file)
            return self._run_patches(images, labels, shape, options, dask_client, store, overwrite)

        if shape is None or resolutions is None:
            raise CallError(
                "slides need patch_input_shape=(rows, columns) and "
                "input_resolutions=[{'resolution': 0.5, 'units': 'mpp'}], or an ioconfig with both."
            )
        where = GridOptions(
            shape, *resolution_of(resolutions), stride, check_ratio(min_mask_ratio), check_origin(mask_origin)
        )
        segment_of(tissue)
        items = slide_items(
            images,
            masks,
            labels,
            wsireader_kwargs,
            tissue=tissue if auto_get_mask else None,
            storage_options=storage_options,
        )
        cluster_or_client = cluster.client_or_embedded(dask_client, threads)
        with cluster_or_client as running, ProgressBar(len(items), show=show) as bar:

            def told(event: Event) -> None:
                bar(event)
                if notify is not None:
                    notify(event)

            result = run_slides(
                items,
                self.encoders,
                where,
                options,
                running,
                save_dir=folder,
                overwrite=bool(overwrite),
                in_memory=output_type == "dict",
                block_timeout=timeout,
                notify=told,
            )
        return raise_failures(result, on_error)

    def _run_patches(
        self,
        images: object,
        labels: Sequence[Any] | None,
        shape: int | tuple[int, int] | None,
        options: Options,
        client: Any,
        store: Place | None,
        overwrite: bool,
    ) -> dict[str, Any] | Path | str:
        wanted = None if shape is None else whole_pair(shape, "patch_input_shape")
        patches = loose.gather(images, wanted, any_kind=all(e.kind == "tiatoolbox" for e in self.encoders))
        check_count("labels", labels, len(patches.source))
        plain = None if labels is None else [plain_label(label) for label in labels]
        if store is not None:
            check_ours(store)
            if store.exists() and store.children() and not overwrite:
                raise CallError(f"{store} exists: pass overwrite=True to replace it, or another output_file=.")
        heads = make_heads(self.encoders, patches.shape_yx, patches.channels)
        running = client or cluster.current_client()
        if running is not None:  # its workers may be other processes
            heads = measured_modules(heads, patches.shape_yx, patches.channels)
        with cluster.admitted(running, options.device) if running else nullcontext(options.device) as device:
            same = replace(options, device=device)
            features = [loose.encode_all(patches, head, same, running) for head in heads]
        if store is not None:
            return write_patch_mode(store, heads, features, plain, options.block_size)
        names = [head.name for head in heads]
        return {"features": one_or_named(names, features)} | ({} if labels is None else {"labels": labels})


def load_encoders(
    model: EncoderLike | Sequence[EncoderLike], weights: str | Path | Sequence[str | Path | None] | None
) -> tuple[EncoderSpec, ...]:
    """Load one encoder or several, each with its weights."""
    if isinstance(model, str) or not isinstance(model, Sequence):
        if isinstance(weights, Sequence) and not isinstance(weights, str):
            raise CallTypeError("one model takes one weights=, not a list.")
        return (load_encoder(model, weights=weights),)
    if not model:
        raise CallError("model is an empty list: give at least one encoder.")
    files = [weights] * len(model) if weights in (None, "random") else weights
    if isinstance(files, str | Path) or not isinstance(files, Sequence) or len(files) != len(model):
        raise CallError(f"{len(model)} models need weights=None, 'random', or a list with one for each.")
    specs = tuple(load_encoder(one, weights=file) for one, file in zip(model, files, strict=True))
    head_names(specs)
    return specs
