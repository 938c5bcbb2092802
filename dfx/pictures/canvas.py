"""Text, legends and pictures put together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dfx.errors import CallError, StoreError
from dfx.remote import is_remote, local_path, shown

Picture: TypeAlias = NDArray[np.uint8]
"""uint8 RGB (rows, columns, 3)."""
Colour: TypeAlias = tuple[int, int, int]

GAP = 16
"""Pixels between two pictures."""
NARROWEST = 320
"""Pixels that a caption has."""
SIZE = 18
"""Pixels of a line's letters."""
BLACK: Colour = (30, 30, 30)
FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial.ttf")
"""Looked for among the system's; the last resort is Pillow's own, which has ASCII."""


@lru_cache
def fonts(size: int) -> tuple[ImageFont.FreeTypeFont, ...]:
    """Give the fonts that are there, the best first."""
    found = []
    for name in FONTS:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    own = ImageFont.load_default(size)
    return (*found, own) if isinstance(own, ImageFont.FreeTypeFont) else tuple(found)


@lru_cache(4096)
def has(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    """Whether a font has a letter, rather than a box in its place."""
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask("\uffff"))


def legible(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """Give a text and a font that has all of it; letters that none has are written by number."""
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    for font in fonts(size):
        if all(has(font, letter) for letter in text):
            return text, font
    font = fonts(size)[0]
    return "".join(letter if has(font, letter) else ascii(letter)[1:-1] for letter in text), font


def lines_of(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break a text into lines that are not wider; a word that is loses its middle."""
    lines: list[str] = []
    for word in text.split(" "):
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        kept = len(word)
        short = word
        while font.getlength(short) > width and kept > 2:
            kept -= 1
            short = f"{word[: kept // 2]}...{word[-(kept - kept // 2) :]}"
        lines.append(short)
    return lines


def caption(text: str, width: int, size: int = SIZE, rows: int = 0) -> Picture:
    """Write a text on white, `width` pixels wide and at least `rows` high."""
    text, font = legible(text, size)
    lines = lines_of(text, font, width - 8)
    height = max(rows, round(size * 1.35) * len(lines) + 10)
    image = Image.new("RGB", (width, height), (255, 255, 255))
    ImageDraw.Draw(image).multiline_text((4, 4), "\n".join(lines), fill=BLACK, font=font, spacing=size * 0.25)
    return np.asarray(image)


def padded(picture: Picture, rows: int, columns: int) -> Picture:
    """Put white below and to the right of a picture."""
    more = max(0, rows - picture.shape[0]), max(0, columns - picture.shape[1])
    return np.pad(picture, ((0, more[0]), (0, more[1]), (0, 0)), constant_values=255) if any(more) else picture


def below(pictures: Sequence[Picture], gap: int = 0) -> Picture:
    """Put pictures below each other."""
    width = max(picture.shape[1] for picture in pictures)
    return np.concatenate(
        [padded(picture, picture.shape[0] + gap * (n < len(pictures) - 1), width) for n, picture in enumerate(pictures)]
    )


def beside(pictures: Sequence[Picture], gap: int = GAP) -> Picture:
    """Put pictures beside each other."""
    height = max(picture.shape[0] for picture in pictures)
    return np.concatenate(
        [padded(p, height, p.shape[1] + gap * (n < len(pictures) - 1)) for n, p in enumerate(pictures)], axis=1
    )


def panels(pictures: Sequence[Picture], titles: Sequence[str]) -> Picture:
    """Put pictures of one size beside each other, each below its title."""
    width = max(NARROWEST, *(picture.shape[1] for picture in pictures))
    bars = [caption(title, width) for title in titles]
    height = max(bar.shape[0] for bar in bars)
    blank = np.full((height, width, 3), 255, np.uint8)
    titled = []
    for bar, picture in zip(bars, pictures, strict=True):
        top = blank.copy()
        top[height - bar.shape[0] :] = bar  # next to its picture
        titled.append(below([top, picture]))
    return beside(titled)


def legend(names: Sequence[str], colours: Sequence[Colour]) -> Picture:
    """Give a column of colours and what they mean."""
    rows = []
    for name, colour in zip(names, colours, strict=True):
        text = caption(name, 220)
        mark = np.full((text.shape[0], 30, 3), 255, np.uint8)
        mark[5:-5, 4:-4] = colour
        rows.append(beside([mark, text], 0))
    return below(rows)


def colour_bar(colours: Picture, ticks: Sequence[str], height: int) -> Picture:
    """Give a vertical bar of colours (n, 1, 3), the first at the bottom, with even ticks."""
    height = max(height, 2 * SIZE * len(ticks))
    room = SIZE
    bar = np.asarray(cv2.resize(colours[::-1], (28, height - 2 * room), interpolation=cv2.INTER_LINEAR), np.uint8)
    out = np.full((height, 160, 3), 255, np.uint8)
    out[room : height - room, 4:32] = bar
    for tick, y in zip(ticks, np.linspace(height - room - 1, room, len(ticks)).round().astype(int), strict=True):
        out[y, 32:40] = BLACK
        text = caption(tick, 116)
        top = min(max(0, y - text.shape[0] // 2), height - text.shape[0])
        out[top : top + text.shape[0], 44:] = text
    return out


def write_png(picture: Picture, path: str | Path) -> Path:
    """Write a picture as PNG.

    Raises `CallError` for a URL or another ending, `StoreError` where it can't be written.
    """
    if is_remote(path):
        raise CallError(f"{shown(str(path))} is a URL: pictures are written to a mounted disk.")
    path = local_path(path)
    if path.suffix.lower() != ".png":
        raise CallError(f"{path} does not end with .png: pictures are written as PNG.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    except OSError as e:
        raise StoreError(f"{path} can't be written ({e}): check the folder and its permissions.") from e
    return path
