"""Masks: where patches are wanted, from a picture, a file, an array or polygons."""

from dfx.masks.annotations import draw, is_annotation, polygons
from dfx.masks.load import as_mask, mask_of_image, read_mask
from dfx.masks.placing import Bounds, Origin, on_slide
from dfx.masks.tissue import METHODS, Mask, Segment, Thumbnail, has_dark_background, is_method, method_name, segment_of

__all__ = [
    "METHODS",
    "Bounds",
    "Mask",
    "Origin",
    "Segment",
    "Thumbnail",
    "as_mask",
    "draw",
    "has_dark_background",
    "is_annotation",
    "is_method",
    "mask_of_image",
    "method_name",
    "on_slide",
    "polygons",
    "read_mask",
    "segment_of",
]
