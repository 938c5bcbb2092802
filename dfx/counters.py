"""Counters over a run's events, in the text format that Prometheus reads."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from dfx.errors import CallError
from dfx.run import BlockDone, Event, Planned, SlideDone, SlideFailed, Throttled, Timed

HELP = {
    "dfx_slides_planned_total": "Slides whose patches are known.",
    "dfx_slides_done_total": "Slides that are complete.",
    "dfx_slides_failed_total": "Slides that can't be done.",
    "dfx_patches_planned_total": "Patches of the slides that are planned.",
    "dfx_patches_resumed_total": "Patches that were there from an earlier run.",
    "dfx_patches_done_total": "Patches that were computed.",
    "dfx_blocks_done_total": "Blocks that were computed.",
    "dfx_throttled_total": "Times that something waited for memory, or ran alone.",
    "dfx_stage_seconds_total": "Seconds of all worker threads together, by stage.",
}


class Counters:
    """Counts what a run tells: `run(..., notify=counters)`. Safe to read while it runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()

    def __call__(self, event: Event) -> None:
        """Take an event of a run."""
        with self._lock:
            count = self._counts
            if isinstance(event, Planned):
                count["dfx_slides_planned_total", ""] += 1
                count["dfx_patches_planned_total", ""] += event.patches
                count["dfx_patches_resumed_total", ""] += event.done
            elif isinstance(event, BlockDone):
                count["dfx_blocks_done_total", ""] += 1
                count["dfx_patches_done_total", ""] += event.patches
            elif isinstance(event, SlideDone):
                count["dfx_slides_done_total", ""] += 1
            elif isinstance(event, SlideFailed):
                count["dfx_slides_failed_total", ""] += 1
            elif isinstance(event, Throttled):
                count["dfx_throttled_total", ""] += 1
            elif isinstance(event, Timed):
                for stage, seconds in event.seconds.items():
                    count["dfx_stage_seconds_total", f'{{stage="{stage}"}}'] += seconds  # type: ignore[assignment]

    def text(self) -> str:
        """Give all counters in Prometheus' text format."""
        with self._lock:
            counts = dict(self._counts)
        lines = []
        for name, said in HELP.items():
            lines += [f"# HELP {name} {said}", f"# TYPE {name} counter"]
            found = {labels: value for (known, labels), value in counts.items() if known == name}
            if not found and name != "dfx_stage_seconds_total":
                found = {"": 0}
            lines += [f"{name}{labels} {value:g}" for labels, value in sorted(found.items())]
        return "\n".join(lines) + "\n"


@contextmanager
def serve(counters: Counters, port: int) -> Iterator[int]:
    """Serve counters at http://HOST:port/metrics on every interface until the block ends; gives the port (0: any free).

    Raises `CallError` when it can't be had.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404)
                return
            body = counters.text().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing of every scrape."""

    try:
        server = ThreadingHTTPServer(("", port), Handler)
    except (OSError, OverflowError) as e:
        raise CallError(f"counters can't be served at port {port} ({e}): choose another --metrics-port.") from e
    with server:
        threading.Thread(target=server.serve_forever, name="dfx-metrics", daemon=True).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
