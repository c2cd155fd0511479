"""What policies hear of a pass of one token is told in a few operations: the same as by the long way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import finemoe
from finemoe.model.observer import Observer
from finemoe.model.router_hooks import Router, ask, find_routers, scores_of, with_linear
from finemoe.policy.finemoe.policy import FinemoePolicy
from finemoe.types import Routed
from tests.chat_model import make_chat_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("observed") / "model")


def heard(folder: Path, monkeypatch: pytest.MonkeyPatch, policy: str, batch: int) -> list[Routed]:
    """The events of two answers."""
    events: list[Routed] = []
    inner = FinemoePolicy.routed

    def routed(self: FinemoePolicy, event: Routed) -> None:
        events.append(event)
        inner(self, event)

    with monkeypatch.context() as patched:
        patched.setattr(FinemoePolicy, "runs_async", False)  # on the model's thread, so that no event is late
        with finemoe.load(folder, expert_memory="50%", policy=policy, map_store="none") as model:
            patched.setattr(FinemoePolicy, "routed", routed)
            for length in (5, 1):
                ids = torch.arange(3, 3 + batch * length).reshape(batch, length)
                mask = torch.ones_like(ids)
                model.generate(ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    return events


@pytest.mark.parametrize(("policy", "batch"), [("finemoe", 1), ("finemoe/lookahead=2", 1), ("finemoe", 2)])
def test_what_is_told_of_one_token_is_what_the_long_way_tells(
    folder: Path, monkeypatch: pytest.MonkeyPatch, policy: str, batch: int
) -> None:
    short = heard(folder, monkeypatch, policy, batch)
    monkeypatch.setattr(Observer, "_of_one_token", lambda *_: None)
    monkeypatch.setattr("finemoe.model.observer.with_linear", lambda router, _: router)
    long = heard(folder, monkeypatch, policy, batch)
    assert len(short) == len(long) > 0
    for one, other in zip(short, long, strict=True):
        assert (one.layer, one.experts, one.active) == (other.layer, other.experts, other.active)
        for a, b in ((one.gates, other.gates), (one.lookahead, other.lookahead)):
            assert a is not None and b is not None and a.shape == b.shape and a.dtype == b.dtype == np.float32
            assert a.flags.c_contiguous
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_gate_that_is_a_linear_map_is_asked_by_that_alone(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    paths = [name for name, _ in model.named_modules() if name.endswith(".experts")]
    for router in find_routers(model, paths):
        assert router is not None
        tried = with_linear(router, model.dtype)
        assert tried.linear
        hidden = torch.randn(4, model.config.hidden_size).to(model.dtype)
        assert torch.equal(ask(tried, (hidden,), {}).float(), ask(router, (hidden,), {}))


class Gate(nn.Module):
    """Scores that are not, or not only, what its weight makes of the hidden states."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))
        self.bias = nn.Parameter(torch.randn(4)) if kind == "bias" else None
        self.kind = kind

    def forward(self, hidden: torch.Tensor, *more: Any) -> tuple[torch.Tensor]:
        if self.kind == "more" and not more:
            raise TypeError("wants more than hidden states")
        return (nn.functional.linear(hidden * (2 if self.kind == "scaled" else 1), self.weight),)


@pytest.mark.parametrize("kind", ["bias", "scaled", "more"])
def test_any_other_gate_is_asked_as_a_whole(kind: str) -> None:
    router = with_linear(Router(Gate(kind), 0, alone=True), torch.float32)
    assert not router.linear
    hidden = torch.randn(2, 8)
    arguments = (hidden, 0) if kind == "more" else (hidden,)
    assert torch.equal(ask(router, arguments, {}), scores_of(router, router.module(*arguments)))
    assert not with_linear(Router(nn.Identity(), 0, alone=True), torch.float32).linear
