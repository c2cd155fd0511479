"""Simulating a model's recorded routing against running the model on a virtual link: same actions, counts and times.

Policies that use gates are compared in test_agreement.py: a trace stores gates in half precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import finemoe
from finemoe.model.router_hooks import RouterTap
from finemoe.policy import make_policy
from finemoe.sim.hardware import Machine
from finemoe.sim.simulator import Simulation
from finemoe.sim.workload import TraceView, make_schedule
from finemoe.trace import DECODE, PREFILL, RequestTrace, TraceHeader, TraceWriter, open_trace
from finemoe.types import ExpertId, Routed
from tests.sim.virtual_link import EngineDriver, LoggedCacheManager, VirtualLink
from tests.tiny import Make

POLICIES = ("lru", "lfu", "lfru", "deepspeed")
LINK_RATIO, CHUNKS, PROMPT, NEW_TOKENS = 0.6, 4, 12, 10


def continue_prompts(model: Any) -> list[torch.Tensor]:
    """Generates from two prompts in turn; returns the tokens."""
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 90, (2, PROMPT), generator=draw)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(prompt[None], attention_mask=torch.ones(1, PROMPT), **options) for prompt in prompts]


def record(folder: Path, path: Path) -> list[torch.Tensor]:
    """Records the model's routing to `path`. Returns the tokens."""
    with finemoe.load(folder, expert_memory="all", policy="lru") as model:
        tap = RouterTap(model)
        with tap.recording():
            tokens = continue_prompts(model)
        passes = tap.take()
    active = passes[0].ids.shape[2]
    header = TraceHeader(model="tapped", layers=tap.layers, experts=tap.experts, active=active)
    with TraceWriter(path, header) as writer:
        for first in (0, NEW_TOKENS):
            own = passes[first : first + NEW_TOKENS]
            ids = torch.cat([each.ids for each in own]).numpy()
            writer.add(
                RequestTrace(
                    phases=np.array([PREFILL] + [DECODE] * (NEW_TOKENS - 1), np.uint8),
                    rows=np.cumsum([0, *(len(each.ids) for each in own)]),
                    token_ids=torch.cat([each.token_ids.flatten() for each in own]).numpy().astype(np.int32),
                    expert_ids=np.where(ids < header.experts, ids, header.sentinel).astype(header.id_dtype),
                )
            )
    return tokens


def attach_virtual_link(model: Any, policy: str, link: VirtualLink, experts: int) -> EngineDriver:
    """Gives a loaded model an engine on the link's virtual clock; the weights still come from the checkpoint."""
    offload = model.finemoe
    store, pool, layers = offload._store, offload._engine.pool, len(offload.expert_index.layouts)

    def fill(expert: ExpertId, slot: memoryview) -> None:
        for run in store.byte_ranges(expert):
            for start in range(0, run.length_bytes, 1 << 20):
                end = min(run.length_bytes, start + (1 << 20))
                store.read(run, start, slot[run.slot_offset_bytes + start : run.slot_offset_bytes + end])

    link.fill = fill
    offload._engine.clear()
    cache_manager = LoggedCacheManager(layers, experts, pool.slots, make_policy(policy, layers, experts))
    replay = EngineDriver.make_with(pool, cache_manager, link)
    serve = replay.engine.serve

    def timed(event: Routed) -> Iterator[tuple[int, int]]:
        link.advance(link.now + 0.5)  # up to the gate
        return replay.timed(serve(event), 0.5 / len(event.experts))

    replay.engine.serve = timed  # type: ignore[method-assign]
    for layer in offload._layers:
        assert layer.accumulator is not None, "the reference path serves experts one by one"
        layer.engine = replay.engine
    offload._engine = replay.engine
    return replay


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "reference"])
def test_simulating_a_models_trace_matches_the_model(
    kind: str, tiny: Make, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue("reference_model") if kind == "reference" else tiny(kind)
    path = tmp_path / "trace.safetensors"
    expected = record(folder, path)
    with open_trace(path) as trace:
        layers, experts = trace.header.layers, trace.header.experts
        schedule, view = make_schedule(trace, [0, 1]), TraceView(trace)
        for policy in POLICIES if kind != "reference" else ("lfru", "deepspeed"):  # which is slow
            with finemoe.load(folder, expert_memory="30%", policy=policy) as model:
                slots = model.finemoe.stats().slots
                link = VirtualLink(LINK_RATIO, CHUNKS)
                driver = attach_virtual_link(model, policy, link, experts)
                found = continue_prompts(model)
            machine = Machine(slots, LINK_RATIO, chunks=CHUNKS)
            outcome = Simulation(schedule, view, make_policy(policy, layers, experts), machine, log=1_000_000).run()
            counters = driver.engine.counters
            assert all(map(torch.equal, found, expected)), policy
            assert driver.actions(experts) == [tuple(row) for row in outcome.log.tolist()], policy
            assert (counters.hits, counters.late, counters.misses) == (outcome.hits, outcome.late, outcome.misses)
            assert link.now == pytest.approx(outcome.total, rel=1e-9)
            assert counters.stall_s == pytest.approx(outcome.stall, rel=1e-9)
