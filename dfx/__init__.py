"""dfx: features of whole-slide images, on one workstation or a Dask cluster.

slide = dfx.open_slide("slide.svs")
grid = dfx.PatchGrid.over(slide, shape=(224, 224), resolution=0.5, units="mpp")
features = dfx.features(slide, grid, "resnet50")     # a lazy Dask array (N, D)
"""

from importlib.metadata import version

from dfx.arrays import features, patches
from dfx.encoders import EncoderSpec, list_encoders, load_encoder, load_segmenter
from dfx.errors import (
    CallError,
    CallTypeError,
    DfxError,
    EncoderError,
    ResolutionError,
    RunError,
    SlideError,
    StoreError,
)
from dfx.extractor import DeepFeatureExtractor
from dfx.grid import PatchGrid
from dfx.slides import Slide, open_slide
from dfx.store import Features, open_features

__version__ = version("dfx")

__all__ = [
    "CallError",
    "CallTypeError",
    "DeepFeatureExtractor",
    "DfxError",
    "EncoderError",
    "EncoderSpec",
    "Features",
    "PatchGrid",
    "ResolutionError",
    "RunError",
    "Slide",
    "SlideError",
    "StoreError",
    "__version__",
    "features",
    "list_encoders",
    "load_encoder",
    "load_segmenter",
    "open_features",
    "open_slide",
    "patches",
]
