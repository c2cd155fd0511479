"""Figures derived from peers' measurements, and their table."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.peers.conftest import Script


@pytest.fixture
def row(script: Script) -> Callable[..., Any]:
    peer, table = script("peer"), script("table")

    def make(name: str, *tokens: list[int], **values: Any) -> Any:
        answers = [peer.Answer(own, [2.0, *([0.25] * (len(own) - 1))], 5 << 20, 3 << 20) for own in tokens]
        return table.Row(name, peer.Result("1.0", 3.0, answers, 7 << 20), **values)

    return make


def test_figures_are_of_the_tokens_after_the_first(row: Callable[..., Any]) -> None:
    one = row("a", [1, 2, 3], [4, 5])
    assert (one.ttft_s, one.tok_s, one.bytes_per_token, one.peak_bytes) == (2.0, 4.0, 2 << 20, 7 << 20)


def test_the_first_differing_token_is_named(row: Callable[..., Any], script: Script) -> None:
    reference, same = row("a", [1, 2, 3], [4, 5]), row("b", [1, 2, 3], [4, 5])
    other = row("c", [1, 2, 3], [4, 6])
    assert same.tokens_equal(reference) is True
    assert other.differs_at(reference) == (1, 1)
    text = script("table").render([reference, same, other], reference)
    assert "NO, from token 2 of prompt 2" in text
    assert text.count("| " + "yes".rjust(len("NO, from token 2 of prompt 2")) + " |") == 1


def test_an_engine_that_could_not_run_has_a_line_with_the_reason(row: Callable[..., Any], script: Script) -> None:
    table, cap = script("table"), script("cap")
    capped = row("b", [1, 2], usage=cap.CapUsage(100, 100, 1), at_once=False)
    rows = [row("a", [1, 2]), capped, table.Row("c", error="not installed")]
    text = table.render(rows, rows[0])
    assert text.splitlines()[-1] == "c: not installed"
    assert "reached, after loading" in text
    assert len({len(line) for line in text.splitlines()[:4]}) == 1
    document = json.loads(json.dumps([each.as_dict(rows[0]) for each in rows]))
    assert [each["tokens_equal"] for each in document] == [True, True, None]
    assert document[1]["cap"] == {
        "limit_bytes": 100, "peak_bytes": 100, "refusals": 1, "felt": True, "at_once": False
    }  # fmt: skip
    assert document[2]["error"] == "not installed"
    assert table.render(rows[2:], None).splitlines()[-1] == "c: not installed"


def test_results_survive_json(row: Callable[..., Any], script: Script) -> None:
    from dataclasses import asdict

    result = row("a", [1, 2, 3]).result
    assert script("peer").Result.from_dict(json.loads(json.dumps(asdict(result)))) == result
