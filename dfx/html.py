"""Small HTML: tables and pictures within a page. Whatever it is given is escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape

import cv2
import numpy as np
from numpy.typing import NDArray


def table(title: str, rows: Mapping[str, object], picture: NDArray[np.uint8] | None = None) -> str:
    """Give a titled table of names and values, beside a picture where there is one."""
    lines = "".join(f"<tr>{cell('th', name)}{cell('td', value)}</tr>" for name, value in rows.items())
    beside = "" if picture is None else image(picture, title)
    text = f"<div><b>{escape(title)}</b><table>{lines}</table></div>"
    return f'<div style="display:flex;gap:1em;align-items:flex-start">{beside}{text}</div>'


def cell(kind: str, value: object) -> str:
    """Give a cell of a table."""
    return f'<{kind} style="text-align:left">{escape(str(value))}</{kind}>'


def image(picture: NDArray[np.uint8], alternative: str) -> str:
    """Give a picture, uint8 RGB, as an element that holds its own bytes (JPEG)."""
    ok, data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])
    assert ok  # any uint8 RGB can be
    source = base64.b64encode(data.tobytes()).decode()
    return f'<img alt="{escape(alternative)}" src="data:image/jpeg;base64,{source}">'
