"""`/v1/models`, and what probes and scrapers ask."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from finemoe.serving.errors import ApiError, Responses, model_failed, refusals
from finemoe.serving.protocol import Model, ModelList, Status
from finemoe.serving.state import AppState

_FIGURES: Responses = {200: {"content": {"text/plain": {}, "application/openmetrics-text": {}}}}


def routes(app_state: AppState) -> APIRouter:
    """The endpoints."""
    router = APIRouter()
    served = app_state.served
    model = Model(
        id=served.name,
        object="model",
        created=served.created_s,
        owned_by="finemoe",
        max_model_len=served.context_tokens,
    )

    @router.get("/v1/models", responses=refusals(401))
    async def list_models() -> ModelList:
        """The one model that is served."""
        return ModelList(object="list", data=[model])

    @router.get("/v1/models/{name:path}", responses=refusals(401, 404))
    async def retrieve_model(name: str) -> Model:
        """The model, by its name."""
        if name != served.name:
            raise ApiError(
                404, f"there is no {name!r} here, only {served.name!r}", param="model", code="model_not_found"
            )
        return model

    return router


def probes(app_state: AppState) -> APIRouter:
    """`/health`, `/ready` and `/metrics`."""
    router = APIRouter()

    @router.get("/health", responses=refusals(503))
    async def health() -> Status:
        """Whether the process answers, and its model's thread is alive."""
        if app_state.served.worker.failure() is not None:
            raise model_failed()
        return Status(status="ok")

    @router.get("/ready", responses=refusals(503))
    async def ready() -> Status:
        """Whether requests are taken: not any more once the server is shutting down, or its model has failed."""
        if app_state.served.worker.failure() is not None:
            raise model_failed()
        if app_state.admission.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        return Status(status="ok")

    @router.get(
        "/metrics",
        responses=_FIGURES | refusals(401),
        response_class=Response,
    )
    def metrics(request: Request) -> Response:  # in a thread: the pool's figures wait for the layer that runs
        """Figures in Prometheus' or OpenMetrics' text format."""
        text, content_type = app_state.metrics.page(request.headers.get("accept", ""))
        return Response(text, headers={"Content-Type": content_type})

    return router
