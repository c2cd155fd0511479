"""A layer's output equals the module's own, bit for bit, whatever is resident, lands first, or fits the budget."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import finemoe
from finemoe.engine.engine import Engine
from finemoe.engine.expert_layer import ExpertLayer, LazyParameter, compute_as_ready, compute_reference
from finemoe.engine.token_dispatch import group_rows
from finemoe.errors import ExpertReadError, FinemoeError
from finemoe.policy import POLICIES, make_cache_manager
from finemoe.store import DiskStore, RamSlotPool
from finemoe.types import ExpertId
from tests.fakes import ManualTransfer
from tests.tiny import Make, eager, experts_modules

# forms of experts: plain, in two dtypes; transposed, with biases and interleaved rows; no gate, results added up in the
# dtype of the routing weights
CASES = [("mixtral", "float32"), ("mixtral", "bfloat16"), ("gpt_oss", "bfloat16"), ("nemotron_h", "bfloat16")]
TokenCounts = st.integers(1, 9)


class Case(NamedTuple):
    """One experts module: offloaded, and with its weights in memory."""

    module: Any
    reference: Any
    store: DiskStore
    slot_bytes: int
    handle: ExpertLayer
    dtype: torch.dtype


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, tiny: Make) -> Iterator[Case]:
    folder = tiny(*request.param)
    with finemoe.load(folder, expert_memory="60%") as model:
        module = experts_modules(model)[0]
        reference = experts_modules(eager(folder))[0]
        store, slot_bytes = model.finemoe._store, model.finemoe.expert_index.slot_bytes
        yield Case(module, reference, store, slot_bytes, module.finemoe_layer, model.dtype)


def offloaded(case: Case, capacity: int, policy: str = "lru") -> tuple[ExpertLayer, ManualTransfer]:
    """The module's layer over an engine of its own, which the module's parameters use too."""
    layout, transfer = case.handle.layout, ManualTransfer(case.store)
    cache_manager = make_cache_manager(policy, 1, layout.experts, capacity)
    engine = Engine(RamSlotPool(capacity, case.slot_bytes), cache_manager, transfer)
    layer = ExpertLayer(engine, threading.RLock(), 0, layout, case.handle._dtypes)
    layer.accumulator = case.handle.accumulator
    for name, value in case.module.__dict__.items():
        if isinstance(value, LazyParameter):
            case.module.__dict__[name] = LazyParameter(layer, name, torch.empty(value.shape, device="meta"))
    return layer, transfer


def inputs(case: Case, tokens: int, seed: int, active: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = next(iter(case.reference.parameters()))
    width = first.shape[1] if case.module.is_transposed else first.shape[-1]
    hidden = torch.randn(tokens, width, generator=generator).to(case.dtype)
    experts = case.handle.layout.experts
    index = torch.stack([torch.randperm(experts, generator=generator)[:active] for _ in range(tokens)])
    weights_dtype = torch.float32 if seed % 2 else case.dtype
    return hidden, index, torch.rand(tokens, active, generator=generator).to(weights_dtype)


def both_paths(case: Case, layer: ExpertLayer, given_inputs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        outputs = [compute_reference(layer, case.module, *given_inputs)]
        if layer.accumulator is not None:
            outputs.append(compute_as_ready(layer, case.module, *given_inputs, layer.accumulator))
    return outputs


def reference_output(case: Case, given_inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    with torch.no_grad():
        output: Tensor = type(case.reference).forward.__wrapped__(case.reference, *given_inputs)
    return output


def test_an_accumulator_is_chosen(case: Case) -> None:
    assert case.handle.accumulator is not None


@settings(max_examples=settings().max_examples // 3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    calls=st.lists(st.tuples(TokenCounts, st.integers(0, 9), st.integers(1, 6)), min_size=1, max_size=4),
    capacity=st.integers(1, 8),
    policy=st.sampled_from(POLICIES),
    random=st.randoms(use_true_random=False),
)
def test_output_does_not_depend_on_residency(
    case: Case, calls: list[tuple[int, int, int]], capacity: int, policy: str, random: Any
) -> None:
    layer, transfer = offloaded(case, capacity, policy)
    transfer.choose = random.randrange
    transfer.ripe = lambda in_flight: random.randint(0, in_flight)
    assert layer.engine is not None
    for tokens, seed, active in calls:
        given_inputs = inputs(case, tokens, seed, active)
        expected = reference_output(case, given_inputs)
        for output in both_paths(case, layer, given_inputs):
            assert torch.equal(output, expected)
        layer.engine.check_integrity()


def test_indices_beyond_the_experts_are_ignored(case: Case) -> None:
    layer, _ = offloaded(case, 4)
    hidden, index, weights = inputs(case, 5, 1)
    index[3, 0] = index[2] = layer.layout.experts
    ignored = index == layer.layout.experts
    without = hidden, index.masked_fill(ignored, 0), weights.masked_fill(ignored, 0)
    assert layer.accumulator is not None
    with torch.no_grad():
        output = compute_as_ready(layer, case.module, hidden, index, weights, layer.accumulator)
    assert torch.equal(output, reference_output(case, without))


@pytest.mark.parametrize("tokens", [0, 1])
def test_tokens_without_experts_get_zeros(case: Case, tokens: int) -> None:
    layer, transfer = offloaded(case, 4)
    hidden, _, weights = inputs(case, tokens or 1, 0)
    index = torch.full((tokens, 3), layer.layout.experts)
    with torch.no_grad():
        output = compute_as_ready(layer, case.module, hidden[:tokens], index, weights[:tokens], "hidden")
    assert output.shape == hidden[:tokens].shape
    assert not output.any()
    assert transfer.submitted == []


def test_resident_experts_are_computed_before_missing_ones_have_landed(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, transfer = offloaded(case, 8)
    assert layer.accumulator is not None
    assert layer.engine is not None
    hidden, _, weights = inputs(case, 1, 0)
    with torch.no_grad():
        compute_as_ready(layer, case.module, hidden, torch.tensor([[5, 6, 7]]), weights, layer.accumulator)
        order: list[tuple[int, int]] = []
        parameters = layer.parameters

        def note(expert: int, slot: int) -> dict[str, Tensor]:
            order.append((slot, len(transfer.in_flight)))
            return parameters(expert, slot)

        monkeypatch.setattr(layer, "parameters", note)
        compute_as_ready(layer, case.module, hidden, torch.tensor([[0, 5, 7]]), weights, layer.accumulator)
    assert [in_flight for _, in_flight in order] == [1, 1, 0]


@pytest.mark.parametrize("path", ["as ready", "reference"])
@pytest.mark.parametrize("failure", [OSError(5, "Input/output error", "shard"), KeyboardInterrupt()], ids=repr)
def test_a_call_after_an_aborted_one_is_exact(case: Case, path: str, failure: BaseException) -> None:
    layer, transfer = offloaded(case, 4)
    assert layer.engine is not None
    given_inputs = inputs(case, 6, 2)
    expected = reference_output(case, given_inputs)

    def call() -> Tensor:
        with torch.no_grad():
            if path == "reference":
                return compute_reference(layer, case.module, *given_inputs)
            assert layer.accumulator is not None
            return compute_as_ready(layer, case.module, *given_inputs, layer.accumulator)

    for landed in range(6):
        left = [landed]

        def fail(_: ExpertId, left: list[int] = left) -> BaseException | None:
            left[0] -= 1
            return failure if left[0] < 0 else None

        transfer.fail = fail
        if left[0] < len(group_rows(given_inputs[1], 8)):
            layer.engine.clear()
            with pytest.raises(ExpertReadError if isinstance(failure, OSError) else KeyboardInterrupt):
                call()
        layer.engine.check_integrity()
        transfer.fail = lambda _: None
        assert torch.equal(call(), expected)


def test_an_interrupted_release_leaves_no_stale_expert(case: Case) -> None:
    layer, _ = offloaded(case, 1)
    assert layer.engine is not None
    name = layer.layout.fields[0].name
    zero, one = (layer.hold(e)[name].clone() for e in (0, 1))
    engine, used = layer.engine, layer.engine.cache_manager.used

    def interrupted(_: ExpertId) -> None:
        raise KeyboardInterrupt

    engine.cache_manager.used = interrupted  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        layer.release()
    engine.cache_manager.used = used  # type: ignore[method-assign]
    assert torch.equal(layer.hold(0)[name], zero)
    assert torch.equal(layer.hold(1)[name], one)
    layer.release()


def test_gradients_are_refused(case: Case) -> None:
    layer, _ = offloaded(case, 4)
    hidden, index, weights = inputs(case, 2, 0)
    with pytest.raises(FinemoeError, match=r"no gradients; run the model under torch.no_grad\(\)"):
        layer.run(case.module, hidden.requires_grad_(), index, weights)
