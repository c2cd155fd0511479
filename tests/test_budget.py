"""Budgets: what can be read, what is refused, and how many experts a budget pays for."""

from __future__ import annotations

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from finemoe.budget import Budget, budget_text, format_bytes, parse_budget
from finemoe.errors import BudgetError


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("25%", Budget(share=0.25)),
        (" 12.5 % ", Budget(share=0.125)),
        ("100%", Budget(share=1.0)),
        ("all", Budget(share=1.0)),
        ("ALL", Budget(share=1.0)),
        ("2GiB", Budget(size_bytes=2 << 30)),
        ("2 gib", Budget(size_bytes=2 << 30)),
        ("1.5GiB", Budget(size_bytes=3 << 29)),
        ("800MB", Budget(size_bytes=800_000_000)),
        ("800KB", Budget(size_bytes=800_000)),
        ("1KiB", Budget(size_bytes=1024)),
        ("1TiB", Budget(size_bytes=1 << 40)),
        ("4096", Budget(size_bytes=4096)),
        ("4096B", Budget(size_bytes=4096)),
    ],
)
def test_budgets_are_bytes_shares_or_all(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    "text",
    ["0", "0%", "0GiB", "-1", "-5%", "-2GiB", "101%", "100.1%", "1e400%", "", " ", "garbage", "nan", "nan%", "inf",
     "25%%", "GiB", "2 GiB 3", "2XB", "1,5GiB", "0x10", "%", "all of it", "0.0000001", "1e3"],
)  # fmt: skip
def test_other_budgets_are_refused_in_one_line_that_names_the_flag(text: str) -> None:
    with pytest.raises(BudgetError, match=r"^--expert-memory: .*$") as caught:
        parse_budget(text)
    assert "\n" not in str(caught.value)
    assert text in str(caught.value)


@given(st.text())
@example("9" * 400)
@example("9" * 400 + "GiB")
@example("9" * 400 + "%")
def test_any_text_is_a_budget_or_a_budget_error(text: str) -> None:
    try:
        budget = parse_budget(text)
    except BudgetError:
        return
    assert (budget.size_bytes is None) != (budget.share is None)
    assert budget.share is None or 0 < budget.share <= 1
    assert budget.size_bytes is None or budget.size_bytes > 0


@pytest.mark.parametrize(
    ("number", "budget"),
    [
        (0.5, Budget(share=0.5)),
        (1.0, Budget(share=1.0)),
        (0.07, Budget(share=0.07)),
        (0.00001, Budget(share=0.00001)),
        (1 << 30, Budget(size_bytes=1 << 30)),
        (1, Budget(size_bytes=1)),
        ("25%", Budget(share=0.25)),
    ],
)
def test_of_numbers_an_int_is_bytes_and_a_float_a_share(number: object, budget: Budget) -> None:
    read = parse_budget(budget_text(number))
    assert read.size_bytes == budget.size_bytes
    assert read.share == pytest.approx(budget.share)


@pytest.mark.parametrize("number", [0, -1, 0.0, -0.5, 1.5, float("nan"), float("inf"), None, True, ["25%"]])
def test_what_is_neither_bytes_nor_a_share_is_refused_by_name(number: object) -> None:
    with pytest.raises(BudgetError, match=r"^--host-memory: "):
        parse_budget(budget_text(number, "--host-memory"), "--host-memory")


@given(st.integers(1, 100), st.integers(1, 1 << 20), st.integers(1, 10_000))
def test_a_share_pays_for_that_share_of_the_experts_rounded_down(percent: int, slot_bytes: int, experts: int) -> None:
    assert parse_budget(f"{percent}%").slots(slot_bytes, experts) == percent * experts // 100


@given(st.integers(1, 1 << 50), st.integers(1, 1 << 30), st.integers(1, 10_000))
def test_bytes_are_a_hard_limit(size_bytes: int, slot_bytes: int, experts: int) -> None:
    slots = parse_budget(str(size_bytes)).slots(slot_bytes, experts)
    assert slots * slot_bytes <= size_bytes
    assert slots <= experts
    assert slots == experts or (slots + 1) * slot_bytes > size_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 29, "1.5 GiB"),
     (7 << 40, "7.0 TiB"), (9000 << 40, "9000.0 TiB"), (-2048, "-2.0 KiB")],
)  # fmt: skip
def test_bytes_are_shown_in_binary_units(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(1, 1 << 45))
def test_shown_bytes_can_be_read_again(count: int) -> None:
    shown = parse_budget(format_bytes(count)).size_bytes
    assume(shown is not None)
    assert shown == pytest.approx(count, rel=0.06)
