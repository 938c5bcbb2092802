"""Slides that OpenSlide reads: formats that are no TIFF, and tiles that have to be stitched.

Its pixels come as regions, so a level's tiles are regions of about 512 pixels a side, aligned to the
file's own tiles where OpenSlide says how large these are. The library is optional and imported late.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dfx.errors import SlideError, TileError
from dfx.slides import vendors
from dfx.slides.factors import Image, downsample_xy, ratio
from dfx.slides.identity import identity as file_identity
from dfx.slides.identity import older
from dfx.slides.level import Level, TileGrid, as_rgb
from dfx.slides.slide import Slide
from dfx.slides.source import PROBE, ByteSource, LocalFile, open_source

if TYPE_CHECKING:
    import openslide

SIDE, MOST_SIDE = 512, 1024
"""Pixels of a region's side, and of a file's tile that one region is to hold."""
CACHE_BYTES = 32 * 2**20
"""What OpenSlide keeps of decoded tiles for all slides of a process; its default is this much a slide."""
UNSURE = "generic-tiff"
"""OpenSlide's name for a TIFF that it doesn't know: of several channels it gives the first as if it were all."""


def installed() -> bool:
    """Whether OpenSlide's binding is there."""
    return importlib.util.find_spec("openslide") is not None


def recognises(url: str, storage_options: Mapping[str, Any] | None = None) -> bool:
    """Whether OpenSlide is installed and recognises the vendor of a file, which must be local."""
    source = open_source(url, storage_options)
    if not isinstance(source, LocalFile):
        return False
    try:
        import openslide
    except (ImportError, OSError):  # the binding, or its library
        return False
    return openslide.OpenSlide.detect_format(Path(source.url)) not in (None, UNSURE)


def open_openslide(
    url: str,
    *,
    mpp: tuple[float, float] | None = None,
    power: float | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Slide:
    """Open a slide through OpenSlide; `mpp` and `power` go before what the file says. Raises `SlideError`."""
    source = open_source(url, storage_options)
    if not isinstance(source, LocalFile):
        raise SlideError(f"{source.url} is read through OpenSlide, which reads local files only: copy the slide.")
    library = load(source.url)
    path, version = Path(source.url), library.__library_version__
    try:
        vendor = library.OpenSlide.detect_format(path)
        if vendor == UNSURE:
            raise SlideError(
                f"{path} is a TIFF whose vendor OpenSlide {version} does not know, so that it may show it wrong: "
                "have dfx read it (backend='tiff'), or convert it to SVS, OME-TIFF or pyramidal TIFF."
            )
        if vendor is None:
            raise SlideError(
                f"{path} is no slide that OpenSlide {version} recognises, or files that belong to it are missing: "
                "copy all of it again, or convert it to SVS, OME-TIFF or pyramidal TIFF."
            )
        handle = Handle(path)
        properties = dict(handle.slide.properties)
        regions = [Regions.of(handle, n, properties) for n in range(handle.slide.level_count)]
        identity = content(path, vendor, properties)
    except (library.OpenSlideError, OSError) as e:
        raise SlideError(
            f"{path} can't be read by OpenSlide {version} ({e}): it is damaged, or files that belong to it are "
            "missing; copy all of it again. Convert it to OME-TIFF if this version does not support it."
        ) from e
    check_sizes(path, regions)
    said = (vendors.number(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
    own_mpp = mpp or vendors.plausible(*said)
    said_power = vendors.positive(vendors.number(properties.get("openslide.objective-power")))
    believed, doubts = vendors.believed_power(said_power, own_mpp)
    return Slide(
        url=source.url,
        vendor=vendor,
        mpp=own_mpp,
        power=power or believed,
        levels=tuple(level_of(part, regions[0]) for part in regions),
        notes=(*notes(regions, properties), *(() if power else doubts)),
        identity=identity,
        source=source,
        backend=f"openslide {version}",
        kept=CACHE_BYTES,
        overrides=(mpp, power),
        storage_options=storage_options,
        bounds=bounds_of(properties),
        reopen=open_openslide,
    )


def level_of(part: Regions, base: Regions) -> Level:
    """Describe a level. If OpenSlide's factor is not the mean ratio of the sizes, it comes from the file."""
    whole, size = base.shape_yx[::-1], part.shape_yx[::-1]
    x, y = factors = ratio(whole, size)
    if abs(part.downsample - (x + y) / 2) > 1e-6 * part.downsample:
        factors = part.downsample, part.downsample
    elif known := downsample_xy(Image(whole), Image(size)):
        factors = known
    about = 3, np.dtype(np.uint8), part.downsample, "decoded by OpenSlide"
    return Level(part.shape_yx, *about, "rgb", (part,), factors)


def load(url: str) -> Any:
    """Import OpenSlide; raises `SlideError`."""
    try:
        import openslide
    except (ImportError, OSError) as e:  # OSError: the binding is there, the library is not
        raise SlideError(
            f"{url} is read through OpenSlide, which can't be loaded ({str(e).strip().splitlines()[0]}): "
            "pip install dfx[openslide], here and on the workers."
        ) from e
    return openslide


@functools.cache
def decoded_tiles() -> openslide.OpenSlideCache:
    """Give the cache that all OpenSlide handles of this process share; it is thread-safe."""
    import openslide

    return openslide.OpenSlideCache(CACHE_BYTES)


class Handle:
    """An open slide of OpenSlide's, for all threads of a process.

    The first error that a handle meets is what it answers from then on, to every thread. So a region
    counts as damaged when a handle that nobody else uses can't read it either.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.slide = self.open()

    def open(self) -> openslide.OpenSlide:
        """Open the slide once more."""
        import openslide

        slide = openslide.OpenSlide(self.path)
        slide.set_cache(decoded_tiles())
        return slide

    def region(self, level: int, at_xy: tuple[int, int], size_xy: tuple[int, int], name: str) -> NDArray[np.uint8]:
        """Read pixels as RGB over white (rows, columns, 3), from a place on the baseline."""
        import openslide

        used = self.slide
        try:
            return over_white(used, level, at_xy, size_xy)
        except openslide.OpenSlideError:
            try:
                alone = self.open()
                if self.slide is used:
                    self.slide = self.open()
            except openslide.OpenSlideError as e:
                raise SlideError(f"{self.path} can't be opened any more ({e}): check the disk and the file.") from e
        try:
            return over_white(alone, level, at_xy, size_xy)
        except openslide.OpenSlideError as e:
            raise TileError(
                name, f"{name} can't be decoded ({e}): the file is damaged; copy or export it again."
            ) from e


def over_white(
    slide: openslide.OpenSlide, level: int, at_xy: tuple[int, int], size_xy: tuple[int, int]
) -> NDArray[np.uint8]:
    """Read a region; what is transparent in it, so not scanned, is white as it is everywhere in dfx."""
    return np.ascontiguousarray(as_rgb(np.asarray(slide.read_region(at_xy, level, size_xy)), "rgba"))


def check_sizes(path: Path, levels: Sequence[Regions]) -> None:
    """Refuse a slide with a level that is larger than its baseline: OpenSlide takes damaged sizes as they are."""
    height, width = levels[0].shape_yx
    for n, level in enumerate(levels):
        if level.shape_yx[0] > height or level.shape_yx[1] > width:
            raise SlideError(
                f"{path} is damaged: level {n} has {level.shape_yx[1]} x {level.shape_yx[0]} pixels, more than the "
                f"{width} x {height} of the slide; copy it again."
            )


@dataclass(frozen=True, eq=False)
class Regions(TileGrid):
    """A level as OpenSlide's regions."""

    handle: Handle
    """What reads them."""
    level: int
    """OpenSlide's number of the level."""
    downsample: float
    """Baseline pixels per pixel."""

    @classmethod
    def of(cls, handle: Handle, level: int, properties: Mapping[str, str]) -> Regions:
        """Divide a level."""
        width, height = handle.slide.level_dimensions[level]
        rows, columns = (properties.get(f"openslide.level[{level}].tile-{side}", "1") for side in ("height", "width"))
        tile = region_side(int(rows)), region_side(int(columns))
        return cls((0, 0), (height, width), tile, handle, level, handle.slide.level_downsamples[level])

    @functools.cached_property
    def present(self) -> NDArray[np.bool_]:
        """All: OpenSlide says of each pixel whether it was scanned, and of no tile."""
        return np.ones([-(-whole // tile) for whole, tile in zip(self.shape_yx, self.tile_yx, strict=True)], np.bool_)

    def tile(
        self, source: ByteSource, row: int, column: int, name: str, *, scratch: bool, shrink: int
    ) -> NDArray[np.uint8]:
        """Read a region. OpenSlide opens the slide's files itself; `source` tells whether its file was written anew."""
        y, x = row * self.tile_yx[0], column * self.tile_yx[1]
        size = min(self.tile_yx[1], self.shape_yx[1] - x), min(self.tile_yx[0], self.shape_yx[0] - y)
        found = self.handle.region(self.level, (self.place(x), self.place(y)), size, name)
        source.read(())
        return found

    def place(self, at: int) -> int:
        """Where a pixel of the level lies on the baseline, by whose whole pixels OpenSlide is asked."""
        return round(at * self.downsample)

    @property
    def misplaced(self) -> float:
        """By how much of the level's pixel regions lie off at most, since their places are whole on the baseline."""
        starts = [at for size, side in zip(self.shape_yx, self.tile_yx, strict=True) for at in range(0, size, side)]
        return max(abs(self.place(at) / self.downsample - at) for at in starts)


def region_side(stored: int) -> int:
    """Give about 512 pixels, in whole tiles of the file."""
    return SIDE if stored > MOST_SIDE else max(SIDE // stored, 1) * stored


def bounds_of(properties: Mapping[str, str]) -> tuple[int, int, int, int] | None:
    """Read the scanned area, (x, y, width, height); None if OpenSlide does not give it."""
    values = [properties.get(f"openslide.bounds-{name}") for name in ("x", "y", "width", "height")]
    if any(value is None for value in values):
        return None
    x, y, width, height = (int(value or 0) for value in values)
    return (x, y, width, height) if width > 0 and height > 0 else None


def notes(regions: Sequence[Regions], properties: Mapping[str, str]) -> list[str]:
    """Say what a careful user should know."""
    found = []
    x, y, width, height = (properties.get(f"openslide.bounds-{name}") for name in ("x", "y", "width", "height"))
    if width and height:
        found.append(f"{width} x {height} pixels at ({x}, {y}) were scanned; around them is white")
    background = properties.get("openslide.background-color", "FFFFFF")
    if background.upper() != "FFFFFF":
        found.append(f"its own background is #{background}; what was not scanned is white here")
    for n, part in enumerate(regions):
        if (off := part.misplaced) > 1 / 256:  # as finely as OpenSlide's Cairo draws
            found.append(f"regions of level {n} begin at whole pixels of the baseline, up to {off:.2f} of a pixel off")
    return found


def content(path: Path, vendor: str, properties: Mapping[str, str]) -> str:
    """Name a slide's content, that of all its files, whatever their paths; never that of another reader's slide."""
    found = sorted(file_identity(open_source(str(file))) for file in files(path, vendor, properties))
    hashed = properties.get("openslide.quickhash-1", "")
    digests = (hashlib.sha256("".join([hashed, *names]).encode()) for names in (sorted(map(older, found)), found))
    return "-".join(["openslide", *(digest.hexdigest()[:32] for digest in digests)])


def files(path: Path, vendor: str, properties: Mapping[str, str]) -> set[Path]:
    """Find the files that a slide is made of; a MIRAX slide's may be missing, which OpenSlide tells tile by tile."""
    found: set[Path] = set()
    if vendor == "mirax":
        named = [value for name, value in properties.items() if re.fullmatch(r"mirax\.DATAFILE\.FILE_\d+", name)]
        named += ["Slidedat.ini", properties["mirax.HIERARCHICAL.INDEXFILE"]]
        return {path, *(path.with_suffix("") / name for name in named)}
    if vendor == "hamamatsu":  # a VMS or VMU file names the others
        found = {path.parent / value for name, value in properties.items() if name.startswith("hamamatsu.") and value}
    elif vendor == "dicom":  # every level is a file; OpenSlide, too, looks through the folder for its series
        series = properties.get("dicom.SeriesInstanceUID", "").encode()
        for file in path.parent.iterdir():
            if file.is_file():
                with file.open("rb") as opened:
                    if series in opened.read(PROBE):
                        found.add(file)
    return {path, *(file for file in found if file.is_file())}
