"""The parts of `finemoe serve` in this process, for programs that look at them from within."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from finemoe.serving.app import service_of
from finemoe.serving.config import ServeConfig
from finemoe.serving.scheduler.worker import BatchingWorker
from finemoe.serving.server import Server, address_of, reserve
from finemoe.serving.state import AppState


@dataclass(frozen=True)
class Parts:
    """A server that does not run yet."""

    app_state: AppState
    worker: BatchingWorker
    server: Server
    taken: socket.socket

    @property
    def url(self) -> str:
        return address_of(self.taken)


@contextmanager
def server_parts(model: Any, config: ServeConfig) -> Iterator[Parts]:
    """As the command makes them, the live page included; the worker is closed in the end."""
    with closing(reserve(config)) as taken, service_of(model, config) as service:
        yield Parts(service.app_state, service.worker, Server(service.app, service.app_state), taken)


@contextmanager
def running(parts: Parts) -> Iterator[None]:
    """The server runs on a thread, until the block ends."""
    ready = threading.Event()
    thread = threading.Thread(target=parts.server.run, args=(parts.taken, ready.set), name="server")
    thread.start()
    if not ready.wait(60):
        raise SystemExit("the server does not start")
    try:
        yield
    finally:
        parts.server.stop()
        thread.join()
