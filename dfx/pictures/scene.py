"""A slide's thumbnail with what is drawn over it."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from dfx.masks import Mask
from dfx.pictures.canvas import Colour, Picture
from dfx.slides import Slide

GREEN: Colour = (20, 110, 60)
OUTLINE: Colour = (0, 110, 220)
SMALL = 5
"""Pixels of a patch below which its outline would hide what is in it."""


@dataclass(frozen=True, eq=False)
class Scene:
    """A slide's thumbnail, its tissue's outline, and where its patches lie."""

    thumbnail: Picture
    """The slide."""
    corners: NDArray[np.int64]
    """(N, 4): [x0, y0, x1, y1] of each patch, in pixels of the thumbnail."""
    mask: Mask | None
    """What chose the patches."""

    @classmethod
    def of(cls, slide: Slide, boxes: NDArray[np.floating], mask: Mask | None, max_size: int) -> Scene:
        """Read a slide's thumbnail; `boxes` (N, 4) are in baseline pixels."""
        thumbnail = slide.thumbnail(max_size)
        scale = np.tile(np.array(thumbnail.shape[1::-1]) / slide.dimensions, 2)
        return cls(thumbnail, np.rint(boxes * scale).astype(np.int64), mask)

    def outlined(self) -> Picture:
        """Draw the outline of tissue."""
        picture = self.thumbnail.copy()
        if self.mask is not None:
            size = picture.shape[1::-1]
            cells = cv2.resize(self.mask.cells.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
            contours, _ = cv2.findContours(cells, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(picture, contours, -1, OUTLINE, 1 if max(size) < 500 else 2)
        return picture

    def gridded(self) -> Picture:
        """Draw the outlines of patches; those of very small ones as a tint."""
        picture = self.thumbnail.copy()
        if len(self.corners) and np.median(self.corners[:, 2] - self.corners[:, 0]) < SMALL:
            tinted = np.asarray(cv2.addWeighted(picture, 0.6, np.full_like(picture, GREEN), 0.4, 0), np.uint8)
            for x0, y0, x1, y1 in self.corners.tolist():
                picture[y0 : max(y0 + 1, y1), x0 : max(x0 + 1, x1)] = tinted[y0 : max(y0 + 1, y1), x0 : max(x0 + 1, x1)]
            return picture
        for x0, y0, x1, y1 in self.corners.tolist():
            cv2.rectangle(picture, (x0, y0), (x1, y1), GREEN, 1)
        return picture

    def coloured(self, colours: Picture, drawn: NDArray[np.bool_] | None = None) -> Picture:
        """Draw each patch in its colour (N, 3) over the paler slide; only some where `drawn` (N,) says which."""
        picture: Picture = ((self.thumbnail.astype(np.uint16) + 255 * 2) // 3).astype(np.uint8)
        shown = np.ones(len(self.corners), bool) if drawn is None else drawn
        for (x0, y0, x1, y1), colour in zip(self.corners[shown].tolist(), colours[shown].tolist(), strict=True):
            picture[y0 : max(y0 + 1, y1), x0 : max(x0 + 1, x1)] = colour
        return picture

    def marked(self, picture: Picture, patch: int) -> Picture:
        """Draw a frame around a patch."""
        x0, y0, x1, y1 = self.corners[patch].tolist()
        for colour, out in (((255, 255, 255), 3), ((220, 20, 20), 1)):
            cv2.rectangle(picture, (x0 - out, y0 - out), (x1 + out - 1, y1 + out - 1), colour, 2)
        return picture
