"""The page's routes in a bare application on a loopback port, with a chat whose answers the test sets."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from finemoe.serving.live import LiveSource, ProgressCounters, StatsProvider
from finemoe.serving.page import routes
from finemoe.serving.scheduler.job import WorkerLoad


@dataclass
class Page:
    """A page under test."""

    offload: StatsProvider
    progress: ProgressCounters = field(default_factory=ProgressCounters)
    load: WorkerLoad = field(default_factory=lambda: WorkerLoad(1, 2, 10, 10))
    key: str = ""
    answer: list[str] = field(default_factory=lambda: ["Hello", " there"])
    pause_s: float = 0.0  # before each piece
    refuse: tuple[int, str] | None = None  # status and message of the chat
    asked: list[dict[str, Any]] = field(default_factory=list)
    aborted: int = 0
    url: str = ""

    def app(self) -> FastAPI:
        app = FastAPI()
        app.include_router(routes(LiveSource(self.offload, self.progress, lambda: self.load)))

        @app.middleware("http")
        async def guard(request: Request, call_next: Callable[[Request], Any]) -> Response:
            if self.key and request.url.path.startswith("/v1") and not self._has_key(request):
                return JSONResponse({"error": {"message": "Incorrect API key provided."}}, 401)
            response: Response = await call_next(request)
            return response

        @app.get("/v1/models")
        def models() -> dict[str, Any]:
            return {"object": "list", "data": [{"id": "tiny", "object": "model"}]}

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            self.asked.append(await request.json())
            if self.refuse is not None:
                return JSONResponse({"error": {"message": self.refuse[1]}}, self.refuse[0])
            return StreamingResponse(self._stream(), media_type="text/event-stream")

        return app

    def _has_key(self, request: Request) -> bool:
        return request.headers.get("authorization") == f"Bearer {self.key}"

    def _stream(self) -> Iterator[str]:
        try:
            for piece in self.answer:
                time.sleep(self.pause_s)
                yield f"data: {json.dumps({'choices': [{'delta': {'content': piece}}]})}\n\n"
            yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': len(self.answer)}})}\n\n"
            yield "data: [DONE]\n\n"
        except GeneratorExit:
            self.aborted += 1
            raise


@contextmanager
def serve_app(app: Any) -> Iterator[str]:
    """Serves `app` on a thread; yields its URL."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
