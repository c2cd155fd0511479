"""The live page `/`, and the state that it shows: `/v1/experts` and `/v1/live`."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from finemoe.serving.documents import refusals
from finemoe.serving.errors import ApiError
from finemoe.serving.live import INTERVAL_S, Live, Source
from finemoe.serving.page.answers import Experts, Now, SinceSnapshot, SinceTime
from finemoe.serving.page.files import read_files
from finemoe.serving.page.snapshots import Snapshots
from finemoe.serving.served import own_name


def routes(source: Source) -> APIRouter:
    """The page and its data. Sampling runs from the application's start to its end.

    From now on the model counts every expert on its own.
    """
    source.offload.watch()
    live, files = Live(source), read_files()
    snapshots = Snapshots(source.offload.experts)

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

    @router.get("/v1/experts", response_model=Experts, responses=refusals(400, 401))
    def experts(asked: Annotated[SinceSnapshot, Query()]) -> Response:
        """Where every expert is now, and what its accesses found."""
        return _as_json(snapshots.since(asked.since))

    @router.get("/v1/live", response_model=Now, responses=refusals(400, 401))
    def now(asked: Annotated[SinceTime, Query()]) -> Response:
        """Totals, and the last ten minutes second by second."""
        stats = source.offload.stats().as_dict()
        stats["model"] = source.name or own_name(stats["model"])
        chosen = {name: stats[name] for name in Now.model_fields if name in stats}
        return _as_json(chosen | {"interval_s": INTERVAL_S, "samples": live.since(asked.since)})

    return router


def _as_json(content: dict[str, Any]) -> Response:
    """Without the models' validation: there may be a hundred thousand numbers, twice a second."""
    return Response(
        json.dumps(content, separators=(",", ":"), allow_nan=False),
        media_type="application/json",
        headers={"cache-control": "no-store"},
    )
