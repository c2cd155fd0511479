"""The live page `/`, and the state that it shows: `/v1/experts` and `/v1/live`."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import resources
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from finemoe.metrics import PerExpert
from finemoe.serving.errors import ApiError, refusals
from finemoe.serving.live import INTERVAL_S, Live, LiveSource
from finemoe.serving.model_info import own_name


class SinceSnapshot(BaseModel):
    """Of `/v1/experts`. Nothing else may be asked."""

    model_config = ConfigDict(extra="forbid")
    since: int | None = Field(None, ge=0, description="`snapshot` of the last answer: tell only rows that differ")


class SinceTime(BaseModel):
    """Of `/v1/live`. Nothing else may be asked."""

    model_config = ConfigDict(extra="forbid")
    since: float = Field(0.0, ge=0, allow_inf_nan=False, description="of the last sample: tell only later ones")


class Experts(BaseModel):
    """Every expert, as the columns of a table: entry `i` of each list is about expert `expert[i]` of `layer[i]`."""

    snapshot: int = Field(description="number of this snapshot; give it as `since` next time")
    since: int | None = Field(description="rows are those that differ from this snapshot; null: all rows are here")
    experts: list[int] = Field(description="how many experts each MoE layer has")
    states: list[str] = Field(description="what the numbers in `state` mean")
    layer: list[int]
    expert: list[int]
    state: list[int]
    pinned: list[int] = Field(description="1: the layer under way needs it and has not used it yet")
    hits: list[int] = Field(description="accesses that found it resident")
    late: list[int] = Field(description="accesses that found it in flight")
    misses: list[int] = Field(description="accesses that found it absent")
    prefetched: list[int] = Field(description="prefetches begun")
    wasted: list[int] = Field(description="prefetches evicted or withdrawn without having been needed")


class Samples(BaseModel):
    """The last ten minutes as the columns of a table, oldest first; null: nothing to be measured in that second."""

    time_s: list[float] = Field(description="end of the interval, since the epoch")
    tok_s: list[float] = Field(description="tokens generated per second")
    ttft_s: list[float | None] = Field(description="time to first token, mean of the answers that began")
    tpot_s: list[float | None] = Field(description="time per further token, mean of the answers that ended")
    hit_rate: list[float | None]
    bytes_s: list[float] = Field(description="bytes of experts moved per second")
    stall_share: list[float] = Field(description="share of the interval in which a layer waited for experts")
    running: list[int] = Field(description="answers under way at its end")
    waiting: list[int] = Field(description="requests in the queue at its end")


class Now(BaseModel):
    """What the server runs, its totals since it started, and its last ten minutes."""

    model: str = Field(description="its name in requests")
    policy: str
    interval_s: float
    layers: int
    experts: int
    slots: int
    resident: int
    expert_bytes: int
    expert_memory_bytes: int
    link_bandwidth_bytes_s: float | None = Field(description="what the link is held to, for experiments")
    hits: int
    late: int
    misses: int
    prefetched: int
    prefetched_used: int
    wasted: int
    bytes_read: int
    stall_s: float
    samples: Samples


HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # ask each time; the answer is 304 until finemoe is updated
}
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


class File(NamedTuple):
    """One file of the page."""

    content: bytes
    kind: str
    etag: str

    def response(self, request: Request) -> Response:
        """The file; or, to who has it, that it is the same."""
        headers = HEADERS | {"etag": self.etag}
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self.etag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.kind, headers=headers)


def read_files() -> dict[str, File]:
    """All files of the page by name; `index.html` is the page."""
    found = {}
    for path in resources.files("finemoe.serving.page").joinpath("static").iterdir():
        kind = KINDS.get(path.name.rpartition(".")[2])
        if kind is not None:
            content = path.read_bytes()
            found[path.name] = File(content, f"{kind}; charset=utf-8", f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


FRESH_S = 0.2  # a snapshot younger than this is shared by all who ask
KEPT = 16  # by this many, who polls twice a second may be late
STATES = ("absent", "in flight", "resident", "in use")  # by their number
COLUMNS = ("state", "pinned", "hits", "late", "misses", "prefetched", "wasted")


class Snapshots:
    """The latest snapshots of one model.

    Args:
        take: takes one.
        clock: seconds.
    """

    def __init__(self, take: Callable[[], PerExpert], clock: Callable[[], float] = time.monotonic) -> None:
        self._take = take
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, tuple[PerExpert, npt.NDArray[np.int64]]] = OrderedDict()
        self._number = int(1000 * time.time())  # no number of a server that ran before comes again
        self._taken_s = -np.inf

    def since(self, number: int | None) -> dict[str, Any]:
        """The state of all experts now, as the columns of a table with a row for each; ready for JSON.

        Args:
            number: of a snapshot that the caller has. If it is still known, only rows that differ are told.
        """
        with self._lock:
            if self._clock() - self._taken_s >= FRESH_S:
                self._renew()
            current, (experts, now) = self._number, self._kept[self._number]
            known = self._kept.get(number) if number is not None else None
        width = experts.state.shape[1]
        if known is None:
            rows = np.flatnonzero(np.arange(width) < np.array(experts.experts)[:, None])
        else:
            rows = np.flatnonzero((now != known[1]).any(axis=0))
        layer, expert = np.divmod(rows, width)
        return {
            "snapshot": current,
            "since": None if known is None else number,
            "experts": list(experts.experts),
            "states": list(STATES),
            "layer": layer.tolist(),
            "expert": expert.tolist(),
        } | {name: now[column, rows].tolist() for column, name in enumerate(COLUMNS)}

    def _renew(self) -> None:
        taken = self._take()
        columns = np.stack([getattr(taken, name) for name in COLUMNS], dtype=np.int64).reshape(len(COLUMNS), -1)
        self._number += 1
        self._kept[self._number] = taken, columns
        self._taken_s = self._clock()
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)


def routes(source: LiveSource) -> APIRouter:
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
