"""Weights whose routing is local by construction: the walk through the vocabulary, and the routing of a model."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.peers.conftest import Script

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def topics(script: Script, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return script("topics")


def test_the_walk_visits_each_token_once_and_stays_with_a_topic(topics: Any) -> None:
    made = topics.make_topics(8192, 64, seed=0)
    at, seen, turns = 0, [], 0
    for _ in range(8192):
        seen.append(at)
        following = int(made.following[at, 0])
        turns += int(made.topic[at] != made.topic[following])
        assert made.following[at, 1] == made.following[following, 0]
        at = following
    assert at == 0
    assert len(set(seen)) == 8192
    assert turns <= 8192 / topics.STRETCH
    assert set(torch.bincount(made.topic).tolist()) == {8192 // topics.TOPICS}
    assert made.embedding().pow(2).mean().sqrt() == pytest.approx(1, abs=0.02)


def test_a_prompt_follows_the_walk(topics: Any) -> None:
    made = topics.make_topics(4096, 16, seed=0)
    walk = made.walk(50, torch.Generator().manual_seed(0))
    assert all(after in made.following[before] for before, after in pairwise(walk))
    assert len(set(walk)) == 50


def test_a_model_follows_the_walk_and_routes_locally(topics: Any, script: Script, tmp_path: Path) -> None:
    make = script("make_checkpoint")
    config = make.make_config("gpt-oss-20b-narrow", 2)
    config.update({"hidden_size": 256, "moe_intermediate_size": 32, "vocab_size": 4096, "head_dim": 16})
    make.write(tmp_path, config, 0, local=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    made = topics.make_topics(4096, 256, 0)
    log = make.RoutingLog(model)
    prompt = made.walk(16, torch.Generator().manual_seed(3))
    with torch.no_grad():
        answer = model.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[0].tolist()
    steps = list(pairwise(answer[15:]))
    assert all(after in made.following[before] for before, after in steps)
    assert {int(made.following[before, 0] == after) for before, after in steps} == {0, 1}  # both successors occur
    reuse = [make.reuse(torch.cat(calls[1:])) for calls in log.calls]
    assert min(reuse) > 2 * 4 / 32  # twice what chance gives
    assert (tmp_path / "prompts.txt").read_text().split()[0].startswith("t")
    assert np.isfinite(reuse).all()
