"""The server conforms to its OpenAPI document, by schemathesis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serving.serve import NAME, Fake, fake

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def server() -> Iterator[Fake]:
    with fake(max_output_tokens=8, request_timeout_s=20) as made:
        yield made


OPERATIONS = (
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "GET /health",
    "GET /ready",
    "GET /metrics",
)


def operations(server: Fake) -> dict[str, Any]:
    document = schemathesis.openapi.from_asgi("/openapi.json", server.app)
    found: list[Any] = list(document.get_all_operations())
    return {operation.ok().label: operation.ok() for operation in found}


@pytest.mark.parametrize(
    ("label", "mode"),
    [(label, GenerationMode.POSITIVE) for label in OPERATIONS]
    + [(label, GenerationMode.NEGATIVE) for label in OPERATIONS if "POST" in label or "{" in label],
)
def test_nothing_breaks(server: Fake, label: str, mode: GenerationMode) -> None:
    operation = operations(server)[label]

    @settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = NAME  # any other is 404 before the rest of the request is checked
        case.call_and_validate(checks=CHECKS)

    check()


def test_every_endpoint_is_tested(server: Fake) -> None:
    assert set(operations(server)) == set(OPERATIONS)


def test_the_document_lists_every_parameter_and_no_framework_error(server: Fake) -> None:
    text = server.client.get("/openapi.json").text
    assert "422" not in text
    assert "HTTPValidationError" not in text
    for name in ("response_format", "stream_options", "top_logprobs", "text/event-stream", "max_completion_tokens"):
        assert name in text
