"""Damaged headers: an error that names the file, within seconds and gigabytes, whatever was damaged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DATA

NAMES = ["good.svs", "syn_aperio_j2k.svs", "syn_generic_lzw_be_inch.tif", "syn_ome_planar.ome.tif", "syn_strips.tif"]
NAMES += [
    "syn_philips_sparse.tiff",
    "syn_leica_two_areas.scn",
    "syn_generic_bigtiff_zstd.tif",
    "syn_generic_subifd.tif",
]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2])
def test_no_damaged_header_crashes_hangs_or_escapes(seed: int, made_slide: Path) -> None:
    shared = [DATA / "slides/synthetic" / name for name in NAMES]
    slides = [made_slide, *(path for path in shared if path.exists())]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("fuzz.py"), str(seed), "500", *slides],
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "500 mutations" in done.stdout
