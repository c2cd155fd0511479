"""A loaded model with all that serves it, but for the HTTP server in front."""

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
from finemoe.serving.live import LiveSource, Progress
from finemoe.serving.map_exchange import Sharing
from finemoe.serving.middleware import Gate
from finemoe.serving.model_info import served
from finemoe.serving.page import routes
from finemoe.serving.scheduler.worker import BatchingWorker
from finemoe.serving.state import AppState


def make_app(app_state: AppState, *, api_key: str | None = None, routers: Iterable[APIRouter] = ()) -> FastAPI:
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
    for keyed_router in (chat.routes(app_state), completions.routes(app_state), models.routes(app_state)):
        app.include_router(keyed_router, dependencies=keyed)
    app.include_router(models.probes(app_state))
    for router in routers:
        app.include_router(router)
    app.add_middleware(Gate, app_state=app_state, api_key=api_key)
    return app


OpenStore = Callable[[], SharedMaps]


@dataclass(frozen=True)
class Service:
    """What runs."""

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
    """Loads a model and sets up all that serves it; closes both afterwards.

    Args:
        load_config: of the model. Where maps are shared, nothing is kept in a file that nobody named.
        config: of the server.
        api_key: that requests must carry; `None` for none.
        store: opens the shared maps, in the place of `config.shared_maps`.
        page: whether the live page and its data are served.

    Raises:
        FinemoeError: the model can't be loaded, or the maps can't be shared.
    """
    shares = store is not None or config.shared_maps is not None
    if shares:
        refuse_to_share_nothing(load_config.policy)
        if load_config.map_store is None:
            load_config = replace(load_config, map_store=NO_MAP_STORE)
    refuse_gguf(load_config.model, "serve")
    with load(load_config) as model:
        if store is None and config.shared_maps is not None:
            store = _folder(model, config.shared_maps, config.max_shared_maps)
        with service_of(model, config, api_key, page=page) as service:
            if store is None:
                yield service
                return
            with closing(Sharing(model.finemoe, service.worker, store(), config.share_every_s)) as sharing:
                sharing.start()
                yield service


@contextmanager
def service_of(model: Any, config: ServeConfig, api_key: str | None = None, *, page: bool = True) -> Iterator[Service]:
    """Sets up all that serves a loaded model, and closes that, not the model, afterwards. See `open_service`."""
    tokenizer = load_tokenizer(model.finemoe.checkpoint.folder)
    with closing(BatchingWorker(model, config)) as worker:
        progress = Progress()
        app_state = AppState(served(model, tokenizer, worker, config, worker.capacity_tokens), progress)
        routers = [routes(LiveSource(model.finemoe, progress, worker.load, app_state.served.name))] if page else []
        yield Service(make_app(app_state, api_key=api_key, routers=routers), app_state, worker, model)


def refuse_to_share_nothing(policy: str) -> None:
    """Raises `ConfigError` if a policy learns nothing that could be shared."""
    if not policy_class(policy).is_persistent:
        raise ConfigError(f"--shared-maps: --policy {policy} learns no maps that could be shared; leave it out")


def _folder(model: Any, url: str, limit: int) -> OpenStore:
    offload = model.finemoe
    return lambda: FolderMaps(url, offload.fingerprint, offload.policy.partition("/")[0], limit)
