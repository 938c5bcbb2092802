"""Other tools on the same work, each in an environment of its own: `--peer tiatoolbox=/path/to/its/python`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

READERS = ("openslide", "tiffslide", "tiatoolbox")
ENCODERS = ("tiatoolbox",)
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Peer:
    """A tool, and the Python that has it."""

    name: str
    """One of `READERS`."""
    python: str
    """Its interpreter."""

    @classmethod
    def parse(cls, text: str) -> Peer:
        """Take NAME=PYTHON, or NAME where this Python has it."""
        name, _, python = text.partition("=")
        if name not in READERS:
            raise ValueError(f"{name} is none of {', '.join(READERS)}")
        return cls(name, python or sys.executable)

    def read(self, path: Path, shape: int, mpp: float, patches: int, threads: int) -> float | None:
        """Patches a second of reading the first patches of a slide; None where it can't read it."""
        said = self._run(path, shape, mpp, threads, patches=patches)
        return None if said is None else float(said["patches_per_s"])

    def encode(self, path: Path, mask: NDArray[np.bool_], weights: Path, threads: int) -> float:
        """Patches a second of resnet18 over the patches of 224 px at 0.5 mpp under a mask."""
        with tempfile.TemporaryDirectory() as folder:
            np.save(f"{folder}/mask.npy", mask.astype(np.uint8))
            said = self._run(
                path, 224, 0.5, threads, mask=f"{folder}/mask.npy", weights=str(weights), out=f"{folder}/out"
            )
        if said is None:
            raise ValueError(f"{self.name} can't read {path}")
        return float(said["patches_per_s"])

    def version(self) -> str:
        """Its version."""
        code = f"from importlib.metadata import version; print(version('{self.package}'))"
        return subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

    @property
    def package(self) -> str:
        """Its name on the package index."""
        return "openslide-python" if self.name == "openslide" else self.name

    def _run(self, path: Path, shape: int, mpp: float, threads: int, **more: Any) -> dict[str, Any] | None:
        asked = {"path": str(path), "shape": shape, "mpp": mpp, "threads": threads, **more}
        line = [self.python, "-W", "ignore", str(HERE / f"{self.name}_peer.py"), json.dumps(asked)]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        said: dict[str, Any] | None = json.loads(done.stdout.splitlines()[-1])
        return said
