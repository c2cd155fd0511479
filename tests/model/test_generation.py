"""An offloaded model generates the same tokens as transformers' eager model, by every way to generate."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, TextIteratorStreamer, pipeline

import finemoe
from finemoe.config import GenerateConfig
from finemoe.errors import BudgetError, ConfigError, FinemoeWarning
from finemoe.model.generation import Session, sampling_options
from finemoe.policy import POLICIES, policy_class
from tests.chat_model import make_tokenizer
from tests.tiny import Make, answer, configured, eager, logits


@pytest.mark.parametrize("policy", [name for name in POLICIES if "predictors" not in policy_class(name).needs])
@pytest.mark.parametrize("expert_memory", ["17%", "50%", "all"])
def test_output_does_not_depend_on_budget_or_policy(
    chat_folder: Path, eager_model: Any, policy: str, expert_memory: str
) -> None:
    with finemoe.load(chat_folder, expert_memory=expert_memory, policy=policy) as model:
        assert torch.equal(logits(model), logits(eager_model))
        assert torch.equal(answer(model), answer(eager_model))
        model.finemoe.check_integrity()


@pytest.mark.parametrize("io", ["auto", "buffered"])
@pytest.mark.parametrize("reader_threads", [1, 7])
def test_output_does_not_depend_on_how_experts_are_read(
    chat_folder: Path, eager_model: Any, io: Any, reader_threads: int
) -> None:
    with finemoe.load(chat_folder, expert_memory="20%", io=io, reader_threads=reader_threads) as model:
        assert torch.equal(answer(model), answer(eager_model))


def test_output_does_not_depend_on_earlier_requests(offloaded: Any, eager_model: Any) -> None:
    for batch in (1, 3, 1, 2):
        assert torch.equal(answer(offloaded, batch=batch), answer(eager_model, batch=batch))


@pytest.mark.parametrize("batch", [1, 3])
def test_left_padded_batches_equal_eager(offloaded: Any, eager_model: Any, batch: int) -> None:
    assert torch.equal(logits(offloaded, batch=batch), logits(eager_model, batch=batch))
    assert torch.equal(answer(offloaded, batch=batch), answer(eager_model, batch=batch))


@pytest.mark.parametrize(("stored", "computed"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_another_dtype_of_computation_equals_eager_in_that_dtype(tiny: Make, stored: str, computed: Any) -> None:
    folder = tiny("mixtral", stored)
    reference = eager(folder, computed)
    with finemoe.load(folder, dtype=computed) as model:
        assert model.dtype == getattr(torch, computed)
        assert torch.equal(logits(model, batch=2), logits(reference, batch=2))
    with finemoe.load(folder, dtype=getattr(torch, computed)) as model:
        assert model.dtype == getattr(torch, computed)


@pytest.mark.parametrize("seed", [0, 1])
def test_sampling_with_a_seed_equals_eager(offloaded: Any, eager_model: Any, seed: int) -> None:
    outputs = []
    for model in (offloaded, eager_model):
        torch.manual_seed(seed)
        outputs.append(answer(model, batch=2, do_sample=True, temperature=0.8, top_p=0.9, top_k=0, new_tokens=10))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"use_cache": False},
    ],
    ids=str,
)
def test_other_ways_to_decode_equal_eager(offloaded: Any, eager_model: Any, options: dict[str, Any]) -> None:
    assert torch.equal(answer(offloaded, **options), answer(eager_model, **options))


def test_assisted_generation_works_with_either_model_offloaded(offloaded: Any, eager_model: Any, tiny: Make) -> None:
    expected = answer(eager_model)
    assert torch.equal(answer(offloaded, assistant_model=eager_model), expected)
    assert torch.equal(answer(eager_model, assistant_model=offloaded), expected)
    assert torch.equal(answer(offloaded, assistant_model=offloaded), expected)


def test_a_streamer_gets_the_same_text(offloaded: Any) -> None:
    tokenizer = make_tokenizer()
    inputs = tokenizer("Hello", return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = tokenizer.decode(offloaded.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=offloaded.generate, kwargs={**inputs, **options, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == expected
    thread.join(60)


def test_a_pipeline_runs_on_it(offloaded: Any, eager_model: Any) -> None:
    texts = []
    for model in (offloaded, eager_model):
        write = pipeline("text-generation", model=model, tokenizer=make_tokenizer())
        config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=1)
        texts.append(write(["Hello", "A longer prompt"], batch_size=2, generation_config=config))
    assert texts[0] == texts[1]


def test_a_conversation_is_formatted_by_the_chat_template(offloaded: Any) -> None:
    session = Session(offloaded)
    turns = [{"role": "user", "content": "Hi"}]
    assert session.tokenizer.decode(session.prompt_ids(turns)[0]) == "<user>Hi<assistant>"
    assert session.tokenizer.decode(session.prompt_ids("Hi")[0]) == "<user>Hi<assistant>"
    assert session.tokenizer.decode(session.prompt_ids("Hi", raw=True)[0]) == "Hi"


def test_a_reply_has_its_timings_and_statistics(offloaded: Any) -> None:
    session, streamed = Session(offloaded), list[str]()
    reply = session.reply("Hi", GenerateConfig(max_new_tokens=6), streamed.append)
    assert "".join(streamed) == reply.text
    assert 1 <= len(reply.token_ids) <= 6
    assert reply.finish_reason in {"stop", "length"}
    assert 0 < reply.ttft_s <= reply.total_s
    assert reply.stats.accesses > 0
    table = reply.as_dict()
    contract = (
        "text", "tokens", "hit_rate", "late_rate", "miss_rate", "ttft_s", "tpot_s", "tok_s", "bytes_read", "stall_s",
        "expert_memory_bytes", "peak_rss_bytes", "policy", "model",
    )  # fmt: skip
    assert set(contract) <= set(table)


def test_an_answer_ends_at_the_end_of_the_context_with_a_warning(chat_folder: Path, tmp_path: Path) -> None:
    short = configured(chat_folder, tmp_path / "short", max_position_embeddings=20, eos_token_id=None)
    with finemoe.load(short, expert_memory=0.5, map_store="none") as model:
        session = Session(model)
        model.generation_config.eos_token_id = None
        with pytest.warns(FinemoeWarning, match=r"^--max-new-tokens: 30 do not fit .* of 20 tokens"):
            reply = session.reply("x" * 12, GenerateConfig(max_new_tokens=30, raw=True))
        assert (len(reply.token_ids), reply.finish_reason) == (8, "length")
        reply = session.reply("x" * 12, GenerateConfig(max_new_tokens=8, raw=True))
        assert len(reply.token_ids) == 8
        with pytest.raises(ConfigError, match=r"^PROMPT: has 20 tokens"):
            session.reply("x" * 20, GenerateConfig(raw=True))


@pytest.mark.parametrize("memory", [0.5, "50%", 24 * 3 * 64 * 96 * 2])
def test_expert_memory_is_text_a_share_or_bytes(chat_folder: Path, memory: str | float) -> None:
    with finemoe.load(chat_folder, expert_memory=memory, map_store="none") as model:
        assert model.finemoe.stats().slots == (24 if isinstance(memory, int) else 12)


@pytest.mark.parametrize("memory", [None, 1.5, True])
def test_other_values_of_expert_memory_are_refused_by_name(chat_folder: Path, memory: Any) -> None:
    with pytest.raises(BudgetError, match=r"^--expert-memory: "):
        finemoe.load(chat_folder, expert_memory=memory)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunked_prefill_gives_the_same_answer(tiny: Make, chunk: int) -> None:
    ids = torch.arange(3, 14)[None]
    with finemoe.load(tiny("mixtral", "float32"), expert_memory="40%", map_store="none") as model:
        unchunked, chunked = (
            model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, prefill_chunk_size=size)
            for size in (None, chunk)
        )
        model.finemoe.check_integrity()
    assert torch.equal(unchunked, chunked)


def test_equal_seeds_give_equal_replies(offloaded: Any) -> None:
    session = Session(offloaded)
    config = GenerateConfig(max_new_tokens=8, temperature=1.5, seed=3)
    assert session.reply("Hi", config).token_ids == session.reply("Hi", config).token_ids


def test_two_models_can_be_loaded_at_once(chat_folder: Path, eager_model: Any, tiny: Make) -> None:
    other = eager(tiny("gpt_oss", "bfloat16"))
    with finemoe.load(chat_folder, expert_memory="20%") as first, finemoe.load(tiny("gpt_oss", "bfloat16")) as second:
        for _ in range(2):
            assert torch.equal(answer(first), answer(eager_model))
            assert torch.equal(answer(second), answer(other))


def test_threads_may_share_a_model(offloaded: Any, eager_model: Any) -> None:
    expected = {batch: answer(eager_model, batch=batch) for batch in (1, 2, 3)}
    outputs: list[tuple[int, torch.Tensor]] = []
    threads = [
        threading.Thread(target=lambda b=b: outputs.append((b, answer(offloaded, batch=b)))) for b in (1, 2, 3, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(outputs) == 4
    assert all(torch.equal(output, expected[batch]) for batch, output in outputs)


@pytest.mark.parametrize("policy", ["finemoe", "finemoe/lookahead=2", "expert-map", "moe-infinity"])
def test_threads_may_share_a_model_with_an_observing_policy(chat_folder: Path, eager_model: Any, policy: str) -> None:
    batches = (1, 3, 2, 1, 4)
    expected = {batch: answer(eager_model, batch=batch) for batch in set(batches)}
    with finemoe.load(chat_folder, expert_memory="40%", policy=policy, map_store="none") as model:
        for _ in range(3):
            with ThreadPoolExecutor(len(batches)) as pool:
                outputs = list(pool.map(lambda batch: answer(model, batch=batch), batches))
            assert all(torch.equal(got, expected[batch]) for batch, got in zip(batches, outputs, strict=True))
        model.finemoe.check_integrity()


def test_statistics_add_up(offloaded: Any) -> None:
    answer(offloaded, batch=2)
    stats = offloaded.finemoe.stats()
    assert stats.hits + stats.late + stats.misses == stats.accesses > 0
    assert stats.hit_rate + stats.late_rate + stats.miss_rate == pytest.approx(1)
    assert stats.resident <= stats.slots
    assert stats.evictions == stats.misses - stats.resident
    expert_index = offloaded.finemoe.expert_index
    assert stats.bytes_read == stats.misses * expert_index.weight_bytes // expert_index.experts
    assert (
        stats.expert_memory_bytes
        == stats.slots * expert_index.slot_bytes
        <= 0.4 * expert_index.experts * expert_index.slot_bytes
    )
    assert (stats.layers, stats.experts) == (3, 24)


def test_reset_stats_sets_statistics_to_zero(offloaded: Any) -> None:
    answer(offloaded)
    resident = offloaded.finemoe.stats().resident
    offloaded.finemoe.reset_stats()
    stats = offloaded.finemoe.stats()
    assert (stats.accesses, stats.bytes_read, stats.stall_s, stats.evictions, stats.layer_calls) == (0, 0, 0, 0, 0)
    assert stats.resident == resident > 0


def test_loading_counts_nothing_and_leaves_the_pool_empty(chat_folder: Path) -> None:
    with finemoe.load(chat_folder) as model:
        stats = model.finemoe.stats()
        assert (stats.accesses, stats.bytes_read, stats.resident, stats.layer_calls) == (0, 0, 0, 0)


def test_penalties_stay_the_models_own_unless_given() -> None:
    for config in (GenerateConfig(), GenerateConfig(temperature=1.0)):
        assert not {"repetition_penalty", "min_p"} & set(sampling_options(config))
    assert sampling_options(GenerateConfig(repetition_penalty=1.0))["repetition_penalty"] == 1.0
    assert sampling_options(GenerateConfig(temperature=1.0, min_p=0.1))["min_p"] == 0.1
