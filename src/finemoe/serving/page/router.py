"""Endpoints of the live page: its static files, the state of all experts, and live measurements."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Query, Request, Response

from finemoe.serving.errors import ApiError, error_responses
from finemoe.serving.live import INTERVAL_S, LiveSampler, LiveSource
from finemoe.serving.model_info import default_model_name
from finemoe.serving.page.schemas import Experts, Now, SinceSnapshot, SinceTime
from finemoe.serving.page.snapshots import SnapshotCache

_FILE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # revalidate each time; 304 until finemoe is updated
}
_MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def routes(source: LiveSource) -> APIRouter:
    """The endpoints. Sampling runs while the application runs.

    Turns on counting per expert (`ModelHandle.watch`), which stays on.
    """
    source.offload.watch()
    live, files = LiveSampler(source), _read_files()
    snapshots = SnapshotCache(source.offload.experts)

    @asynccontextmanager
    async def sampling(_: object) -> AsyncIterator[None]:
        live.start()
        try:
            yield
        finally:
            live.stop()

    router = APIRouter(lifespan=sampling)

    @router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    def page(request: Request) -> Response:
        return files["index.html"].response(request)

    @router.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    def file(request: Request, name: str) -> Response:
        if name not in files:
            raise ApiError(404, f"the page has no file {name!r}")
        return files[name].response(request)

    @router.get("/v1/experts", response_model=Experts, responses=error_responses(400, 401))
    def experts(asked: Annotated[SinceSnapshot, Query()]) -> Response:
        """The current state of every expert, and counts of its accesses."""
        return _json_response(snapshots.since(asked.since))

    @router.get("/v1/live", response_model=Now, responses=error_responses(400, 401))
    def now(asked: Annotated[SinceTime, Query()]) -> Response:
        """Totals, and the last ten minutes second by second."""
        stats = source.offload.stats().as_dict()
        stats["model"] = source.name or default_model_name(stats["model"])
        chosen = {name: stats[name] for name in Now.model_fields if name in stats}
        return _json_response(chosen | {"interval_s": INTERVAL_S, "samples": live.since(asked.since)})

    return router


class StaticFile(NamedTuple):
    """A file of the page."""

    content: bytes
    media_type: str
    etag: str

    def response(self, request: Request) -> Response:
        """The file; 304 if the client's copy (`If-None-Match`) is current."""
        headers = _FILE_HEADERS | {"etag": self.etag}
        tags = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self.etag in tags or "*" in tags:
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


def _read_files() -> dict[str, StaticFile]:
    """The files in `static` by name."""
    files = {}
    for path in resources.files("finemoe.serving.page").joinpath("static").iterdir():
        media_type = _MEDIA_TYPES.get(path.name.rpartition(".")[2])
        if media_type is not None:
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            files[path.name] = StaticFile(content, f"{media_type}; charset=utf-8", etag)
    return files


def _json_response(content: dict[str, Any]) -> Response:
    """JSON without pydantic's validation: there may be a hundred thousand numbers, twice per second."""
    return Response(
        json.dumps(content, separators=(",", ":"), allow_nan=False),
        media_type="application/json",
        headers={"cache-control": "no-store"},
    )
