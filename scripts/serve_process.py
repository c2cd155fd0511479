"""`finemoe serve` in a process of its own, for programs that measure it; and what they write of it."""

from __future__ import annotations

import json
import math
import select
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

MAIN = "import sys; from finemoe.cli import main; sys.exit(main())"
_START_S = 600.0
_END_S = 120.0


@dataclass(frozen=True)
class ServerProcess:
    """A server that takes requests."""

    name: str  # of the model, in requests
    url: str
    pid: int
    start_s: float  # how long it took to come up
    said: list[str] = field(default_factory=list)  # further lines on its standard output, once it has ended

    def figures(self) -> dict[str, float]:
        """`/metrics` by name; of a sample with labels, their values follow: `finemoe_requests_total/finished`."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as page:
            families = list(text_string_to_metric_families(page.read().decode()))
        return {
            "/".join([sample.name, *sample.labels.values()]): sample.value
            for family in families
            for sample in family.samples
        }


@contextmanager
def serve_process(flags: Sequence[str], command: Sequence[str] = ("-c", MAIN, "serve")) -> Iterator[ServerProcess]:
    """A server on a free port, until the block ends; then it drains, and keeps what its policy learned.

    Raises:
        SystemExit: it does not come up; with the last of what it wrote.
    """
    with tempfile.TemporaryFile("w+") as errors:
        begin_s = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command, *flags, "--port", "0"], stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert process.stdout is not None
        try:
            ready, _, _ = select.select([process.stdout], [], [], _START_S)
            name, _, url = (process.stdout.readline() if ready else "").strip().rpartition(" at ")
            if not url:
                process.kill()
                process.wait()
                errors.seek(0)
                raise SystemExit(f"finemoe serve did not start: {errors.read().strip()[-2000:]}")
            server = ServerProcess(name, url, process.pid, time.perf_counter() - begin_s)
            yield server
            end(process)
            server.said.extend(process.stdout.read().splitlines())
        finally:
            end(process)
            process.stdout.close()


def end(process: subprocess.Popen[str]) -> None:
    """Ask a server to drain, and wait for it; not for ever."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def end_as_by_ctrl_c() -> None:
    """SIGTERM ends this program as Ctrl-C does: with its servers, and what was measured shown."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def came(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Of the experts, from figures before and after: `accesses`, `hit_rate`, `late_rate`, `miss_rate`, bytes, stall."""

    def grew(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    counts = [grew(f"finemoe_expert_accesses_total/{result}") for result in ("hit", "late", "miss")]
    accesses = sum(counts)
    hit, late, miss = (count / accesses if accesses else math.nan for count in counts)
    return {
        "accesses": accesses,
        "hit_rate": hit,
        "late_rate": late,
        "miss_rate": miss,
        "bytes_read": grew("finemoe_expert_read_bytes_total"),
        "stall_s": grew("finemoe_expert_stall_seconds_total"),
    }


def write_whole(report: Any, path: str | None) -> None:
    """Replace the file of a report by its present state, if there is to be one. NaN, "nothing there", becomes null."""
    if path is not None:
        partial = Path(f"{path}.part")
        partial.write_text(json.dumps(_plain(report), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def align(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def number(value: float | None, form: str, scale: float = 1.0) -> str:
    """A cell; `-` where there is nothing."""
    return "-" if value is None or math.isnan(value) else format(value * scale, form)


def tell(line: str) -> None:
    """Progress."""
    print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)
