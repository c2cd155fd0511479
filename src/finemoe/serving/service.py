"""A loaded model with all that serves it, but for the HTTP server in front."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI

from finemoe.config import LoadConfig
from finemoe.errors import ConfigError
from finemoe.maps import NOWHERE, FolderMaps, SharedMaps
from finemoe.model import load_config as load
from finemoe.policy import policy_class
from finemoe.serving.app import make_app
from finemoe.serving.config import ServeConfig
from finemoe.serving.house import House
from finemoe.serving.live import Source
from finemoe.serving.page import routes
from finemoe.serving.progress import Progress
from finemoe.serving.served import served
from finemoe.serving.sharing import Sharing
from finemoe.serving.worker import BatchingWorker
from finemoe.session import load_tokenizer

OpenStore = Callable[[], SharedMaps]


@dataclass(frozen=True)
class Service:
    """What runs."""

    app: FastAPI
    house: House
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
            load_config = replace(load_config, map_store=NOWHERE)
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
        house = House(served(model, tokenizer, worker, config, worker.capacity_tokens), progress)
        routers = [routes(Source(model.finemoe, progress, worker.load, house.served.name))] if page else []
        yield Service(make_app(house, api_key=api_key, routers=routers), house, worker, model)


def refuse_to_share_nothing(policy: str) -> None:
    """Raises `ConfigError` if a policy learns nothing that could be shared."""
    if not policy_class(policy).remembers:
        raise ConfigError(f"--shared-maps: --policy {policy} learns no maps that could be shared; leave it out")


def _folder(model: Any, url: str, limit: int) -> OpenStore:
    offload = model.finemoe
    return lambda: FolderMaps(url, offload.fingerprint, offload.policy.partition("/")[0], limit)
