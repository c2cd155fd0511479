"""The FastAPI application: endpoints, and the gate around them."""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import APIRouter, Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from finemoe import __version__
from finemoe.serving import chat, completions, models
from finemoe.serving.errors import on_http_exception, on_invalid_request
from finemoe.serving.gate import Gate
from finemoe.serving.house import House


def make_app(house: House, *, api_key: str | None = None, routers: Iterable[APIRouter] = ()) -> FastAPI:
    """The server's application.

    Args:
        house: what the endpoints work with.
        api_key: that requests must carry; `None` for none.
        routers: of further endpoints. Those below `/v1/` ask for the key too.
    """
    app = FastAPI(
        title="finemoe",
        version=__version__,
        summary="OpenAI's API, for Mixture-of-Experts models from a device too small for them",
        docs_url=None,  # both pages load their scripts from elsewhere
        redoc_url=None,
        exception_handlers={HTTPException: on_http_exception, RequestValidationError: on_invalid_request},
    )
    # the gate checks keys before it reads a body; this only tells the OpenAPI document of it
    keyed = [Depends(HTTPBearer(auto_error=False, description="where the server asks for a key"))]
    for routes in (chat.routes(house), completions.routes(house), models.routes(house)):
        app.include_router(routes, dependencies=keyed)
    app.include_router(models.probes(house))
    for router in routers:
        app.include_router(router)
    app.add_middleware(Gate, house=house, api_key=api_key)
    return app
