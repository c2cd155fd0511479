"""Batched jobs give the answers of `generate`, token for token."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import finemoe
from finemoe.serving.config import ServeConfig
from finemoe.serving.scheduler.job import Finished, Job, Token
from finemoe.serving.scheduler.paged_batch import BLOCK_TOKENS, PagedBatch, _allocated_bytes
from tests.serving.conftest import SMALL, a_prompt, greedy, serving
from tests.serving.recording_listener import RecordingListener
from tests.tiny import Make, eager

LENGTHS = (50, 7, 23, 1, 16, 17)  # a pass has 16 tokens: several passes, a part, exactly one, and one token too many
SEQUENTIAL = {"deepseek_v3", "qwen3_next"}  # keys and values that differ in width; recurrent state
BATCHED = {
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "gemma4_text", "granitemoe", "phimoe", "glm4_moe",
    "minimax_m2",
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(BATCHED | SEQUENTIAL))
def test_batched_jobs_answer_as_generate_does(tiny: Make, family: str) -> None:
    folder = tiny(family)
    eager_model = eager(folder)
    prompts = [a_prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    with finemoe.load(folder, expert_memory="60%") as model, serving(model) as worker:
        assert worker.batches == (family not in SEQUENTIAL)
        listener = RecordingListener()
        for name, prompt in enumerate(prompts):
            worker.submit(Job(str(name), prompt, 9), listener)
        assert listener.wait(*map(str, range(len(prompts)))) == [Finished("length")] * len(prompts)
        for name, prompt in enumerate(prompts):
            assert listener.ids(str(name)) == greedy(eager_model, prompt, 9)


Arrivals = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(0, 30)), min_size=1, max_size=7)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrivals=Arrivals)
def test_arrival_times_do_not_change_answers(
    offloaded: Any, eager_model: Any, arrivals: list[tuple[int, int, int]]
) -> None:
    """An arrival: the lengths of prompt and answer, and how many tokens of other jobs precede it."""
    waiting = sorted(enumerate(arrivals), key=lambda each: each[1][2])
    generated = 0

    def submit_due(_name: str, event: Token | Finished) -> None:
        nonlocal generated
        generated += isinstance(event, Token)
        idle = isinstance(event, Finished) and worker.load().running == 0
        while waiting and (waiting[0][1][2] <= generated or idle):
            name, (length, new_tokens, _) = waiting.pop(0)
            worker.submit(Job(str(name), a_prompt(length, name), new_tokens), listener)

    listener = RecordingListener(submit_due)
    with serving(offloaded) as worker:
        name, (length, new_tokens, _) = waiting.pop(0)
        worker.submit(Job(str(name), a_prompt(length, name), new_tokens), listener)
        listener.wait(*(str(name) for name in range(len(arrivals))))
    for number, (length, new_tokens, _) in enumerate(arrivals):
        assert listener.ids(str(number)) == greedy(eager_model, a_prompt(length, number), new_tokens)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_preempted_jobs_answer_as_if_they_had_not_been(tiny: Make, family: str) -> None:
    folder = tiny(family)
    eager_model = eager(folder)
    prompts = [a_prompt(BLOCK_TOKENS - 4 + 3 * seed, seed) for seed in range(4)]
    with finemoe.load(folder, expert_memory="60%") as model:
        with serving(model) as probe:
            block_bytes = (1 << 20) // (probe.load().cache_blocks + 2)
        with serving(model, cache_bytes=str(7 * block_bytes)) as worker:
            assert worker.load().cache_blocks < 2 * len(prompts)
            listener = RecordingListener()
            for name, prompt in enumerate(prompts):
                worker.submit(Job(str(name), prompt, 30), listener)
            assert listener.wait(*map(str, range(4))) == [Finished("length")] * 4
            for name, prompt in enumerate(prompts):
                assert listener.ids(str(name)) == greedy(eager_model, prompt, 30)


def test_a_job_that_fills_the_cache_ends_with_length(offloaded: Any, eager_model: Any) -> None:
    with serving(offloaded, cache_bytes="100KiB") as worker:
        prompt, listener = a_prompt(worker.capacity_tokens - 5), RecordingListener()
        worker.submit(Job("long", prompt, 1000), listener)
        worker.submit(Job("short", prompt[:9], 4), listener)
        assert listener.wait("long", "short") == [Finished("length"), Finished("length")]
        assert listener.ids("long") == greedy(eager_model, prompt, 6)
        assert listener.ids("short") == greedy(eager_model, prompt[:9], 4)
        worker.submit(Job("full", a_prompt(worker.capacity_tokens), 1000), listener)
        listener.wait("full")
        assert len(listener.ids("full")) == 1


def test_a_cached_prefix_is_not_computed_again(offloaded: Any, eager_model: Any) -> None:
    prompt, listener, tokens = a_prompt(3 * BLOCK_TOKENS + 5), RecordingListener(), [0]
    hook = offloaded.get_input_embeddings().register_forward_hook(
        lambda _module, given, _output: tokens.__setitem__(0, tokens[0] + given[0].numel())
    )
    with serving(offloaded) as worker:
        counts = []
        for name, tokens_in in {"first": prompt, "again": prompt, "longer": [*prompt, 7, 8]}.items():
            before = tokens[0]
            worker.submit(Job(name, tokens_in, 3), listener)
            listener.wait(name)
            counts.append(tokens[0] - before)
            assert listener.ids(name) == greedy(eager_model, tokens_in, 3)
    hook.remove()
    assert counts == [len(prompt) + 2, 5 + 2, 5 + 2 + 2]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize(
    "settings", [{"cache_bytes": "150KiB"}, {}, {"cache_bytes": "64MiB", "max_batch_tokens": 512}], ids=str
)
def test_the_cache_stays_within_its_limit(tiny: Make, family: str, settings: dict[str, Any]) -> None:
    config, model = ServeConfig(**SMALL | settings), eager(tiny(family))
    batch = PagedBatch(model, config.key_value_bytes, config.max_batch_tokens, config.max_running)
    taken = _allocated_bytes(batch._processor)
    assert taken <= config.key_value_bytes
    usable = config.max_running * model.config.max_position_embeddings // BLOCK_TOKENS
    assert taken > config.key_value_bytes // 2 or batch.blocks == usable
    assert batch.capacity_tokens >= (batch.blocks - 2) * BLOCK_TOKENS
