"""uvicorn on a reserved socket, with graceful shutdown: refuse new requests, finish running ones, then exit."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from finemoe.errors import ConfigError
from finemoe.serving.config import ServeConfig
from finemoe.serving.middleware import log
from finemoe.serving.state import AppState

_CLOSE_TIMEOUT_S = 5  # for sending the rest of responses once all answers have ended


def reserve(config: ServeConfig) -> socket.socket:
    """Binds a socket to the configured address without listening yet; done before the slow loading of the model.

    Raises:
        ConfigError: the address is not this machine's, or the port is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(f"--host: {config.host!r} is not an address of this machine ({error.strerror})") from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        if config.port:
            raise ConfigError(
                f"--port: can't listen on {config.host} port {config.port} ({os.strerror(error.errno or 0)}); "
                "give another, or 0 for a free one"
            ) from error
        raise ConfigError(f"--host: can't listen on {config.host} ({os.strerror(error.errno or 0)})") from error
    return bound


def address_of(bound: socket.socket) -> str:
    """The URL `http://host:port` of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def read_api_key(config: ServeConfig) -> str | None:
    """The API key from `--api-key-file`, or else from `FINEMOE_API_KEY`; `None` if neither is set.

    Raises:
        ConfigError: the file can't be read, or the file or variable has no valid key.
    """
    if config.api_key_file is not None:
        where = "--api-key-file"
        try:
            key = Path(config.api_key_file).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not text"
            raise ConfigError(f"--api-key-file: can't read {config.api_key_file} ({reason})") from error
    elif "FINEMOE_API_KEY" in os.environ:
        where, key = "FINEMOE_API_KEY", os.environ["FINEMOE_API_KEY"].strip()
    else:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{where}: holds no key; a key is one word of printable ASCII")
    return key


class Server:
    """Serves until SIGTERM or SIGINT, then drains; a second signal cancels running requests.

    Args:
        app: the ASGI application.
        app_state: its state.

    Attributes:
        signal: the number of the first signal, if any.
    """

    def __init__(self, app: ASGIApp, app_state: AppState) -> None:
        self._app_state = app_state
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="on",
                server_header=False,
                timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
                ws="none",
            ),
            self._on_signal,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain_task: asyncio.Task[None] | None = None
        self.signal: int | None = None

    def run(self, bound: socket.socket, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serves on a socket; returns after shutdown.

        Args:
            bound: from `reserve`.
            on_ready: called once requests are accepted.
        """
        asyncio.run(self._run(bound, on_ready))

    def stop(self) -> None:
        """Starts the shutdown. Thread-safe."""
        assert self._loop is not None, "the server is not running"
        self._loop.call_soon_threadsafe(self._start_drain)

    async def _run(self, bound: socket.socket, on_ready: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._uvicorn.on_ready = on_ready
        await self._uvicorn.serve([bound])
        self._app_state.prompts.close()

    def _on_signal(self, number: int) -> None:
        if self.signal is not None:
            self._uvicorn.force_exit = self._uvicorn.should_exit = True
            return
        self.signal = number
        self.stop()

    def _start_drain(self) -> None:
        if self._drain_task is None:
            self._drain_task = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        admission, limit_s = self._app_state.admission, self._app_state.served.config.drain_timeout_s
        log("draining", answers=admission.answers, timeout_s=limit_s)
        finished = await admission.drain(limit_s)
        log("drained", finished=finished, answers=admission.answers)
        if not finished:  # the remaining answers end with an error
            await asyncio.to_thread(self._app_state.served.worker.drain, 0.0)
        self._uvicorn.should_exit = True


class _Uvicorn(uvicorn.Server):
    """Keeps the sockets open while draining, so that new requests get 503; uvicorn would close them at the signal."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[int], None]) -> None:
        super().__init__(config)
        self._on_signal = on_signal
        self.on_ready: Callable[[], None] = lambda: None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:  # another process took the port meanwhile
            raise ConfigError(f"--port: can't listen ({os.strerror(error.errno or 0)}); give another") from error
        self.on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        self._on_signal(sig)


def ended_by_ctrl_c(server: Server) -> bool:
    """Whether the server was stopped by Ctrl-C (SIGINT)."""
    return server.signal == signal.SIGINT
