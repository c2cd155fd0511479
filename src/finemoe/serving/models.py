"""`/v1/models`, the probes `/health` and `/ready`, and `/metrics`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from finemoe.serving.errors import ApiError, ResponseDocs, error_responses, model_failed
from finemoe.serving.protocol import Model, ModelList, Status
from finemoe.serving.state import AppState

_METRICS_RESPONSE: ResponseDocs = {200: {"content": {"text/plain": {}, "application/openmetrics-text": {}}}}


def routes(app_state: AppState) -> APIRouter:
    """The endpoints of `/v1/models`."""
    router = APIRouter()
    served = app_state.served
    model = Model(
        id=served.name,
        object="model",
        created=served.created_s,
        owned_by="finemoe",
        max_model_len=served.context_tokens,
    )

    @router.get("/v1/models", responses=error_responses(401))
    async def list_models() -> ModelList:
        """The served model, as a list."""
        return ModelList(object="list", data=[model])

    @router.get("/v1/models/{name:path}", responses=error_responses(401, 404))
    async def retrieve_model(name: str) -> Model:
        """The model, by its name."""
        if name != served.name:
            raise ApiError(
                404,
                f"there is no model {name!r}; this server has {served.name!r}",
                param="model",
                code="model_not_found",
            )
        return model

    return router


def probes(app_state: AppState) -> APIRouter:
    """`/health`, `/ready` and `/metrics`."""
    router = APIRouter()

    @router.get("/health", responses=error_responses(503))
    async def health() -> Status:
        """Whether the process responds and the model thread is alive."""
        if app_state.served.worker.failure() is not None:
            raise model_failed()
        return Status(status="ok")

    @router.get("/ready", responses=error_responses(503))
    async def ready() -> Status:
        """Whether requests are accepted: not during shutdown or after the model has failed."""
        if app_state.served.worker.failure() is not None:
            raise model_failed()
        if app_state.admission.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        return Status(status="ok")

    @router.get(
        "/metrics",
        responses=_METRICS_RESPONSE | error_responses(401),
        response_class=Response,
    )
    def metrics(request: Request) -> Response:  # sync, so on a thread: reading statistics waits for the running layer
        """Metrics in the text format of Prometheus or OpenMetrics."""
        text, content_type = app_state.metrics.render(request.headers.get("accept", ""))
        return Response(text, headers={"Content-Type": content_type})

    return router
