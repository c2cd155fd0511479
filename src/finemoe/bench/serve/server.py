"""The server under test: `finemoe serve` in a process of its own, or its parts in this one.

Run as a module it is a server that inspects itself once it has drained, for the soak test.
"""

from __future__ import annotations

import json
import math
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from finemoe.config import LoadConfig
from finemoe.errors import BenchmarkError
from finemoe.model import load_config as load
from finemoe.serving.app import Service, service_of
from finemoe.serving.config import ServeConfig
from finemoe.serving.middleware import log_to_stderr
from finemoe.serving.server import Server, address_of, reserve
from finemoe.system import return_freed_memory, unmap_idle_code

_START_S = 600.0
_END_S = 120.0


@dataclass(frozen=True)
class ServerProcess:
    """A server that takes requests."""

    name: str  # of the model, in requests
    url: str
    pid: int
    start_s: float  # until it took requests
    output: list[str] = field(default_factory=list)  # further lines of its standard output, once it has ended

    def metrics(self) -> dict[str, float]:
        """`/metrics` by name; a sample's labels follow its name: `finemoe_requests_total/finished`."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as page:  # noqa: S310 - our own URL
            families = list(text_string_to_metric_families(page.read().decode()))
        return {
            "/".join([sample.name, *sample.labels.values()]): sample.value
            for family in families
            for sample in family.samples
        }


@contextmanager
def serve_process(flags: Sequence[str]) -> Iterator[ServerProcess]:
    """`finemoe serve` on a free port until the block ends; then it drains, and its policy's maps are saved.

    Raises:
        BenchmarkError: it does not start; with the end of its standard error.
    """
    with _started(["-m", "finemoe", "serve", *flags, "--port", "0"]) as server:
        yield server


@contextmanager
def inspected_process(load_config: LoadConfig, config: ServeConfig) -> Iterator[ServerProcess]:
    """The same, and it inspects itself once it has drained: its last line of output is `serve_and_inspect` as JSON."""
    settings = [json.dumps(asdict(load_config)), json.dumps(asdict(replace(config, port=0)))]
    with _started(["-m", "finemoe.bench.serve.server", *settings]) as server:
        yield server


@contextmanager
def _started(arguments: Sequence[str]) -> Iterator[ServerProcess]:
    with tempfile.TemporaryFile("w+") as errors:
        begin_s = time.perf_counter()
        process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        try:
            ready, _, _ = select.select([process.stdout], [], [], _START_S)
            name, _, url = (process.stdout.readline() if ready else "").strip().rpartition(" at ")
            if not url:
                process.kill()
                process.wait()
                errors.seek(0)
                raise BenchmarkError(f"finemoe serve did not start: {' '.join(errors.read().split())[-2000:]}")
            server = ServerProcess(name, url, process.pid, time.perf_counter() - begin_s)
            yield server
            _end(process)
            server.output.extend(process.stdout.read().splitlines())
        finally:
            _end(process)
            process.stdout.close()


def _end(process: subprocess.Popen[str]) -> None:
    """Lets a server drain; kills it if that takes too long."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def expert_metrics(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """`accesses`, `hit_rate`, `late_rate`, `miss_rate`, `bytes_read` and `stall_s` between two states of metrics."""

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    counts = [grown(f"finemoe_expert_accesses_total/{result}") for result in ("hit", "late", "miss")]
    accesses = sum(counts)
    hit, late, miss = (count / accesses if accesses else math.nan for count in counts)
    return {
        "accesses": accesses,
        "hit_rate": hit,
        "late_rate": late,
        "miss_rate": miss,
        "bytes_read": grown("finemoe_expert_read_bytes_total"),
        "stall_s": grown("finemoe_expert_stall_seconds_total"),
    }


@contextmanager
def serving(model: Any, config: ServeConfig) -> Iterator[tuple[Service, str]]:
    """A server on a thread of this process, over a loaded model, until the block ends; and its URL."""
    with closing(reserve(config)) as taken, service_of(model, config) as service:
        server, ready = Server(service.app, service.app_state), threading.Event()
        thread = threading.Thread(target=server.run, args=(taken, ready.set), name="server")
        thread.start()
        if not ready.wait(60):
            raise BenchmarkError("the server did not start within a minute")
        try:
            yield service, address_of(taken)
        finally:
            server.stop()
            thread.join()


def serve_and_inspect(load_config: LoadConfig, config: ServeConfig) -> dict[str, Any]:
    """Serves until SIGTERM, drains, and counts what is left.

    Returns:
        `running`, `waiting`: answers; `held_blocks`: of the key-value cache; `pinned`: experts; `integrity`: `holds`,
        or what is wrong with the expert pool; `failure`: of the worker, or `None`.
    """
    with load(load_config) as model:
        with closing(reserve(config)) as taken, service_of(model, config) as service:
            unmap_idle_code()
            ready = f"{service.app_state.served.name} at {address_of(taken)}"
            Server(service.app, service.app_state).run(taken, lambda: _write_line(ready))
            work, failure = service.worker.load(), service.worker.failure()
        pinned = int(model.finemoe.experts().pinned.sum())
        try:
            model.finemoe.check_integrity()
            integrity = "holds"
        except Exception as error:  # noqa: BLE001 - reported, whatever it is
            integrity = str(error)
    return {
        "running": work.running,
        "waiting": work.waiting,
        "held_blocks": work.cache_blocks - work.free_cache_blocks,
        "pinned": pinned,
        "integrity": integrity,
        "failure": failure,
    }


def _write_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(load_config: str, config: str) -> None:
    """Serves with settings as JSON objects, and prints what is left."""
    return_freed_memory()
    log_to_stderr()
    left = serve_and_inspect(LoadConfig(**json.loads(load_config)), ServeConfig(**json.loads(config)))
    _write_line(json.dumps(left))


if __name__ == "__main__":
    main(*sys.argv[1:])
