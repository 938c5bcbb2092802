"""Where a named encoder's weights lie: where the user says, in the offline folder, or on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from dfx.encoders.weights import INDEX, file_digest, files_of, weight_map
from dfx.errors import EncoderError

FILES = ("model.safetensors", "pytorch_model.bin")
"""What most repositories call their weights; the first that is there is taken."""
ENDINGS = ("", ".safetensors", ".pt", ".pth", ".bin")
"""Of what the offline folder holds under a name; "": a folder."""


@dataclass(frozen=True)
class Wanted:
    """What a named encoder is built from, and where it may be."""

    name: str
    """The encoder."""
    parts: tuple[tuple[str, ...], ...]
    """Its files, each with the names that it may have. One alone is found as a file, more as their folder."""
    repository: str | None
    """Of the hub; None: nowhere."""
    revision: str | None = None
    """Commit, branch or tag; None: the newest."""
    code: bool = False
    """Whether the repository's Python files belong to it."""
    others: tuple[str, ...] = ()
    """Other names under which the offline folder may have the same weights."""
    page: str = ""
    """Where the weights are to be had by hand."""
    untrained: bool = False
    """Whether it can be run without weights."""

    @property
    def remedy(self) -> str:
        """What to do where there is no network."""
        files = " and ".join(" or ".join(part) for part in self.parts)
        where = f"{endpoint()}/{self.repository}" if self.repository else self.page
        what = "PATH" if len(self.parts) == 1 else "FOLDER"
        return (
            f"'{self.name}' needs {files} of {where}: download it where there is a network, and pass weights={what} "
            f"(--weights {what}) or put it into the folder of DFX_WEIGHTS as {self.name}"
            f"{'.safetensors (.pt, .pth, .bin)' if len(self.parts) == 1 else '/'}"
            f"{', or pass weights=' + repr('random') + ' to run it untrained' if self.untrained else ''}"
        )


def endpoint() -> str:
    """Give the hub's address."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def names_of(part: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names that a file may have, and then the names that the index of its shards may have."""
    return (*part, *(f"{name}{INDEX}" for name in part))


def part_of(folder: Path, part: tuple[str, ...]) -> Path | None:
    """Returns the first file with such a name that a folder has, or the index of its shards; None if it has neither."""
    return next((folder / name for name in names_of(part) if (folder / name).is_file()), None)


def given(wanted: Wanted, path: str | Path) -> Path:
    """Give a weights path made absolute, down to what the encoder is built from; raises `EncoderError`."""
    found = Path(os.path.expanduser(path)).absolute()  # noqa: PTH111  # which leaves an unknown user's ~ alone
    if found.is_dir():
        files = [part_of(found, part) for part in wanted.parts]
        if None not in files:
            return found if len(wanted.parts) > 1 else files[0]  # type: ignore[return-value]
        names = " and ".join(" or ".join(part) for part in wanted.parts)
        raise EncoderError(
            f"weights {found} have no {names} (or shards and their {INDEX}): "
            f"give the folder of '{wanted.name}'s repository."
        )
    if not found.is_file():
        raise EncoderError(
            f"weights {found} are not a file or folder: give .safetensors, a state dict, or their folder."
        )
    if len(wanted.parts) > 1:
        names = " and ".join(" or ".join(part) for part in wanted.parts)
        raise EncoderError(f"weights {found} are one file, but '{wanted.name}' needs {names}: give their folder.")
    return found


def offline(wanted: Wanted) -> Path | None:
    """Give what the folder of the environment's DFX_WEIGHTS has under the encoder's name, None where there is none."""
    folder = os.environ.get("DFX_WEIGHTS")
    if not folder:
        return None
    for name in (wanted.name, *wanted.others):
        for ending in ENDINGS:
            path = Path(folder).expanduser() / f"{name}{ending}"
            if path.exists():
                return given(wanted, path)
    return None


def fetched(wanted: Wanted) -> Path:
    """Give files of a repository from this machine's cache, else download them.

    Raises `EncoderError` that names them when they are neither here nor in reach, and the page and the command
    when their terms must be accepted first.
    """
    from huggingface_hub import errors

    if wanted.repository is None:
        raise EncoderError(f"the weights of '{wanted.name}' are not on the hub. {wanted.remedy}.")
    try:
        return download(wanted, cached=True)
    except errors.EntryNotFoundError:
        pass
    reason = unreachable(endpoint())
    if reason:
        raise EncoderError(f"{endpoint()} can't be reached ({reason}). {wanted.remedy}.")
    try:
        return download(wanted)
    except errors.GatedRepoError as e:
        raise EncoderError(
            f"the weights of '{wanted.name}' are gated: accept their terms at {endpoint()}/{wanted.repository} and run "
            f"`hf auth login`, or set HF_TOKEN. Without network, {wanted.remedy}."
        ) from e
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, OSError) as e:
        said = " ".join(str(e).split())  # the hub's library writes paragraphs
        raise EncoderError(f"{wanted.repository} could not be downloaded ({said}). {wanted.remedy}.") from e


def download(wanted: Wanted, *, cached: bool = False) -> Path:
    """Download files of a repository; `cached`: only what was downloaded before. Raises as the hub's library does."""
    import huggingface_hub
    from huggingface_hub import errors

    assert wanted.repository is not None
    found: list[Path] = []
    for part in wanted.parts:
        names = names_of(part)
        for n, name in enumerate(names):
            try:
                file = huggingface_hub.hf_hub_download(
                    wanted.repository, name, revision=wanted.revision, local_files_only=cached
                )
            except errors.EntryNotFoundError:
                if n == len(names) - 1:
                    raise
            else:
                found.append(Path(file))
                break
        if found[-1].name.endswith(INDEX):
            for shard in sorted(set(weight_map(found[-1]).values())):
                huggingface_hub.hf_hub_download(
                    wanted.repository, shard, revision=wanted.revision, local_files_only=cached
                )
    if wanted.code:
        huggingface_hub.snapshot_download(
            wanted.repository, revision=wanted.revision, allow_patterns=["*.py", "*.json"], local_files_only=cached
        )
    if len({file.parent for file in found}) > 1:
        raise OSError("it changed meanwhile: try again")
    return found[0] if len(found) == 1 else found[0].parent


def digest(wanted: Wanted, path: Path) -> str:
    """Returns the SHA-256 of a weights file, of all shards of an index, or of all files that build an encoder."""
    if path.is_file() and not path.name.endswith(INDEX):
        return file_digest(path)
    folder = path if path.is_dir() else path.parent
    parts = [path] if path.is_file() else [part_of(path, part) for part in wanted.parts]
    files = [file for part in parts if part is not None for file in files_of(part)]
    if wanted.code:
        files += path.rglob("*.py")
    found = hashlib.sha256()
    for name, file in sorted((str(file.relative_to(folder)), file) for file in files):
        found.update(f"{name} {file_digest(file)}\n".encode())
    return found.hexdigest()


def unreachable(address: str) -> str:
    """Say why a host can't be reached, at once where its name has no address; else ''."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return ""
    try:
        socket.getaddrinfo(urlsplit(address).hostname, 443)
    except OSError as e:
        return str(e)
    return ""
