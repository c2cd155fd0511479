"""The observer's fast paths for one token and for linear gates give the same events as the general paths."""

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
from finemoe.model.router_hooks import Router, detect_linear, find_routers, run_router, scores_of
from finemoe.policy.finemoe.policy import FinemoePolicy
from finemoe.types import Routed
from tests.chat_model import make_chat_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("observed") / "model")


def observed(folder: Path, monkeypatch: pytest.MonkeyPatch, policy: str, batch: int) -> list[Routed]:
    """The events that the policy gets during two answers."""
    events: list[Routed] = []
    inner = FinemoePolicy.routed

    def routed(self: FinemoePolicy, event: Routed) -> None:
        events.append(event)
        inner(self, event)

    with monkeypatch.context() as patched:
        patched.setattr(FinemoePolicy, "runs_async", False)  # synchronous, so that no event is dropped
        with finemoe.load(folder, expert_memory="50%", policy=policy, map_store="none") as model:
            patched.setattr(FinemoePolicy, "routed", routed)
            for length in (5, 1):
                ids = torch.arange(3, 3 + batch * length).reshape(batch, length)
                mask = torch.ones_like(ids)
                model.generate(ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    return events


@pytest.mark.parametrize(("policy", "batch"), [("finemoe", 1), ("finemoe/lookahead=2", 1), ("finemoe", 2)])
def test_the_fast_path_for_one_token_equals_the_general_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch, policy: str, batch: int
) -> None:
    fast = observed(folder, monkeypatch, policy, batch)
    monkeypatch.setattr(Observer, "_single_token", lambda *_: None)
    monkeypatch.setattr("finemoe.model.observer.detect_linear", lambda router, _: router)
    general = observed(folder, monkeypatch, policy, batch)
    assert len(fast) == len(general) > 0
    for one, other in zip(fast, general, strict=True):
        assert (one.layer, one.experts, one.active) == (other.layer, other.experts, other.active)
        for a, b in ((one.gates, other.gates), (one.lookahead, other.lookahead)):
            assert a is not None and b is not None and a.shape == b.shape and a.dtype == b.dtype == np.float32
            assert a.flags.c_contiguous
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_linear_gate_is_detected_and_run_as_a_matmul(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    paths = [name for name, _ in model.named_modules() if name.endswith(".experts")]
    for router in find_routers(model, paths):
        assert router is not None
        detected = detect_linear(router, model.dtype)
        assert detected.linear
        hidden = torch.randn(4, model.config.hidden_size).to(model.dtype)
        assert torch.equal(run_router(detected, (hidden,), {}).float(), run_router(router, (hidden,), {}))


class Gate(nn.Module):
    """A gate whose scores are not just its weight times the hidden states."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))
        self.bias = nn.Parameter(torch.randn(4)) if kind == "bias" else None
        self.kind = kind

    def forward(self, hidden: torch.Tensor, *more: Any) -> tuple[torch.Tensor]:
        if self.kind == "more" and not more:
            raise TypeError("needs more than hidden states")
        return (nn.functional.linear(hidden * (2 if self.kind == "scaled" else 1), self.weight),)


@pytest.mark.parametrize("kind", ["bias", "scaled", "more"])
def test_any_other_gate_is_run_by_its_own_forward(kind: str) -> None:
    router = detect_linear(Router(Gate(kind), 0, standalone=True), torch.float32)
    assert not router.linear
    hidden = torch.randn(2, 8)
    arguments = (hidden, 0) if kind == "more" else (hidden,)
    assert torch.equal(run_router(router, arguments, {}), scores_of(router, router.module(*arguments)))
    assert not detect_linear(Router(nn.Identity(), 0, standalone=True), torch.float32).linear
