"""Misses computed on the host: which ones are chosen, and that outputs differ by rounding only."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finemoe.gpu.hybrid_cpu import HybridCosts, HybridSplit, fit_line, split_misses
from finemoe.types import ExpertId
from tests.gpu.test_setup import Load, load
from tests.tiny import Make, eager, logits

__all__ = ["load"]  # a fixture
Seconds = st.floats(0.001, 10)


def done_s(rows: list[int], chosen: tuple[int, ...] | list[int], costs: HybridCosts) -> float:
    """When both host and link are done."""
    return max(sum(costs.on_host_s(rows[i]) for i in chosen), (len(rows) - len(chosen)) * costs.copy_s)


@given(st.lists(st.integers(1, 16), max_size=6), Seconds, Seconds, Seconds)
def test_no_other_split_is_done_earlier(rows: list[int], copy_s: float, fixed_s: float, row_s: float) -> None:
    costs = HybridCosts(copy_s, fixed_s, row_s)
    chosen = split_misses(rows, costs)
    every = [each for count in range(len(rows) + 1) for each in combinations(range(len(rows)), count)]
    assert done_s(rows, chosen, costs) == pytest.approx(min(done_s(rows, each, costs) for each in every))


def test_a_slow_host_computes_nothing_and_a_slow_link_copies_nothing() -> None:
    assert split_misses([1, 1, 1], HybridCosts(copy_s=1, fixed_s=10, row_s=0)) == []
    assert sorted(split_misses([1, 1, 1], HybridCosts(copy_s=10, fixed_s=1, row_s=0))) == [0, 1, 2]
    assert split_misses([4, 1, 4], HybridCosts(copy_s=3, fixed_s=1, row_s=1)) == [1]  # the one with the fewest rows


def test_experts_that_are_not_chosen_are_released_even_if_choosing_fails() -> None:
    acquired: list[int] = []

    def refuse(*_: object) -> None:
        raise RuntimeError("cannot schedule new futures after shutdown")

    def acquire(expert: ExpertId) -> torch.Tensor:
        acquired.append(expert.expert)
        return torch.zeros(1)

    copier = SimpleNamespace(acquire=acquire, release=lambda expert: acquired.remove(expert.expert))
    costs = HybridCosts(copy_s=1, fixed_s=0.4, row_s=0)
    host: Any = SimpleNamespace(copier=copier, costs=costs, submit=lambda *_: None)
    tokens = {0: [0], 1: [0], 2: [0]}
    chosen = HybridSplit(host, None, 0, torch.zeros(1, 4), tokens).choose([0, 1, 2])
    assert acquired == chosen != []  # these are released once they are computed
    acquired.clear()
    host.submit = refuse
    with pytest.raises(RuntimeError, match="shutdown"):
        HybridSplit(host, None, 0, torch.zeros(1, 4), tokens).choose([0, 1, 2])
    assert acquired == []


def test_costs_are_fitted_and_never_below_zero() -> None:
    assert fit_line([1, 4, 16], [3.0, 6.0, 18.0]) == pytest.approx((2.0, 1.0))
    assert fit_line([1, 4, 16], [3.0, 2.9, 2.8]) == pytest.approx((2.8, 0.0), abs=0.3)
    fixed, row = fit_line([1, 4, 16], [0.1, 4.0, 16.0])
    assert fixed == 0
    assert row > 0


@pytest.mark.parametrize("case", [("mixtral", "float32"), ("gpt_oss", "bfloat16")], ids="-".join)
@pytest.mark.parametrize("kernel", ["eager", "grouped_mm"])
def test_outputs_differ_by_rounding_only(
    load: Load, tiny: Make, case: tuple[str, str], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finemoe.gpu.setup.measure_costs", lambda *_: HybridCosts(copy_s=1, fixed_s=0.9, row_s=0.01))
    folder = tiny(*case)
    options: dict[str, Any] = {"expert_memory": "60%", "expert_kernel": kernel}
    # lru does not prefetch, so that there are misses
    with load(folder, host_compute="auto", policy="lru", **options) as model:
        outputs = [logits(model) for _ in range(3)]
        stats = model.finemoe.stats()
        model.finemoe.check_integrity()
    assert 0 < stats.host_computed < stats.misses
    full = eager(folder)
    full.set_experts_implementation(kernel)
    expected = logits(full)
    for output in outputs:
        torch.testing.assert_close(output, expected, atol=0.1 if case[1] == "bfloat16" else 1e-4, rtol=0.01)
    if (case[1], kernel) == ("float32", "eager"):
        assert torch.equal(outputs[-1], expected)  # both run on the CPU, and results are added in eager's order


def test_long_prompts_are_not_computed_on_the_host(load: Load, tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finemoe.gpu.setup.measure_costs", lambda *_: HybridCosts(copy_s=1, fixed_s=0, row_s=0))
    with load(tiny("mixtral"), expert_memory="60%", host_compute="auto") as model:
        logits(model, batch=2)
        assert model.finemoe.stats().host_computed == 0


def test_costs_are_measured_at_load(load: Load, tiny: Make) -> None:
    with load(tiny("mixtral"), expert_memory="60%", host_compute="auto") as model:
        costs = model.finemoe._tiers._host_compute.costs
        assert costs.copy_s >= 0
        assert costs.on_host_s(1) > 0
