"""The overhead benchmark sends the same prompts every way, and compares like with like."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from finemoe.bench.serve.config import OverheadConfig
from finemoe.bench.serve.overhead import Overhead, interval, ratios
from tests.chat_model import make_chat_model


def test_the_same_prompts_go_all_three_ways(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("What is water?\nWho knows?\n")
    config = OverheadConfig(
        model=str(make_chat_model(tmp_path / "model")),
        prompts=str(tmp_path / "prompts.txt"),
        prompts_limit=2,
        prompt_tokens=8,
        new_tokens=6,
        repeats=2,
        cache_bytes="16MiB",
    )
    overhead = Overhead(config, executor=ThreadPoolExecutor(1))  # not a process: that takes seconds
    overhead.run()
    rows = overhead.document["rows"]
    places = [(turn, prompt) for turn in range(2) for prompt in range(2)]
    for way in ("generate", "worker", "http"):
        assert sorted((row["round"], row["prompt"]) for row in rows if row["way"] == way) == places
    tokens = [{row["tokens"] for row in rows if row["prompt"] == prompt} for prompt in range(2)]
    assert all(len(each) == 1 for each in tokens)
    answers = dict(line.split()[:2] for line in overhead.table().splitlines() if line.split()[1:2] == ["4"])
    assert answers == {"generate": "4", "worker": "4", "http": "4"}


def test_ratios_are_of_the_same_prompt_in_the_same_round() -> None:
    rows = [
        {"way": way, "round": turn, "prompt": prompt, "tpot_s": factor * (1 + turn + 10 * prompt)}
        for way, factor in (("generate", 1.0), ("http", 1.5))
        for turn in range(3)
        for prompt in range(2)
    ]
    found = ratios([*rows, {"way": "http", "round": 9, "prompt": 0, "tpot_s": 1.0}], "http", "generate")
    assert found == [pytest.approx(1.5)] * 6
    assert interval(found) == pytest.approx((1.5, 1.5))
