"""Continued conversations, sampling, loading without reading experts, and gates as inputs of policies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.gguf.conftest import MakeFile

Load = Callable[..., Any]
HYBRID, WINDOWED, PLAIN = "lfm2moe", "gpt-oss", "qwen3moe"


def computed(model: Any, tokens: list[int], count: int, **options: Any) -> tuple[list[int], int]:
    """The answer, and the number of prompt tokens that were computed."""
    seen: list[int] = []
    answer = list(model.generate(tokens, count, on_prefill=seen.append, **options))
    return answer, sum(seen[1:])


@pytest.mark.parametrize("arch", [PLAIN, WINDOWED, HYBRID])
def test_a_conversation_computes_its_new_tokens_alone(random_gguf: MakeFile, loaded: Load, arch: str) -> None:
    from tests.gguf.run import LONG

    model, fresh = loaded(random_gguf(arch), "50%"), loaded(random_gguf(arch), "50%")
    turns = list(LONG[:20])
    for turn in range(3):
        answer, count = computed(model, turns, 5)
        assert count == (20 if turn == 0 else 8)
        assert len(answer) == 5
        turns += [*answer, *LONG[30 + 7 * turn : 37 + 7 * turn]]
    assert computed(fresh, turns, 1)[1] == len(turns)


@pytest.mark.parametrize("arch", [PLAIN, WINDOWED])
def test_a_shared_prefix_is_kept_and_the_rest_cut_off(random_gguf: MakeFile, loaded: Load, arch: str) -> None:
    from tests.gguf.run import LONG

    model = loaded(random_gguf(arch), "50%")
    first, _ = computed(model, list(LONG), 6)
    other, count = computed(model, [*LONG[:50], 1, 2, 3], 6)
    assert count == 3
    model.parts.runner.forget()
    assert computed(model, list(LONG), 6) == (first, len(LONG))
    assert computed(model, [*LONG[:50], 1, 2, 3], 6) == (other, 3)
    same, count = computed(model, [*LONG[:50], 1, 2, 3], 6)  # everything is cached but the last token's logits
    assert (same, count) == (other, 1)


def test_a_hybrid_model_goes_back_to_its_last_prompt_only(random_gguf: MakeFile, loaded: Load) -> None:
    from tests.gguf.run import LONG

    model = loaded(random_gguf(HYBRID), "50%")
    prompt = list(LONG[:30])
    computed(model, prompt, 6)
    continued, count = computed(model, [*prompt, 7, 8], 6)  # drops the answer: restores the state after the prompt
    assert count == 2
    again, count = computed(model, [*prompt, 7, 8], 6)
    assert count == 32  # the saved state is not a proper prefix of this prompt
    assert len(again) == len(continued) == 6


def test_a_longer_text_gets_a_larger_context_and_keeps_what_is_computed(random_gguf: MakeFile, loaded: Load) -> None:
    from tests.gguf.run import LONG

    model, roomy = loaded(random_gguf(), "50%"), loaded(random_gguf(), "50%")
    roomy.parts.runner.make_room(512)
    for each in (model, roomy):
        computed(each, list(LONG), 2)
    text = [*LONG, *LONG, *LONG]
    assert model.parts.runner.context.tokens == 256
    answers = [computed(each, text, 80) for each in (model, roomy)]
    assert answers[0] == answers[1]
    assert answers[0][1] == len(text) - len(LONG)
    assert model.parts.runner.context.tokens == 512


def test_sampling_is_repeatable_by_seed(random_gguf: MakeFile, loaded: Load) -> None:
    from finemoe.gguf.sampler import SamplingOptions
    from tests.gguf.run import SHORT

    model = loaded(random_gguf(), "50%")

    def sample(**options: Any) -> list[int]:
        model.parts.runner.forget()
        return computed(model, list(SHORT), 16, sampling=SamplingOptions(**options))[0]

    assert sample(temperature=1.5, seed=1) == sample(temperature=1.5, seed=1) != sample(temperature=1.5, seed=2)
    greedy = sample()
    assert sample(temperature=1.5, top_k=1) == greedy
    assert sample(temperature=1.5, top_p=1e-6) == greedy
    assert sample(temperature=1.5, min_p=1.0) == greedy
    assert sample(temperature=1e-4, seed=3) == greedy
    assert sample(repetition_penalty=10.0) != greedy
    assert len(set(sample(repetition_penalty=10.0, penalty_tokens=999))) == 16  # no repeated token
    assert len(set(sample(repetition_penalty=10.0, penalty_tokens=1))) < 16
    assert sample(frequency_penalty=2.0) != greedy


def test_loading_reads_no_expert(random_gguf: MakeFile, loaded: Load) -> None:
    overrides = {"expert_count": 32, "vocab_size": 2000}
    path = random_gguf(key="many", overrides=overrides)
    model = loaded(path, "10%")
    parts = model.parts
    meeting = 4096 * sum(2 * layout.experts * len(layout.fields) for layout in parts.expert_index.layouts)
    assert parts.dense_bytes_read <= parts.file.dense_bytes + meeting
    assert parts.transfer.moved_bytes == 0
    touched = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and line.split()[0][0] in "0123456789abcdef" and ":" not in line.split()[0]:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            own = any(start < first + path.stat().st_size and first < end for first in parts.starts.values())
        elif line.startswith("Rss:") and own:
            touched += int(line.split()[1]) * 1024
    assert touched <= parts.dense_bytes_read + (4 << 20)  # experts take 39 MiB; the kernel may merge adjacent mappings


@pytest.mark.parametrize("arch", [PLAIN, "gpt-oss", "olmoe", "granitemoe", "dbrx"])
def test_gates_are_the_distribution_that_experts_are_chosen_from(
    random_gguf: MakeFile, loaded: Load, arch: str
) -> None:
    from finemoe.gguf.load import observe
    from tests.gguf.run import LONG

    model = loaded(random_gguf(arch), "50%")
    observe(model.parts, 1)
    hold, events = model.parts.engine.hold, []

    def listen(event: Any) -> None:
        events.append(event)
        hold(event)

    model.parts.engine.hold = listen
    computed(model, list(LONG), 4)
    assert events
    layers = len(model.parts.structure.layers)
    ahead: dict[int, Any] = {}
    for event in events:
        assert event.gates.shape == (1, 8) and event.gates.dtype == np.float32
        assert np.isclose(event.gates.sum(), 1.0, atol=1e-4)
        if len(event.experts) == event.active:  # a single token
            assert sorted(np.argsort(-event.gates[0])[: event.active].tolist()) == list(event.experts)
            if event.layer + 1 < layers:
                assert np.isclose(event.lookahead[0, 0].sum(), 1.0, atol=1e-4)
                ahead[event.layer + 1] = event.lookahead[0, 0]


def test_embeddings_are_the_means_of_the_tables_rows(random_gguf: MakeFile, loaded: Load) -> None:
    from gguf import GGUFReader

    from finemoe.gguf.load import embedding_table

    path = random_gguf()
    table = embedding_table(loaded(path, "50%").parts)
    assert table is not None
    rows = next(t.data for t in GGUFReader(path).tensors if t.name == "token_embd.weight")
    got = table.mean([3, 4, 4])
    assert got is not None
    assert np.allclose(got, np.asarray(rows)[[3, 4, 4]].mean(axis=0))


def test_every_pin_is_released_and_only_ready_experts_are_bound(random_gguf: MakeFile, loaded: Load) -> None:
    from tests.gguf.run import LONG

    model = loaded(random_gguf(), "25%", policy="mixtral-offloading")
    for start in range(0, 40, 10):
        computed(model, list(LONG[start : start + 30]), 8)
        model.parts.engine.check_integrity()
        assert not model.parts.memory._pins
