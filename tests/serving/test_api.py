"""Common to all responses: API key, request ids, error shape, metrics, logs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.serving.serve import CHAT, NAME, TEXT, fake, ids, refusal, say


def test_unknown_models_paths_and_methods_are_refused() -> None:
    with fake() as server:
        error = refusal(server.chat(model="other"), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert refusal(server.client.get("/v1/models/org/other"), 404)["code"] == "model_not_found"
        assert refusal(server.client.get("/v1/nothing"), 404)["code"] == "not_found"
        response = server.client.get(CHAT)
        assert refusal(response, 405)["code"] == "method_not_allowed"
        assert response.headers["allow"] == "POST"
        assert server.client.get("/docs").status_code == 404  # it would load scripts from another host


def test_the_model_is_listed() -> None:
    with fake() as server:
        models = server.client.get("/v1/models").json()
        assert models["object"] == "list"
        assert server.client.get(f"/v1/models/{NAME}").json() == models["data"][0]
        assert models["data"][0]["max_model_len"] == 512


def test_only_the_api_key_opens_protected_paths() -> None:
    with fake(api_key="s3cret") as server:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic s3cret"},
            {"Authorization": "é"},
        ):
            for path in ("/v1/models", "/metrics", "/v1/nothing"):
                response = server.client.get(path, headers=[(k.encode(), v.encode()) for k, v in headers.items()])
                assert refusal(response, 401)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        assert server.client.get("/health").status_code == 200
        assert server.client.get("/ready").status_code == 200
        opened = server.client.get("/v1/models", headers={"Authorization": "Bearer s3cret"})
        assert opened.status_code == 200


def test_probes_and_clients_get_503_after_the_model_has_failed() -> None:
    with fake() as server:
        server.worker.failed = "the model's thread has failed (OSError: /secret/path)"
        for response in (server.client.get("/health"), server.client.get("/ready"), server.chat()):
            error = refusal(response, 503)
            assert error["code"] == "model_failed"
            assert error["message"].startswith("the model's thread has failed; ")
        assert server.client.get("/metrics").status_code == 200


def test_the_key_is_required_below_a_root_path_too() -> None:
    with fake(api_key="s3cret") as server, TestClient(server.app, root_path="/moe") as mounted:
        for path in ("/moe/v1/models", "/moe/metrics", "/v1/models"):
            assert mounted.get(path).status_code == 401
        assert mounted.get("/moe/v1/models", headers={"Authorization": "Bearer s3cret"}).status_code == 200
        assert mounted.get("/moe/health").status_code == 200


def test_every_response_has_a_request_id() -> None:
    with fake() as server:
        assert server.client.get("/health").headers["x-request-id"].startswith("req-")
        assert server.client.get("/v1/nothing", headers={"x-request-id": "a-1.b"}).headers["x-request-id"] == "a-1.b"
        odd = server.client.get("/health", headers={"x-request-id": 'a"b{}'}).headers["x-request-id"]
        assert odd.startswith("req-")


def test_metrics_count_requests_by_outcome() -> None:
    with fake() as server:
        server.chat()
        server.chat(n=0)
        server.chat(model="other")
        assert server.metric('finemoe_requests_total{outcome="finished"}') == 1
        assert server.metric('finemoe_requests_total{outcome="invalid"}') == 2
        assert server.metric("finemoe_generated_tokens_total") == len(ids(TEXT)) + 1
        assert server.metric("finemoe_time_to_first_token_seconds_count") == 1
        assert server.metric('finemoe_expert_accesses_total{result="hit"}') == 5
        assert server.metric("finemoe_expert_stall_seconds_total") == 0.25
        assert server.metric("finemoe_answers_running") == 0
        page = server.client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        assert page.headers["content-type"].startswith("application/openmetrics-text")
        assert page.text.endswith("# EOF\n")


def test_an_internal_error_is_a_500_in_the_same_shape() -> None:
    def broken() -> Any:
        raise KeyError("secret")

    with fake() as server:
        server.app.get("/broken")(broken)
        error = refusal(server.client.get("/broken"), 500)
    assert error["type"] == "server_error"
    assert "secret" not in error["message"]


@pytest.mark.parametrize("log_prompts", [False, True])
def test_prompts_are_logged_only_with_log_prompts(log_prompts: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "finemoe.serving"), fake(say("sesame"), log_prompts=log_prompts) as server:
        server.chat(messages=[{"role": "user", "content": "open up"}], user="ann")
        server.chat(messages=[{"role": "user", "content": "open up"}], stream=True)
    lines = [getattr(record, "fields", {}) for record in caplog.records if record.getMessage() == "request"]
    assert len(lines) == 2
    assert {line["outcome"] for line in lines} == {"finished"}
    assert lines[0]["user"] == "ann"
    assert lines[0]["completion_tokens"] == 7
    assert ("open up" in str(lines)) == ("sesame" in str(lines)) == log_prompts
