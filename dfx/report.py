"""A folder of stores as one HTML page that needs nothing else: a row and a picture a slide."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from dfx import html
from dfx.errors import CallError, DfxError, StoreError
from dfx.pictures import Scene
from dfx.remote import is_remote, local_path, shown
from dfx.store import Status, dfx_attributes, encoders_in, place_of, read_notes, statuses, stored_mask, stored_slide

STAGES = ("read", "encode")
"""In the order of the columns; seconds of all threads, the wait for the device is in the last."""
PICTURE = 160
"""Pixels of a picture's longer side."""

STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em; color: #1e1e1e }
table { border-collapse: collapse } td, th { padding: .4em .8em; text-align: left; vertical-align: top }
tbody tr { border-top: 1px solid #ccc } td.number { text-align: right; font-variant-numeric: tabular-nums }
th button { font: inherit; font-weight: bold; border: 0; background: none; padding: 0; cursor: pointer }
th[aria-sort=ascending] button::after { content: " \\25B2" }
th[aria-sort=descending] button::after { content: " \\25BC" }
td.failed { color: #a00000; font-weight: bold } td.partial { color: #8a5a00; font-weight: bold }
td.complete { color: #00613a }
td.said { max-width: 32em; overflow-wrap: anywhere } td.slide { max-width: 24em; overflow-wrap: anywhere }
img { display: block }
small { color: #5a5a5a }
"""
SCRIPT = """
const heads = [...document.querySelectorAll("thead th")], body = document.querySelector("tbody");
heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
  const down = head.getAttribute("aria-sort") === "ascending";
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const order = (a, b) => value(a).localeCompare(value(b), undefined, { numeric: true });
  const rows = [...body.rows].sort((a, b) => down ? order(b, a) : order(a, b));
  heads.forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...rows);
}));
"""


@dataclass(frozen=True)
class Row:
    """What the page says of a slide."""

    status: Status
    """How far its store is."""
    said: dict[str, Any]
    """What the store says of itself, and what its blocks noted."""
    picture: NDArray[np.uint8] | None
    """Its thumbnail with the outline of tissue."""
    unseen: str
    """Why there is none."""

    @classmethod
    def of(cls, status: Status, *, pictures: bool, storage_options: Mapping[str, Any] | None = None) -> Row:
        """Read what a store says; its slide is opened for a picture."""
        place = place_of(status.path, storage_options)
        said = dfx_attributes(place) or {}
        try:
            said |= read_notes(place, said)
            if not pictures:
                return cls(status, said, None, "")
            slide = stored_slide(status.path, said, storage_options=storage_options)
            mask = stored_mask(zarr.open_group(place.zarr(), mode="r", zarr_format=3))
            return cls(status, said, Scene.of(slide, np.empty((0, 4)), mask, PICTURE).outlined(), "")
        except (DfxError, OSError, KeyError, ValueError) as e:  # the page is about the stores that are there
            return cls(status, said, None, f"no picture: {e}")

    @property
    def seconds(self) -> dict[str, float]:
        """Of each stage."""
        found: dict[str, float] = self.said.get("seconds", {})
        return found

    @property
    def patches(self) -> int:
        """How many there are; of loose patches none is known."""
        return int(self.said.get("fingerprint", {}).get("patches", 0))

    @property
    def encoders(self) -> str:
        """Names, and which have random weights."""
        several = self.said.get("encoders") or {"": self.said.get("encoder", {})}
        names = encoders_in(self.said) if "encoder" in self.said or "encoders" in self.said else []
        random = [said.get("weights") == "random" for said in several.values()]
        return ", ".join(f"{n}{' (random weights)' if r else ''}" for n, r in zip(names, random, strict=False))

    @property
    def warnings(self) -> list[str]:
        """What a user should know."""
        damaged, batches = self.said.get("damaged_tiles", []), self.said.get("batches", {})
        found = [self.status.reason] if self.status.reason and not damaged else []
        if damaged:
            more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
            found.append(f"{len(damaged)} damaged tiles left white: {'; '.join(damaged[:3])}{more}")
        if batches:
            found.append(f"{len(batches)} blocks with smaller batches, the smallest of {min(batches.values())} patches")
        if not self.patches and "slide" in self.said:
            found.append("no patch under its mask")
        return [*found, *self.said.get("slide", {}).get("notes", [])]


def write_report(
    folder: str | Path,
    out: str | Path,
    *,
    pictures: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> Path:
    """Write a page on the stores of a folder, given by its path or URL; gives the page's path.

    `pictures`: slides that are still there are opened for a thumbnail. `storage_options`: of the file systems of
    folder and slides, as in `open_slide`. Raises `StoreError` when the folder has no
    store of dfx, or the page can't be written; `CallError` when `out` is a URL or does not end with .html.
    """
    if is_remote(out):
        raise CallError(f"{shown(str(out))} is a URL: a report is written to a mounted disk.")
    out = local_path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise CallError(f"{out} does not end with .html: a report is an HTML page.")
    place = place_of(folder, storage_options)
    ours = [status for status in statuses(place) if status.state != "foreign"]
    if not ours:
        raise StoreError(f"{place} has no store of dfx: give the folder that a run wrote to.")
    rows = [Row.of(status, pictures=pictures, storage_options=storage_options) for status in ours]
    text = page(str(place.output.absolute() if isinstance(place.output, Path) else place), rows)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as e:
        raise StoreError(f"{out} can't be written ({e}): check the folder and its permissions.") from e
    return out


def page(folder: str, rows: Sequence[Row]) -> str:
    """Give the page. It loads nothing, and runs no script but its own."""
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script}'"
    names = ["slide", "status", "patches", *(f"{stage}, s" for stage in STAGES), "encoder", "to know"]
    heads = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in names)
    lines = "\n".join(map(line, rows))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(folder)}</title><style>{STYLE}</style></head>
<body><h1>{escape(folder)}</h1><p>{escape(totals(rows))}</p>
<table><thead><tr><th scope="col">picture</th>{heads}</tr></thead>
<tbody>
{lines}
</tbody></table>
<p><small>dfx {escape(version("dfx"))}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. Seconds are those of all threads;
waiting for the device is part of encoding. Columns sort by a click on their names.</small></p>
<script>{SCRIPT}</script></body></html>
"""


def totals(rows: Sequence[Row]) -> str:
    """Sum the rows up in a sentence."""
    states = Counter(row.status.state for row in rows)
    seconds: Counter[str] = Counter()
    for row in rows:
        seconds.update(row.seconds)
    parts = [f"{len(rows)} slides: {', '.join(f'{n} {state}' for state, n in states.items())}"]
    parts.append(f"{sum(row.patches for row in rows):,} patches")
    parts += [f"{stage} {seconds[stage]:,.1f} s" for stage in STAGES if stage in seconds]
    return "; ".join(parts)


def line(row: Row) -> str:
    """Give a row of the table."""
    status, said = row.status, row.said
    url = said.get("slide", {}).get("url", "loose patches")
    state = status.state + (
        f", {status.done} of {status.blocks} blocks" if status.blocks and status.state != "complete" else ""
    )
    picture = f"<small>{escape(row.unseen)}</small>" if row.picture is None else html.image(row.picture, url)
    cells = [
        f"<td>{picture}</td>",
        f'<td class="slide">{escape(status.name.removesuffix(".zarr"))}<br><small>{escape(url)}</small></td>',
        f'<td class="{status.state}">{escape(state)}</td>',
        number(row.patches, f"{row.patches:,}"),
        *(number(row.seconds.get(stage, 0), f"{row.seconds.get(stage, 0):,.1f}") for stage in STAGES),
        f"<td>{escape(row.encoders)}</td>",
        f'<td class="said">{"<br>".join(map(escape, row.warnings))}</td>',
    ]
    return f"<tr>{''.join(cells)}</tr>"


def number(value: float, shown: str) -> str:
    """Give a cell that is sorted by its value."""
    return f'<td class="number" data-value="{value}">{escape(shown)}</td>'
