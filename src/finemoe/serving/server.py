"""uvicorn on a socket of our own, and an orderly end: no new requests, those at hand finish, then the process ends."""

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

_CLOSING_S = 5  # for responses that are on the wire when all answers have ended


def reserve(config: ServeConfig) -> socket.socket:
    """A socket at the configured address, reserved before a model is loaded for it; nobody can connect yet.

    Raises:
        ConfigError: the address is not this machine's, or the port is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(f"--host: {config.host!r} is no address of this machine ({error.strerror})") from error
    taken = socket.socket(family, kind, protocol)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        taken.close()
        if config.port:
            raise ConfigError(
                f"--port: can't listen on {config.host} port {config.port} ({os.strerror(error.errno or 0)}); "
                "give another, or 0 for a free one"
            ) from error
        raise ConfigError(f"--host: can't listen on {config.host} ({os.strerror(error.errno or 0)})") from error
    return taken


def address_of(taken: socket.socket) -> str:
    """`http://host:port`."""
    host, port = taken.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def read_api_key(config: ServeConfig) -> str | None:
    """The key that requests must carry: from `--api-key-file`, or else `FINEMOE_API_KEY`; `None` for none.

    Raises:
        ConfigError: the file can't be read, or what it or the variable holds is no key.
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
        raise ConfigError(f"{where}: holds no key; one word of printable ASCII is one")
    return key


class Server:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends what still runs.

    Args:
        app: the application.
        house: what it works with.
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
                timeout_graceful_shutdown=_CLOSING_S,
                ws="none",
            ),
            self._on_signal,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self.signal: int | None = None  # that ended it

    def run(self, taken: socket.socket, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve on a socket; returns when all is over.

        Args:
            taken: from `reserve`.
            on_ready: called once requests are taken.
        """
        asyncio.run(self._run(taken, on_ready))

    def stop(self) -> None:
        """Begin to drain. From any thread."""
        assert self._loop is not None, "runs"
        self._loop.call_soon_threadsafe(self._drain)

    async def _run(self, taken: socket.socket, on_ready: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._uvicorn.on_ready = on_ready
        await self._uvicorn.serve([taken])
        self._app_state.prompts.close()

    def _on_signal(self, number: int) -> None:
        if self.signal is not None:
            self._uvicorn.force_exit = self._uvicorn.should_exit = True
            return
        self.signal = number
        self.stop()

    def _drain(self) -> None:
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drained())

    async def _drained(self) -> None:
        admission, limit_s = self._app_state.admission, self._app_state.served.config.drain_timeout_s
        log("draining", answers=admission.answers, timeout_s=limit_s)
        finished = await admission.drained(limit_s)
        log("drained", finished=finished, answers=admission.answers)
        if not finished:  # answers that take longer hear that the server has shut down
            await asyncio.to_thread(self._app_state.served.worker.drain, 0.0)
        self._uvicorn.should_exit = True


class _Uvicorn(uvicorn.Server):
    """uvicorn closes its sockets at the first signal, so that new requests are cut off; here they are answered 503."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[int], None]) -> None:
        super().__init__(config)
        self._on_signal = on_signal
        self.on_ready: Callable[[], None] = lambda: None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:  # another process was faster
            raise ConfigError(f"--port: can't listen ({os.strerror(error.errno or 0)}); give another") from error
        self.on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - theirs
        self._on_signal(sig)


def ended_by_ctrl_c(server: Server) -> bool:
    """Whether somebody at the terminal ended a server."""
    return server.signal == signal.SIGINT
