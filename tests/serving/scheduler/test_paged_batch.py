"""Answers of jobs that run together are those of `generate`, token for token."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import finemoe
from finemoe.serving.config import ServeConfig
from finemoe.serving.scheduler.job import Finished, Job, Token
from finemoe.serving.scheduler.paged_batch import PAGE_TOKENS, PagedBatch, _allocated_bytes
from tests.serving.conftest import SMALL, a_prompt, greedy, serving
from tests.serving.listening import Ear
from tests.tiny import Make, eager

LENGTHS = (50, 7, 23, 1, 16, 17)  # passes have 16 tokens: more than one, a part, exactly one, and one too many
SINGLY = {"deepseek_v3", "qwen3_next"}  # keys and values of two widths; a state beside the cache


BATCHED = {
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "gemma4_text", "granitemoe", "phimoe", "glm4_moe",
    "minimax_m2",
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(BATCHED | SINGLY))
def test_jobs_that_run_together_answer_as_generate_does(tiny: Make, family: str) -> None:
    folder = tiny(family)
    whole = eager(folder)
    prompts = [a_prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    with finemoe.load(folder, expert_memory="60%") as model, serving(model) as worker:
        assert worker.batches == (family not in SINGLY)
        ear = Ear()
        for name, prompt in enumerate(prompts):
            worker.submit(Job(str(name), prompt, 9), ear)
        assert ear.wait(*map(str, range(len(prompts)))) == [Finished("length")] * len(prompts)
        for name, prompt in enumerate(prompts):
            assert ear.ids(str(name)) == greedy(whole, prompt, 9)


Arrivals = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(0, 30)), min_size=1, max_size=7)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrivals=Arrivals)
def test_when_jobs_come_and_go_does_not_change_their_answers(
    offloaded: Any, whole: Any, arrivals: list[tuple[int, int, int]]
) -> None:
    """Each arrival is the length of a prompt and of its answer, and after how many tokens of others it comes."""
    waiting = sorted(enumerate(arrivals), key=lambda each: each[1][2])
    heard = 0

    def come(_name: str, news: Token | Finished) -> None:
        nonlocal heard
        heard += isinstance(news, Token)
        idle = isinstance(news, Finished) and worker.load().running == 0
        while waiting and (waiting[0][1][2] <= heard or idle):
            name, (length, new_tokens, _) = waiting.pop(0)
            worker.submit(Job(str(name), a_prompt(length, name), new_tokens), ear)

    ear = Ear(come)
    with serving(offloaded) as worker:
        name, (length, new_tokens, _) = waiting.pop(0)
        worker.submit(Job(str(name), a_prompt(length, name), new_tokens), ear)
        ear.wait(*(str(name) for name in range(len(arrivals))))
    for number, (length, new_tokens, _) in enumerate(arrivals):
        assert ear.ids(str(number)) == greedy(whole, a_prompt(length, number), new_tokens)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_jobs_that_must_make_room_for_others_answer_as_if_they_had_not(tiny: Make, family: str) -> None:
    folder = tiny(family)
    whole = eager(folder)
    prompts = [a_prompt(PAGE_TOKENS - 4 + 3 * seed, seed) for seed in range(4)]
    with finemoe.load(folder, expert_memory="60%") as model:
        with serving(model) as probe:
            block_bytes = (1 << 20) // (probe.load().cache_blocks + 2)
        with serving(model, cache_bytes=str(7 * block_bytes)) as worker:
            assert worker.load().cache_blocks < 2 * len(prompts)
            ear = Ear()
            for name, prompt in enumerate(prompts):
                worker.submit(Job(str(name), prompt, 30), ear)
            assert ear.wait(*map(str, range(4))) == [Finished("length")] * 4
            for name, prompt in enumerate(prompts):
                assert ear.ids(str(name)) == greedy(whole, prompt, 30)


def test_a_job_that_fills_the_cache_ends_as_by_max_tokens(offloaded: Any, whole: Any) -> None:
    with serving(offloaded, cache_bytes="100KiB") as worker:
        prompt, ear = a_prompt(worker.capacity_tokens - 5), Ear()
        worker.submit(Job("long", prompt, 1000), ear)
        worker.submit(Job("short", prompt[:9], 4), ear)
        assert ear.wait("long", "short") == [Finished("length"), Finished("length")]
        assert ear.ids("long") == greedy(whole, prompt, 6)
        assert ear.ids("short") == greedy(whole, prompt[:9], 4)
        worker.submit(Job("full", a_prompt(worker.capacity_tokens), 1000), ear)
        ear.wait("full")
        assert len(ear.ids("full")) == 1


def test_what_a_prompt_shares_with_an_earlier_one_is_not_computed_again(offloaded: Any, whole: Any) -> None:
    prompt, ear, tokens = a_prompt(3 * PAGE_TOKENS + 5), Ear(), [0]
    hook = offloaded.get_input_embeddings().register_forward_hook(
        lambda _module, given, _output: tokens.__setitem__(0, tokens[0] + given[0].numel())
    )
    with serving(offloaded) as worker:
        counts = []
        for name, asked in {"first": prompt, "again": prompt, "longer": [*prompt, 7, 8]}.items():
            before = tokens[0]
            worker.submit(Job(name, asked, 3), ear)
            ear.wait(name)
            counts.append(tokens[0] - before)
            assert ear.ids(name) == greedy(whole, asked, 3)
    hook.remove()
    assert counts == [len(prompt) + 2, 5 + 2, 5 + 2 + 2]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize(
    "settings", [{"cache_bytes": "150KiB"}, {}, {"cache_bytes": "64MiB", "max_batch_tokens": 512}], ids=str
)
def test_the_cache_keeps_to_its_memory(tiny: Make, family: str, settings: dict[str, Any]) -> None:
    config, model = ServeConfig(**SMALL | settings), eager(tiny(family))
    batch = PagedBatch(model, config.key_value_bytes, config.max_batch_tokens, config.max_running)
    taken = _allocated_bytes(batch._processor)
    assert taken <= config.key_value_bytes
    usable = config.max_running * model.config.max_position_embeddings // PAGE_TOKENS
    assert taken > config.key_value_bytes // 2 or batch.blocks == usable
    assert batch.capacity_tokens >= (batch.blocks - 2) * PAGE_TOKENS
