"""Builds the FastAPI application, and opens a complete service: model, worker, application, map exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from finemoe import __version__
from finemoe.config import LoadConfig
from finemoe.errors import ConfigError
from finemoe.gguf.locate import refuse_gguf
from finemoe.learned import NO_MAP_STORE, FolderMaps, SharedMaps
from finemoe.model import load_config as load
from finemoe.model.generation import load_tokenizer
from finemoe.policy import policy_class
from finemoe.serving import chat, completions, models
from finemoe.serving.config import ServeConfig
from finemoe.serving.errors import on_http_exception, on_invalid_request
from finemoe.serving.live import LiveSource, ProgressCounters
from finemoe.serving.map_exchange import MapExchange
from finemoe.serving.middleware import ApiMiddleware
from finemoe.serving.model_info import served_model
from finemoe.serving.page import routes
from finemoe.serving.scheduler.worker import BatchingWorker
from finemoe.serving.state import AppState

OpenStore = Callable[[], SharedMaps]


@dataclass(frozen=True)
class Service:
    """A loaded model and everything that serves it, except the HTTP server."""

    app: FastAPI
    app_state: AppState
    worker: BatchingWorker
    model: Any


@contextmanager
def open_service(
    load_config: LoadConfig,
    config: ServeConfig,
    api_key: str | None = None,
    *,
    store: OpenStore | None = None,
    page: bool = True,
) -> Iterator[Service]:
    """Loads a model and sets up its service; closes both at the end.

    Args:
        load_config: of the model. If maps are shared, they are saved to a file only if `map_store` names one.
        config: of the server.
        api_key: required from clients; `None` for no key.
        store: opens the store of shared maps; replaces `config.shared_maps`.
        page: whether to serve the live page and its data.

    Raises:
        FinemoeError: the model can't be loaded, or the policy has no maps to share.
    """
    shares_maps = store is not None or config.shared_maps is not None
    if shares_maps:
        check_policy_shares_maps(load_config.policy)
        if load_config.map_store is None:
            load_config = replace(load_config, map_store=NO_MAP_STORE)
    refuse_gguf(load_config.model, "serve")
    with load(load_config) as model:
        if store is None and config.shared_maps is not None:
            store = _folder_store(model, config.shared_maps, config.max_shared_maps)
        with service_of(model, config, api_key, page=page) as service:
            if store is None:
                yield service
                return
            with closing(MapExchange(model.finemoe, service.worker, store(), config.share_every_s)) as exchange:
                exchange.start()
                yield service


@contextmanager
def service_of(model: Any, config: ServeConfig, api_key: str | None = None, *, page: bool = True) -> Iterator[Service]:
    """Sets up the service of a loaded model; closes it, but not the model, at the end. See `open_service`."""
    tokenizer = load_tokenizer(model.finemoe.checkpoint.folder)
    with closing(BatchingWorker(model, config)) as worker:
        progress = ProgressCounters()
        app_state = AppState(served_model(model, tokenizer, worker, config, worker.capacity_tokens), progress)
        routers = [routes(LiveSource(model.finemoe, progress, worker.load, app_state.served.name))] if page else []
        yield Service(make_app(app_state, api_key=api_key, routers=routers), app_state, worker, model)


def make_app(app_state: AppState, *, api_key: str | None = None, routers: Iterable[APIRouter] = ()) -> FastAPI:
    """The FastAPI application.

    Args:
        app_state: shared by the endpoints.
        api_key: required from clients; `None` for no key.
        routers: further endpoints; those below `/v1/` require the key too.
    """
    app = FastAPI(
        title="finemoe",
        version=__version__,
        summary="OpenAI's API, for Mixture-of-Experts models from a device too small for them",
        docs_url=None,  # both pages load scripts from other hosts
        redoc_url=None,
        exception_handlers={HTTPException: on_http_exception, RequestValidationError: on_invalid_request},
    )
    # Only documents the key in OpenAPI: the middleware checks it, before a body is read.
    keyed = [Depends(HTTPBearer(auto_error=False, description="if the server requires a key"))]
    for keyed_router in (chat.routes(app_state), completions.routes(app_state), models.routes(app_state)):
        app.include_router(keyed_router, dependencies=keyed)
    app.include_router(models.probes(app_state))
    for router in routers:
        app.include_router(router)
    app.add_middleware(ApiMiddleware, app_state=app_state, api_key=api_key)
    return app


def check_policy_shares_maps(policy: str) -> None:
    """Raises `ConfigError` if a policy learns no maps."""
    if not policy_class(policy).is_persistent:
        raise ConfigError(f"--shared-maps: --policy {policy} learns no maps that could be shared; leave it out")


def _folder_store(model: Any, url: str, limit: int) -> OpenStore:
    handle = model.finemoe
    return lambda: FolderMaps(url, handle.fingerprint, handle.policy.partition("/")[0], limit)
