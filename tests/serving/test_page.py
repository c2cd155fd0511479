"""The page's files and its data, without a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from finemoe.serving.app import make_app
from finemoe.serving.live import LiveSource, ProgressCounters
from finemoe.serving.page import routes
from finemoe.serving.page.schemas import Experts, Now
from finemoe.serving.page.snapshots import COLUMNS, MAX_SNAPSHOTS, SnapshotCache
from finemoe.serving.scheduler.job import WorkerLoad
from tests.serving.fake_model_handle import FakeModelHandle
from tests.serving.fake_worker import FakeWorker
from tests.serving.serve import TEXT, make_app_state, say
from tests.tiny import Make, answer

KEY = {"authorization": "Bearer secret"}


@pytest.fixture
def offload() -> FakeModelHandle:
    return FakeModelHandle(3, 2)


@pytest.fixture
def client(offload: FakeModelHandle) -> Iterator[TestClient]:
    worker = FakeWorker(say(TEXT), 4)
    app_state = make_app_state(worker)
    page = routes(LiveSource(offload, ProgressCounters(), lambda: WorkerLoad(1, 2, 3, 4)))
    with TestClient(make_app(app_state, api_key="secret", routers=[page])) as made:
        yield made
    worker.close()
    app_state.prompts.close()


def rows(answer: dict[str, Any]) -> dict[tuple[int, int], dict[str, int]]:
    """The rows of a table, by layer and expert."""
    places = list(zip(answer["layer"], answer["expert"], strict=True))
    return {place: {name: answer[name][i] for name in COLUMNS} for i, place in enumerate(places)}


def make_snapshots(offload: FakeModelHandle) -> tuple[SnapshotCache, list[float]]:
    now_s = [0.0]
    return SnapshotCache(offload.experts, lambda: now_s[0]), now_s


def test_the_first_snapshot_has_all_rows_and_later_ones_the_changes(offload: FakeModelHandle) -> None:
    snapshots, now_s = make_snapshots(offload)
    offload.state[0, 2] = 2
    offload.counts["misses"][0, 2] = 5
    first = snapshots.since(None)
    assert first["since"] is None
    assert first["experts"] == [3, 2]
    assert set(rows(first)) == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)}
    assert rows(first)[0, 2] == dict.fromkeys(COLUMNS, 0) | {"state": 2, "misses": 5}
    offload.state[1, 0] = 1
    offload.counts["prefetched"][1, 0] += 1
    now_s[0] = 1.0
    second = snapshots.since(first["snapshot"])
    assert second["since"] == first["snapshot"]
    assert rows(second) == {(1, 0): dict.fromkeys(COLUMNS, 0) | {"state": 1, "prefetched": 1}}
    now_s[0] = 2.0
    assert rows(snapshots.since(second["snapshot"])) == {}


def test_a_forgotten_base_snapshot_gives_all_rows(offload: FakeModelHandle) -> None:
    snapshots, now_s = make_snapshots(offload)
    first = snapshots.since(None)["snapshot"]
    for second in range(1, MAX_SNAPSHOTS + 1):
        now_s[0] = float(second)
        snapshots.since(None)
    assert snapshots.since(first)["since"] is None
    assert snapshots.since(first + 10**9)["since"] is None


def test_simultaneous_clients_share_a_snapshot(offload: FakeModelHandle) -> None:
    snapshots, now_s = make_snapshots(offload)
    assert snapshots.since(None)["snapshot"] == snapshots.since(None)["snapshot"]
    assert offload.taken == 1
    now_s[0] = 0.3
    snapshots.since(None)
    assert offload.taken == 2


def test_responses_match_their_schemas(client: TestClient) -> None:
    experts = client.get("/v1/experts", headers=KEY)
    Experts.model_validate(experts.json(), strict=True)
    live = client.get("/v1/live?since=0", headers=KEY)
    Now.model_validate(live.json())
    assert set(live.json()) == set(Now.model_fields)
    assert set(experts.json()) == set(Experts.model_fields)
    document = client.get("/openapi.json").text
    assert {"/v1/experts", "/v1/live"} <= set(json.loads(document)["paths"])
    assert "422" not in document


def test_the_page_shows_the_served_name(offload: FakeModelHandle) -> None:
    worker = FakeWorker(say(TEXT), 4)
    app_state = make_app_state(worker)
    page = routes(LiveSource(offload, ProgressCounters(), worker.load, "our/model"))
    with TestClient(make_app(app_state, routers=[page])) as client:
        assert client.get("/v1/live").json()["model"] == "our/model"
    worker.close()
    app_state.prompts.close()


@pytest.mark.parametrize("query", ["since=soon", "since=-1", "since=nan", "since=1e999", "until=3", "since=1&all=1"])
@pytest.mark.parametrize("path", ["/v1/experts", "/v1/live"])
def test_invalid_queries_are_refused_by_name(client: TestClient, path: str, query: str) -> None:
    refused = client.get(f"{path}?{query}", headers=KEY)
    assert refused.status_code == 400
    assert re.search("since|until|all", refused.json()["error"]["message"] + str(refused.json()["error"]["param"]))


def test_the_data_requires_the_key_and_the_page_does_not(client: TestClient) -> None:
    assert client.get("/v1/experts").status_code == 401
    assert client.get("/v1/live").status_code == 401
    assert client.get("/").status_code == client.get("/page/page.js").status_code == 200


def test_files_have_an_etag_and_a_strict_content_security_policy(client: TestClient) -> None:
    for path in ("/", "/page/page.css", "/page/page.js", "/page/icon.svg"):
        response = client.get(path)
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy and "http" not in policy and "*" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        again = client.get(path, headers={"if-none-match": f'"other", W/{response.headers["etag"]}'})
        assert (again.status_code, again.content) == (304, b"")
        assert client.get(path, headers={"if-none-match": '"other"'}).content == response.content
        head = client.head(path)
        assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize("name", ["missing.js", "__init__.py", "..%2ffiles.py", "%2e%2e/%2e%2e/job.py"])
def test_no_other_file_is_served(client: TestClient, name: str) -> None:
    assert client.get(f"/page/{name}").status_code == 404


def test_the_files_name_no_other_host_and_never_turn_text_into_markup() -> None:
    for path in resources.files("finemoe.serving.page").joinpath("static").iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/", "")
        assert "//" not in re.sub(r"(^|\s)//\s.*", "", text), path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|style=|onclick=", text)


def test_a_real_model_counts_experts_from_the_start(tiny: Make) -> None:
    import finemoe

    # lru does not prefetch: the state does not change between two requests
    with finemoe.load(tiny(), expert_memory="50%", policy="lru") as model:
        worker = FakeWorker(say(TEXT), 4)
        app_state = make_app_state(worker)
        page = routes(LiveSource(model.finemoe, ProgressCounters(), worker.load))
        with TestClient(make_app(app_state, routers=[page])) as client:
            answer(model)
            table = client.get("/v1/experts").json()
            stats = model.finemoe.stats()
            assert sum(table["misses"]) == stats.misses > 0
            assert sum(state == 2 for state in table["state"]) == stats.resident
            live = client.get("/v1/live").json()
            assert live["model"] == Path(model.finemoe.checkpoint.folder).name
            assert (live["misses"], live["slots"]) == (stats.misses, stats.slots)
        worker.close()
        app_state.prompts.close()
