"""One GPU a worker process, under any launcher: `dask worker ADDRESS --nworkers G --preload-nanny dfx.pin`.

Each nanny takes a GPU of its host that no other nanny has and names it in its worker's CUDA_VISIBLE_DEVICES, so
that the worker's `cuda` is that GPU and no other. A nanny too many does not start: GPUs are never shared.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from dfx.errors import CallError

VARIABLE = "CUDA_VISIBLE_DEVICES"

_held: weakref.WeakKeyDictionary[Any, IO[str]] = weakref.WeakKeyDictionary()
"""The lock that each nanny of this process holds."""


async def dask_setup(nanny: Any) -> None:
    """Pin a nanny's worker before it starts; what restarts later in this nanny has the same GPU.

    A pin that is there already (dask-cuda's, or of `distributed.nanny.environ`) is left.
    """
    if VARIABLE in nanny.env:
        return
    try:
        nanny.env[VARIABLE], _held[nanny] = claim(visible())
    except CallError as e:
        # Dask logs what a preload raises and starts the worker all the same, on every GPU. A closed nanny can't.
        await nanny.close(reason=str(e))
        raise


def dask_teardown(nanny: Any) -> None:
    """Let another nanny have the GPU."""
    if nanny in _held:
        _held.pop(nanny).close()


def visible(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Name the GPUs that this process may use, each once; empty where there is none.

    As CUDA_VISIBLE_DEVICES has them, by index, UUID or MIG name; without it the UUIDs that `nvidia-smi -L` lists, of
    a divided GPU its MIG devices. Neither asks CUDA, which would take memory on every GPU.
    """
    if VARIABLE in environ:
        names = [name.strip() for name in environ[VARIABLE].split(",")]
        usable = next((n for n, name in enumerate(names) if name in ("", "-1", "NoDevFiles")), len(names))
        return list(dict.fromkeys(names[:usable]))  # CUDA too stops at the first that is none
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_list(listed.stdout) if listed.returncode == 0 else []


def parse_list(text: str) -> list[str]:
    """Take the UUIDs out of what `nvidia-smi -L` says; a GPU with MIG devices can be used through these only."""
    gpus: list[list[str]] = []
    for line in text.splitlines():
        found = re.search(r"UUID: ([\w/-]+)\)", line)
        if found and line.startswith("GPU "):
            gpus.append([found[1]])
        elif found and gpus:
            gpus[-1].append(found[1])
    return [name for gpu in gpus for name in (gpu[1:] or gpu)]


def claim(gpus: Sequence[str], folder: Path | None = None) -> tuple[str, IO[str]]:
    """Take the first GPU that no other process of this user and host holds, and its lock, which ends with the process.

    Raises `CallError` when all are taken, or there is none. `folder`: of the locks (None: in XDG_RUNTIME_DIR, else
    in the folder of temporary files). Processes that name one GPU differently don't see each other.
    """
    if not gpus:
        raise CallError(
            f"dfx.pin found no GPU to pin a worker to: set {VARIABLE}, make `nvidia-smi -L` work, or leave out "
            "--preload-nanny dfx.pin."
        )
    folder = lock_folder() if folder is None else folder
    holders = []
    for gpu in gpus:
        lock = (folder / f"{gpu.replace('/', '_')}.lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holders.append(f"{gpu} by process {lock.read().strip()}")
            lock.close()
            continue
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        return gpu, lock
    raise CallError(f"no GPU is left for this worker ({', '.join(holders)}): start one worker process a GPU at most.")


def lock_folder() -> Path:
    """Give this user's folder of locks; raises `CallError` when it is another's, who could redirect what is written."""
    folder = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"dfx-pin-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        owner = folder.lstat().st_uid
    except OSError as e:
        raise CallError(
            f"{folder} can't be made ({e}): set TMPDIR to a folder on this host that can be written."
        ) from e
    if owner != os.getuid() or folder.is_symlink():
        raise CallError(f"{folder} is not this user's own folder: remove it, or set TMPDIR.")
    return folder
