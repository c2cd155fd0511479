"""Prefetches that do not pay are paused, and tried again."""

from __future__ import annotations

import numpy as np
import pytest

from finemoe.compiled import compiler
from finemoe.policy import Controller, Policy
from finemoe.policy.book import (
    ABSENT,
    LOST,
    NONE,
    PAUSE_ITERATIONS,
    PAUSED,
    REGRETTED,
    RESIDENT,
    WINDOW,
    begin_prefetch,
    choose_prefetch,
    make_book,
    need,
    review,
)
from finemoe.types import ExpertId, Routed

LAYERS, EXPERTS = 1, 3


class Wishful(Policy):
    """Wants whatever is absent, and is wrong: the layer always needs expert 0."""

    prefetches = True
    pauses = True
    margin = -1.0

    def __init__(self, *, right: bool) -> None:
        super().__init__(LAYERS, EXPERTS)
        self.want[:] = 1.0
        self.right = right


def run(policy: Wishful, iterations: int) -> Controller:
    """One slot. Between iterations something is prefetched; the layer needs that, or what it displaced."""
    controller = Controller(LAYERS, EXPERTS, 1, policy)
    needed = 0
    for _ in range(iterations):
        controller.begin(())
        fetch = controller.prefetch()
        if fetch is not None:
            controller.landed(fetch.expert)
            if policy.right:
                needed = fetch.expert.expert
        for missing in controller.routed(Routed(0, [needed])).fetches:
            controller.landed(missing.expert)
        controller.used(ExpertId(0, needed))
        controller.end()
    return controller


def test_prefetches_that_displace_more_than_they_bring_are_paused_and_tried_again() -> None:
    book = run(Wishful(right=False), WINDOW + 3 * PAUSE_ITERATIONS + WINDOW).book
    assert book.tally[PAUSED] == 2 * PAUSE_ITERATIONS
    assert book.tally[REGRETTED] >= 2 * WINDOW - 2


def test_prefetches_that_pay_are_not_paused() -> None:
    book = run(Wishful(right=True), 4 * WINDOW).book
    assert book.tally[PAUSED] == 0
    assert book.account[LOST] == 0


def test_a_policy_that_does_not_ask_for_it_is_never_paused() -> None:
    policy = Wishful(right=False)
    policy.pauses = False
    assert run(policy, 4 * WINDOW).book.tally[PAUSED] == 0


def test_what_comes_back_by_prefetch_is_not_regretted() -> None:
    book = make_book(LAYERS, EXPERTS, 1)
    worth = np.zeros(EXPERTS)
    for expert in (0, 1, 0):
        begin_prefetch(book, worth, expert)
        book.status[expert] = RESIDENT
    need(book, 0)
    assert book.tally[REGRETTED] == 0
    assert book.status[1] == ABSENT
    need(book, 1)
    assert book.tally[REGRETTED] == 1
    need(book, 1)
    assert book.tally[REGRETTED] == 1


@pytest.mark.parametrize("compile_it", [False, True])
def test_nothing_is_chosen_while_paused(compile_it: bool) -> None:
    jit = compiler() if compile_it else lambda kernel: kernel
    book, want = make_book(LAYERS, EXPERTS, 2), np.ones(EXPERTS)
    choose, step = jit(choose_prefetch), jit(review)
    assert choose(book, want, want, 0.1, 0) == 0
    book.account[:] = [WINDOW, 1, 1, 0]
    step(book)
    assert choose(book, want, want, 0.1, 0) == NONE
    for _ in range(PAUSE_ITERATIONS):
        step(book)
    assert choose(book, want, want, 0.1, 0) == 0
    assert book.tally[PAUSED] == PAUSE_ITERATIONS


def test_experts_that_a_layer_has_not_are_never_asked_for() -> None:
    policy = Policy(2, EXPERTS)
    policy.want[:] = 1.0
    controller = Controller(2, EXPERTS, 6, policy, sizes=(1, 3))
    got = []
    while (fetch := controller.prefetch()) is not None:
        got.append(fetch.expert)
        controller.landed(fetch.expert)
    assert sorted(got) == [ExpertId(0, 0), ExpertId(1, 0), ExpertId(1, 1), ExpertId(1, 2)]
    controller.check_integrity()
