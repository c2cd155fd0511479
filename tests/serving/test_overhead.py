"""The measurement of what serving costs runs, and compares what it should."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.chat_model import make_chat_model

Scripts = Callable[[str], Any]


def asked(folder: Path) -> dict[str, Any]:
    """Two prompts, twice, of a tiny model."""
    (folder / "prompts.txt").write_text("What is water?\nWho knows?\n")
    return {
        "model": str(make_chat_model(folder / "model")),
        "prompts": str(folder / "prompts.txt"),
        "prompts_limit": 2,
        "prompt_tokens": 8,
        "new_tokens": 6,
        "repeats": 2,
        "limit_s": 600.0,
        "json": str(folder / "out.json"),
    }


def test_the_same_prompts_go_all_three_ways(scripts: Scripts, tmp_path: Path) -> None:
    given = argparse.Namespace(**asked(tmp_path), expert_memory="all", policy="lru", cache_bytes="16MiB")
    with ThreadPoolExecutor(1) as client:  # not a process: that takes seconds
        overhead = scripts("overhead").Overhead(given, client)
        overhead.run()
    rows = overhead.report["rows"]
    places = [(turn, prompt) for turn in range(2) for prompt in range(2)]
    for way in ("generate", "worker", "http"):
        assert sorted((row["round"], row["prompt"]) for row in rows if row["way"] == way) == places
    tokens = [{row["tokens"] for row in rows if row["prompt"] == prompt} for prompt in range(2)]
    assert all(len(each) == 1 for each in tokens)
    table = scripts("overhead").render(overhead.report)
    answers = dict(line.split()[:2] for line in table.splitlines() if line.split()[1:2] == ["4"])
    assert answers == {"generate": "4", "worker": "4", "http": "4"}


def test_ratios_are_of_the_same_prompt_in_the_same_round(scripts: Scripts) -> None:
    rows = [
        {"way": way, "round": turn, "prompt": prompt, "tpot_s": factor * (1 + turn + 10 * prompt)}
        for way, factor in (("generate", 1.0), ("http", 1.5))
        for turn in range(3)
        for prompt in range(2)
    ]
    found = scripts("in_turn").ratios(
        [*rows, {"way": "http", "round": 9, "prompt": 0, "tpot_s": 1.0}], "http", "generate"
    )
    assert found == [pytest.approx(1.5)] * 6
    assert scripts("in_turn").interval(found) == pytest.approx((1.5, 1.5))


def test_what_a_policy_costs_is_measured_on_the_same_prompts(scripts: Scripts, tmp_path: Path) -> None:
    given = argparse.Namespace(**asked(tmp_path), policies="finemoe,lru")
    report = scripts("policy_cost").measure(given)
    for policy in ("finemoe", "lru"):
        own = [row for row in report["rows"] if row["way"] == policy]
        assert [(row["round"], row["prompt"]) for row in own] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert report["missed"][policy] == 0
    table = scripts("policy_cost").render(report)
    answers = dict(line.split()[:2] for line in table.splitlines() if line.split()[1:2] == ["4"])
    assert answers == {"finemoe": "4", "lru": "4"}
