"""`FinemoePolicy` against a slow implementation of its formulas, and its history against a list."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.policy import make_policy
from finemoe.policy.finemoe.decode_step import update_scores
from finemoe.policy.finemoe.history import LEVELS, NO_ROW, append, encode_layer, make_history
from finemoe.policy.finemoe.policy import FinemoePolicy
from finemoe.policy.finemoe.search import Constants, SearchState, _nearest_loop, nearest
from finemoe.types import DECODE, PREFILL, Recorded, Routed, Step
from tests.policy.compile import compiled
from tests.policy.workload import Iteration, Shape, recorded, workload

SHAPE = Shape(layers=4, experts=6, active=2)
SIZE = (SHAPE.layers, SHAPE.experts)
Matrix = npt.NDArray[np.float64]


@dataclass
class Row:
    number: int
    prev: int  # number of the previous iteration, or -1
    token: int
    map: list[dict[int, int]]  # by layer: the executed experts and their weights


@dataclass
class PlainRequest:
    scores: dict[int, np.float32] = field(default_factory=dict)  # by number of the row
    frequency: Matrix = field(default_factory=lambda: np.zeros(SIZE))
    uses: Matrix = field(default_factory=lambda: np.zeros(SIZE))
    tokens: Matrix = field(default_factory=lambda: np.zeros(SHAPE.layers))
    map: list[dict[int, int]] = field(default_factory=list)
    last: int = -1


@dataclass
class PlainPolicy:
    """A slow implementation of the policy."""

    capacity: int
    constants: Constants
    rows: dict[int, Row] = field(default_factory=dict)
    running: dict[int, PlainRequest] = field(default_factory=dict)
    num_added: int = 0
    global_frequencies: Matrix = field(default_factory=lambda: np.full(SIZE, 1 / SHAPE.experts))
    iterations: Matrix = field(default_factory=lambda: np.zeros(SHAPE.layers))

    def add(self, row: Row) -> None:
        self.rows[self.num_added] = row
        self.rows.pop(self.num_added - self.capacity, None)
        self.num_added += 1

    def learn(self, past: Recorded) -> None:
        prev = -1
        for i in np.flatnonzero(past.phases == DECODE):
            for layer in range(SHAPE.layers):
                self.iterations[layer] += 1
                self.global_frequencies[layer] += (
                    past.executed[i, layer] - self.global_frequencies[layer]
                ) / self.iterations[layer]
            used = [encoded(past.gates[i, la], np.flatnonzero(past.executed[i, la])) for la in range(SHAPE.layers)]
            self.add(Row(self.num_added, prev, int(past.token_ids[i]), used))
            prev = self.num_added - 1

    def begin(self, steps: list[Step]) -> None:
        new_requests = [step.request for step in steps if step.request not in self.running]
        for request in new_requests:
            self.running[request] = PlainRequest(frequency=self.global_frequencies.copy())
        self.running = {step.request: self.running[step.request] for step in steps}
        for step in steps:
            state = self.running[step.request]
            state.map = []
            if not decodes(step):
                continue
            previous, state.scores = state.scores, {}
            for number, row in self.rows.items():
                score = np.float32(0)
                if row.prev in self.rows:
                    score = np.float32(self.constants.context) * previous.get(row.prev, np.float32(0))
                if row.token == step.token_ids[0]:
                    score += np.float32(self.constants.same_token)
                state.scores[number] = score

    def routed(self, event: Routed, steps: list[Step]) -> None:
        layer, gates = event.layer, event.gates
        assert gates is not None
        for step, gate in zip(steps, gates, strict=True):
            state = self.running[step.request]
            own = list(event.experts)
            if len(steps) > 1:
                own = [e for e in sorted(own, key=lambda e, g=gate: -g[e])[: SHAPE.active] if gate[e] > 0]  # type: ignore[misc]
            share = np.minimum(1, SHAPE.active * gate.astype(float) / gate.sum())
            if decodes(step):
                share = np.isin(np.arange(SHAPE.experts), own).astype(float)
                self.iterations[layer] += 1
                self.global_frequencies[layer] += (share - self.global_frequencies[layer]) / self.iterations[layer]
                state.map.append(encoded(gate, own))
                for expert, weight in state.map[-1].items():
                    for number, row in self.rows.items():
                        common = np.float32(weight) / np.float32(LEVELS**2) * np.float32(row.map[layer].get(expert, 0))
                        state.scores[number] += common
            for _ in step.token_ids:
                state.uses[layer] = self.constants.decay * state.uses[layer] + share
                state.tokens[layer] = self.constants.decay * state.tokens[layer] + 1
            state.frequency[layer] = (state.uses[layer] + self.global_frequencies[layer]) / (state.tokens[layer] + 1)

    def end(self, steps: list[Step]) -> None:
        for step in steps:
            state = self.running[step.request]
            if decodes(step):
                self.add(Row(self.num_added, state.last, int(step.token_ids[0]), state.map))
                state.last = self.num_added - 1

    def successor(self, number: int, count: int) -> int:
        for _ in range(count):
            number = next((row.number for row in self.rows.values() if row.prev == number), -2)
        return number

    def probabilities(self, step: Step, j: int) -> Matrix:
        state, constants = self.running[step.request], self.constants
        if not decodes(step):
            return 1 - (1 - state.frequency) ** (len(step.token_ids) if j == 0 else 1)
        near = sorted(self.rows, key=lambda number: (-state.scores[number], number % self.capacity))
        temperature = constants.temperature if j == 0 else constants.later_temperature
        votes, u = np.zeros(SIZE), []
        for number in near[: constants.neighbours]:
            row = self.rows.get(self.successor(number, j))
            if row is None:
                continue
            u.append(np.exp(float(state.scores[number]) / temperature))
            for layer, used in enumerate(row.map):
                votes[layer, list(used)] += u[-1]
        m = sum(u) ** 2 / sum(x * x for x in u) if u else 0
        c = 1 if j < 2 else 2
        return np.asarray((m * votes / (sum(u) or 1) + c * state.frequency) / (m + c))

    def scores(self, now: int, steps: list[Step]) -> Matrix:
        g, scores = self.constants.discount, np.zeros(SIZE)
        p = [
            1 - np.prod([1 - self.probabilities(s, j) for s in steps], axis=0)
            for j in range(self.constants.horizon + 1)
        ]
        rho = 1 - np.prod([1 - self.running[step.request].frequency for step in steps], axis=0)
        for layer in range(SHAPE.layers):
            h = rho[layer] / (1 - g * (1 - rho[layer]))
            for q in reversed(p[2:]):
                h = q[layer] + (1 - q[layer]) * g * h
            p1, p2 = p[0][layer], p[1][layer] if len(p) > 1 else None
            rest = h if p2 is None else p2 + (1 - p2) * g * h
            if layer > now:
                scores[layer] = g ** ((layer - now) / SHAPE.layers) * (p1 + (1 - p1) * g * rest)
            else:
                scores[layer] = g ** ((layer - now + SHAPE.layers) / SHAPE.layers) * rest
        return scores


def decodes(step: Step) -> bool:
    return step.phase == DECODE


def encoded(gate: npt.NDArray[np.float32], used: npt.NDArray[np.intp] | list[int]) -> dict[int, int]:
    total = float(sum(gate[e] for e in used))
    order = sorted(used, key=lambda e: -gate[e])[: SHAPE.active]
    return {int(e): round(LEVELS * (float(gate[e]) / total) ** 0.5) for e in order}


def play(policy: FinemoePolicy, played: list[Iteration]) -> None:
    for iteration in played:
        policy.begin(iteration.steps)
        for event in iteration.events:
            policy.routed(event)
        policy.end()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 3), st.booleans(), st.sampled_from([1, 3, 32]),
    st.sampled_from([0, 1, 5]), st.sampled_from([0, 2]),
)  # fmt: skip
def test_policy_matches_its_formulas(
    seed: int, capacity: int, batch: int, truncated: bool, neighbours: int, horizon: int, known: int
) -> None:
    constants = Constants(neighbours=neighbours, horizon=horizon)
    fast = FinemoePolicy(SHAPE.layers, SHAPE.experts, capacity, SHAPE.active, constants=constants)
    plain = PlainPolicy(capacity, constants)
    for i in range(known):
        fast.learn(recorded(seed + i, SHAPE, length=8))
        plain.learn(recorded(seed + i, SHAPE, length=8))
    for iteration in workload(seed + 2, SHAPE, iterations=9, batch=batch, truncated=truncated):
        steps = [step._replace(embedding=None) for step in iteration.steps]
        fast.begin(steps)
        plain.begin(steps)
        np.testing.assert_allclose(fast.retention_priority, plain.scores(-1, steps), rtol=1e-5)
        for event in (event._replace(lookahead=None) for event in iteration.events):
            fast.routed(event)
            plain.routed(event, steps)
            for step in filter(decodes, steps):
                scores = fast._running[step.request].search.scores
                for number, score in plain.running[step.request].scores.items():
                    assert scores[number % capacity] == pytest.approx(score, abs=1e-5)
            np.testing.assert_allclose(fast.retention_priority, plain.scores(event.layer, steps), rtol=1e-5, atol=1e-12)
        fast.end()
        plain.end(steps)
    assert fast.prefetch_priority is fast.retention_priority


@given(st.integers(1, 9), st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), max_size=30))
def test_rows_are_linked_to_predecessor_and_successor_until_these_are_overwritten(
    capacity: int, pieces: list[tuple[int, int]]
) -> None:
    history, number = make_history(2, 5, 2, capacity), 0
    last = dict.fromkeys(range(3), NO_ROW)
    before: dict[int, int] = {}
    random = np.random.default_rng(0)
    maps = {}
    for request, count in pieces:
        ids = np.sort(np.argsort(random.random((count, 2, 5)))[..., :2]).astype(np.uint8)
        append(history, number, np.full(count, request, np.int32), ids, np.full_like(ids, 9), last[request])
        for i in range(count):
            before[number + i] = last[request]
            last[request] = number + i
            maps[number + i] = ids[i]
        number += count
    present = range(max(0, number - capacity), number)
    expected = np.zeros_like(history.columns)
    for each in present:
        row = each % capacity
        follower = next((n for n in present if before[n] == each), NO_ROW)
        assert history.prev[row] == (before[each] % capacity if before[each] in present else NO_ROW)
        assert history.next[row] == (follower % capacity if follower != NO_ROW else NO_ROW)
        np.testing.assert_array_equal(history.ids[row], maps[each])
        for layer in range(2):
            expected[layer, maps[each][layer], row] = 9
    np.testing.assert_array_equal(history.columns, expected)


@given(st.lists(st.integers(0, 5), max_size=400), st.integers(1, 40))
def test_nearest_rows_have_the_highest_scores_and_ties_go_to_the_lowest_row(scores: list[int], count: int) -> None:
    expected = sorted(range(len(scores)), key=lambda row: (-scores[row], row))[:count]
    for find in (nearest, _nearest_loop):
        unused = np.zeros((1, 1)), np.zeros((1, 1, 1))
        padded = np.array([*scores, 99], np.float32)
        search = SearchState(padded, np.zeros(count, np.int64), np.zeros(count, np.float32), *unused)
        assert find(len(scores), search) == len(expected)
        assert search.rows[: len(expected)].tolist() == expected
        assert search.top[: len(expected)].tolist() == [scores[row] for row in expected]


def test_weights_are_the_roots_of_the_gate_shares() -> None:
    ids, weights = np.empty(3, np.uint8), np.empty(3, np.uint8)
    encode_layer(np.array([0.1, 0.5, 0, 0.4], np.float32), np.array([True, False, False, True]), ids, weights)
    assert ids.tolist() == [3, 0, 4]
    assert weights.tolist() == [round(LEVELS * 0.8**0.5), round(LEVELS * 0.2**0.5), 0]
    encode_layer(np.zeros(4, np.float32), np.array([True, False, False, True]), ids, weights)
    assert ids.tolist() == [0, 3, 4]
    assert weights[0] == weights[1] == round(LEVELS * 0.5**0.5)


def test_scores_are_the_discounted_probability_of_the_next_use() -> None:
    probabilities, frequency, scores = np.zeros((2, 2, 3)), np.zeros((2, 3)), np.zeros((2, 3))
    probabilities[0, 1, 0] = 1.0  # next layer
    probabilities[1, 0, 1] = 1.0  # next iteration, first layer
    frequency[:, 2] = 1.0  # every iteration from the one after next on
    update_scores(0, 0.25, probabilities, frequency, scores)
    np.testing.assert_allclose(scores, [[0, 0.25, 0.25**2], [0.5, 0, 0.5 * 0.25**2]])


def test_a_repeated_iteration_and_its_successor_are_predicted() -> None:
    policy = FinemoePolicy(SHAPE.layers, SHAPE.experts, constants=Constants(neighbours=1))
    played = workload(0, SHAPE, iterations=6, batch=1)
    played = [
        Iteration([Step(9, DECODE, np.array([i], np.int32))], iteration.events) for i, iteration in enumerate(played)
    ]
    play(policy, played)
    policy.begin([Step(10, DECODE, np.array([0], np.int32))])
    for event in played[0].events:
        policy.routed(event._replace(lookahead=None))
    expected = policy._running[10].search.probabilities[1]
    for layer, event in enumerate(played[1].events):
        assert set(np.argsort(-expected[layer])[: SHAPE.active].tolist()) == set(event.experts)


def test_iterations_are_added_at_once_or_when_their_request_ends() -> None:
    played = [it for it in workload(3, SHAPE, iterations=30, batch=1) if decodes(it.steps[0])]
    at_once, later = FinemoePolicy(*SIZE), FinemoePolicy(*SIZE, without=frozenset({"own"}))
    play(at_once, played)
    play(later, played)
    current = played[-1].steps[0].request
    own = sum(it.steps[0].request == current for it in played)
    assert at_once.num_added == len(played)
    assert later.num_added == len(played) - own > 0
    assert later.history is not None
    assert at_once.history is not None
    np.testing.assert_array_equal(later.history.ids[: later.num_added], at_once.history.ids[: later.num_added])
    np.testing.assert_array_equal(
        later.history.next[: later.num_added - 1], at_once.history.next[: later.num_added - 1]
    )


def test_an_incomplete_iteration_is_not_added() -> None:
    policy = FinemoePolicy(*SIZE)
    (cut,) = (it for it in workload(0, SHAPE, batch=1)[1:2])
    policy.begin(cut.steps)
    for event in cut.events[:-1]:
        policy.routed(event)
    policy.end()
    assert policy.num_added == 0


def test_experts_that_were_never_used_are_not_prefetched() -> None:
    policy = FinemoePolicy(SHAPE.layers, SHAPE.experts + 1)
    for iteration in workload(0, SHAPE):
        policy.begin(iteration.steps)
        for event in iteration.events:
            wider = None if event.gates is None else np.pad(event.gates, ((0, 0), (0, 1)))
            policy.routed(event._replace(gates=wider, lookahead=None))
        policy.end()
    assert (policy.prefetch_priority[:, : SHAPE.experts] > 0).any()
    assert not policy.prefetch_priority[:, SHAPE.experts].any()


def test_the_first_prompt_is_prefetched_in_layer_order() -> None:
    """Nothing is known yet: layers to come have priority in their order, and over layers that have run."""
    policy = FinemoePolicy(*SIZE)
    policy.begin([Step(0, PREFILL, np.arange(50, dtype=np.int32))])
    assert (np.diff(policy.prefetch_priority.mean(axis=1)) < 0).all()
    gates = np.full((1, SHAPE.experts), 1 / SHAPE.experts, np.float32)
    policy.routed(Routed(0, tuple(range(SHAPE.experts)), gates))
    assert policy.prefetch_priority[1].min() > policy.prefetch_priority[0].max() + policy.margin
    assert (np.diff(policy.prefetch_priority[1:].mean(axis=1)) < 0).all()


def test_default_capacity_follows_from_the_memory_limit() -> None:
    assert FinemoePolicy(24, 32).capacity >= 87_000
    assert FinemoePolicy(61, 256).capacity * 61 * 256 <= 128 << 20


def test_more_than_255_experts_are_supported() -> None:
    shape = Shape(layers=2, experts=300, active=3)
    plain, fast = (make_policy("finemoe", 2, 300, **options) for options in ({}, {"jit": compiled}))
    for made in (plain, fast):
        made.learn(recorded(0, shape))
    for iteration in workload(1, shape, iterations=3):
        for made in (plain, fast):
            made.begin(iteration.steps)
            for event in iteration.events:
                made.routed(event)
            made.end()
        np.testing.assert_allclose(fast.retention_priority, plain.retention_priority, rtol=1e-5)
