"""The router tap records what a model executes and its gates' scores, for any family, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import finemoe
from finemoe.errors import ConfigError, UnsupportedModelError
from finemoe.model.router_hooks import RecordedPass, RouterTap, find_routers, infer_scale, normalise
from tests.tiny import Make, eager, experts_modules, prompt

# one of each kind: softmax before and after top-k, sigmoid with groups and a bias, scores that are probabilities
SCALES = {"mixtral": "softmax", "gpt_oss": "softmax", "deepseek_v3": "sigmoid", "gemma4_text": "scores"}


def record_pass(model: Any, lookahead: int = 0, batch: int = 1) -> tuple[RouterTap, RecordedPass]:
    """Records one forward pass."""
    tap = RouterTap(model, lookahead)
    with tap.recording():
        model(**prompt(batch))
    (one,) = tap.take()
    return tap, one


@pytest.fixture(scope="module", params=list(SCALES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(tiny: Make, family: str) -> Iterator[Any]:
    with finemoe.load(tiny(family), expert_memory="50%") as model:
        if not any("router_logits" in (getattr(m, "_can_record_outputs", None) or {}) for m in model.modules()):
            pytest.skip(f"transformers {transformers.__version__} records no gates of {family}")
        yield model


def test_executed_experts_are_the_arguments_of_the_experts_modules(tiny: Make, family: str, model: Any) -> None:
    tap, one = record_pass(model, batch=2)
    calls: list[tuple[Any, ...]] = []
    reference = eager(tiny(family))
    for module in experts_modules(reference):
        module.register_forward_pre_hook(lambda _module, arguments: calls.append(arguments))
    with torch.no_grad():
        reference(**prompt(2))
    assert len(calls) == tap.layers
    for layer, (_, ids, weights) in enumerate(calls):
        order = weights.float().argsort(dim=1, descending=True, stable=True)
        assert torch.equal(one.ids[:, layer], ids.gather(1, order))
        assert torch.equal(one.weights[:, layer], weights.float().gather(1, order))
    assert torch.equal(one.token_ids, prompt(2)["input_ids"])


def test_the_scale_of_the_gates_is_inferred_from_the_weights(family: str, model: Any) -> None:
    _, one = record_pass(model)
    assert one.scores is not None
    assert infer_scale(one.scores, one.ids, one.weights) == (SCALES[family], True)


def test_distributions_rank_executed_experts_first(family: str, model: Any) -> None:
    tap = RouterTap(model)
    tap.scale = SCALES[family]  # type: ignore[assignment]
    with tap.recording():
        model(**prompt())
    (one,) = tap.take()
    assert one.scores is not None and one.scores.dtype == torch.float16
    assert one.scores.float().sum(-1) == pytest.approx(torch.ones(one.scores.shape[:2]), abs=0.01)
    if family != "deepseek_v3":  # its top-k uses a bias and groups
        best = one.scores.float().topk(one.ids.shape[2], -1).values
        assert torch.equal(best, one.scores.float().gather(-1, one.ids).sort(-1, descending=True).values)


def test_lookahead_is_the_later_gate_on_the_earlier_input(model: Any) -> None:
    states: dict[int, Any] = {}
    tap = RouterTap(model, lookahead=2)
    hooks = [
        router.module.register_forward_pre_hook(lambda _module, given, layer=layer: states.__setitem__(layer, given))
        for layer, router in enumerate(tap.routers)
        if router is not None
    ]
    with tap.recording():
        model(**prompt())
    for hook in hooks:
        hook.remove()
    (one,) = tap.take()
    assert one.ahead is not None and one.scores is not None
    for layer in range(tap.layers):
        for distance in (1, 2):
            predicted = one.ahead[:, distance - 1, layer]
            if layer + distance >= tap.layers:
                assert not predicted.any()
                continue
            later = tap.routers[layer + distance]
            assert later is not None
            with torch.no_grad():
                by_hand = later.module(*states[layer])[later.output_index].float()
            assert torch.equal(predicted, by_hand.reshape(-1, tap.experts))
            assert not torch.equal(predicted, one.scores[:, layer + distance])


def test_recording_changes_no_answer(model: Any) -> None:
    with torch.no_grad():
        before = model(**prompt()).logits
        tap = RouterTap(model, lookahead=1)
        with tap.recording():
            during = model(**prompt()).logits
    assert torch.equal(before, during)
    tap.take()
    model(**prompt())
    assert tap.take() == []


def test_passes_are_recorded_separately(model: Any) -> None:
    tap = RouterTap(model)
    with tap.recording():
        model.generate(**prompt(2), do_sample=False, max_new_tokens=4, eos_token_id=None, pad_token_id=0)
    assert [tuple(one.token_ids.shape) for one in tap.take()] == [(2, 12), (2, 1), (2, 1), (2, 1)]


def test_an_interrupted_pass_is_dropped(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tap = RouterTap(model)
    last = tap.routers[-1]
    assert last is not None
    with monkeypatch.context() as patch:
        patch.setattr(last.module, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt), tap.recording():
            model(**prompt())
    with tap.recording():
        model(**prompt())
    assert len(tap.take()) == 1


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_lookahead_beyond_the_last_layer_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="--lookahead"):
        RouterTap(model, lookahead=99)


def test_scores_of_unknown_gates_are_missing(tiny: Make) -> None:
    with finemoe.load(tiny("deepseek_v4"), expert_memory="50%") as model:  # hash routers in its first layers
        _, one = record_pass(model)
        assert one.scores is None
        with pytest.raises(ConfigError, match="can't be run on their own"):
            RouterTap(model, lookahead=1)


def test_experts_that_do_not_run_on_text_are_named(tiny: Make) -> None:
    with (
        finemoe.load(tiny("ernie4_5_vl_moe"), expert_memory="all") as model,
        pytest.raises(UnsupportedModelError, match="did not run on text"),
    ):
        record_pass(model)


def test_a_gate_belongs_to_the_experts_with_the_longest_common_path(tiny: Make, chat_folder: Path) -> None:
    with finemoe.load(chat_folder, expert_memory="all") as model:
        tap = RouterTap(model)
        assert [router is not None for router in tap.routers] == [True] * 3
        assert len({id(router.module) for router in tap.routers if router is not None}) == 3
        assert find_routers(torch.nn.Linear(2, 2), tap.experts_paths) == [None] * 3


def test_weights_that_no_scale_explains_give_an_unproven_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(9, 2, 8, generator=generator)
    ids = torch.rand(9, 2, 8, generator=generator).argsort(-1)[..., :3]
    assert infer_scale(scores, ids, torch.rand(9, 2, 3, generator=generator)) == ("softmax", False)
    assert infer_scale(scores, ids[..., :1], torch.ones(9, 2, 1)) == ("softmax", False)


def test_normalised_scores_sum_to_one() -> None:
    scores = torch.rand(4, 8)
    for scale in ("softmax", "sigmoid", "scores"):
        assert normalise(scores, scale).sum(-1) == pytest.approx(torch.ones(4), abs=1e-5)
