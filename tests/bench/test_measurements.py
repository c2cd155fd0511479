"""Rows on real prompts: results, figures, comparison, and which flags go together."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from finemoe.bench import BenchConfig
from finemoe.bench.inputs import learn_trace
from finemoe.bench.measurements import (
    MACHINE_FIGURES,
    Phase,
    PromptsResult,
    RequestResult,
    Variant,
    WorkerTask,
    variants,
)
from finemoe.bench.row_metrics import PROMPT_FIGURES, BenchReport, BenchRun, prompt_figures, summarise
from finemoe.bench.run import run_bench
from finemoe.bench.table import render
from finemoe.cli import main
from finemoe.errors import ConfigError
from finemoe.metrics import Durations
from tests.chat_model import make_chat_model

LRU, LFU = Variant("finemoe", "25%", "lru"), Variant("finemoe", "50%", "lfu")


def answer(ttft_s: float, *seconds: float, tokens: tuple[int, ...] = (1, 2, 3)) -> RequestResult:
    prompt = Phase((ttft_s,), None, accesses=8, hits=2, late=2, bytes_read=100, stall_s=ttft_s / 2)
    decode = Phase(seconds, None, accesses=10 * len(seconds), hits=6 * len(seconds), late=1, bytes_read=50, stall_s=0.1)
    return RequestResult(4, prompt, decode, tokens, "hash")


def answered(*answers: RequestResult) -> PromptsResult:
    return PromptsResult(1.0, answers, 10, 6, 3, dense_bytes=100, pool_bytes=50, peak_rss_bytes=190, torch_threads=1)


def timed(mean_s: float, count: int, spread: float = 0.0) -> Durations:
    return Durations(count, mean_s * count, -2.0 * count, (2.0**2 + spread**2) * count)


def report(*runs: BenchRun) -> BenchReport:
    rows, fastest = summarise(list(runs))
    asked = {"requests": 1, "prompt_tokens": 4, "warm_requests": 0, "stored_requests": 0}
    return BenchReport("m", {"cores": 2}, {}, True, (1e9,), rows, fastest, names=PROMPT_FIGURES, requests=asked)


def run(variant: Variant, result: PromptsResult | None, repeat: int = 0) -> BenchRun:
    return BenchRun(variant, repeat, 1000.0, 0.0, result, None if result else "killed")


def test_figures_follow_from_the_measurements() -> None:
    figures = prompt_figures(answered(answer(1.0, 0.1, 0.3), answer(3.0, 0.4, 0.4)))
    assert set(figures) == set(PROMPT_FIGURES)
    expected = {
        "ttft_s": 2.0,
        "ttft_p50_s": 2.0,
        "ttft_p95_s": 2.9,
        "tpot_s": 0.3,
        "tok_s": 6 / 5.2,
        "prefill_hit_rate": 0.25,
        "prefill_late_rate": 0.25,
        "prefill_miss_rate": 0.5,
        "decode_hit_rate": 0.6,
        "decode_miss_rate": 14 / 40,
        "prefill_stall_share": 0.5,
        "decode_stall_share": 0.2 / 1.2,
        "stall_share": 2.2 / 5.2,
        "bytes_read": 300,
        "bytes_per_token": 25,
        "precision": 0.6,
        "wasted": 3,
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected)


def test_an_answer_of_one_token_has_no_tpot() -> None:
    figures = prompt_figures(answered(answer(1.0, tokens=(1,))))
    assert (
        figures["tpot_s"] is figures["tpot_p95_s"] is figures["decode_hit_rate"] is figures["bytes_per_token"] is None
    )
    assert "-" in render(report(run(LRU, answered(answer(1.0, tokens=(1,))))))


def test_the_simulators_settings_are_measured() -> None:
    prompt = Phase((2.0,), None, bytes_read=1000, befores=timed(1.0, 9), afters=timed(3.0, 10), arounds=timed(99.0, 1))
    prompt = replace(prompt, urgent_s=9.0, urgent_bytes=9)
    decode = Phase(
        (2.0,),
        None,
        bytes_read=400,
        befores=timed(0.1, 9, 0.2),
        afters=timed(0.3, 10),
        arounds=timed(0.9, 1),
    )
    decode = replace(decode, gates=timed(0.06, 10, 0.4), begins=timed(0.2, 4), passages=timed(0.7, 5, 0.3))
    decode = replace(decode, urgent_s=0.6, urgent_bytes=300, prefetch_s=0.3, prefetch_bytes=100)
    first = replace(prompt, afters=timed(0.5, 10))  # so that the merged mean differs from the median
    answers = [RequestResult(25, each, decode, (1, 2), "hash") for each in (first, prompt, prompt)]
    made = replace(answered(*answers), expert_bytes=100.0)
    expected = {
        "layer_s": 0.4, "before_gate": 0.25, "outside_s": 0.8, "gap": 2.0, "expert_s": 0.2, "link_ratio": 0.5,
        "lag": 0.15, "begin_lag": 0.5, "lag_spread": 0.4, "prefetch_slowdown": 1.5,
        "compute_spread": 0.2, "link_spread": 0.3, "tokens_per_unit": 3,
    }  # fmt: skip
    figures = prompt_figures(made)
    assert {name: figures[name] for name in MACHINE_FIGURES} == pytest.approx(expected)
    resident = prompt_figures(replace(answered(answer(1.0, 0.1)), pool_bytes=0))
    assert {resident[name] for name in MACHINE_FIGURES} == {None}


def test_resident_rows_have_neither_stall_nor_prefetches() -> None:
    figures = prompt_figures(replace(answered(answer(1.0, 0.1)), pool_bytes=0, prefetched=0))
    assert figures["stall_share"] is figures["wasted"] is figures["precision"] is figures["bytes_read"] is None


def test_rows_with_equal_tokens_share_one_digest() -> None:
    made = report(run(LRU, answered(answer(1.0, 0.1))), run(LFU, answered(answer(2.0, 0.9))))
    assert made.tokens_equal is True
    assert len(made.tokens_digests) == 1
    assert "all rows have the same" in render(made)
    assert json.loads(json.dumps(made.as_dict()))["tokens_digests"] == list(made.tokens_digests)


def test_one_wrong_token_in_one_run_is_reported() -> None:
    wrong = answered(answer(1.0, 0.1, tokens=(1, 9, 3)))
    made = report(run(LRU, answered(answer(1.0, 0.1))), run(LFU, answered(answer(1.0, 0.1))), run(LFU, wrong, 1))
    assert [row.tokens_equal for row in made.rows] == [True, False]
    assert made.tokens_equal is False
    assert "THE ROWS DIFFER" in render(made)


def test_other_rows_keep_their_figures_if_one_fails() -> None:
    made = report(run(LRU, None), run(LFU, answered(answer(2.5, 0.1))))
    assert made.tokens_equal is True
    assert "finemoe lru 25%: killed" in render(made)


def test_results_survive_json() -> None:
    made = answered(answer(1.0, 0.1, 0.2), answer(2.0))
    assert PromptsResult.from_dict(json.loads(json.dumps(asdict(made)))) == made
    task = WorkerTask(LRU, {}, (1,), (2,), 4, 0, requests=((1, 2), (3,)), warm=((4,),), store="t")
    assert WorkerTask.from_dict(json.loads(json.dumps(asdict(task)))) == task


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"prompts_limit": 3}, "--prompts-limit: has no effect without"),
        ({"warm_prompts": "w"}, "--warm-prompts: has no effect without"),
        ({"store": "t"}, "--store: has no effect without"),
        ({"prompts": "p", "warm_prompts_limit": 3}, "--warm-prompts-limit: has no effect without"),
        ({"prompts": "p", "prompts_limit": 0}, "--prompts-limit: 0 is not at least 1"),
        ({"prompts": "p", "prompt_tokens": 7}, "--prompt-tokens: has no effect with"),
        ({"prompts": "p", "baselines": "disk-offload"}, "--baselines: disk-offload"),
        ({"policy": "lru,lfu", "predictors": "p"}, "--predictors: none of --policy lru,lfu"),
        ({"policy": "lru,promoe"}, "--policy promoe: needs --predictors"),
        ({"policy": "lru,lucky"}, "--policy"),
    ],
)
def test_contradicting_flags_are_refused(values: dict[str, object], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        BenchConfig(**values)  # type: ignore[arg-type]


def test_predictors_go_only_to_policies_that_take_them() -> None:
    config = BenchConfig(policy="lru,promoe", predictors="p")
    assert [config.load_config("25%", policy).predictors for policy in config.policies] == [None, "p"]


def test_real_prompts_are_compared_with_transformers_only_on_request() -> None:
    assert all(variant.kind == "finemoe" for variant in variants(BenchConfig(prompts="p")))
    assert any(variant.kind == "resident" for variant in variants(BenchConfig(prompts="p", baselines="eager")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    make_chat_model(folder / "model")
    asked = [{"question": "Why?"}, {"question": "Who is it?"}, {"question": "x" * 5000}]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (folder / "warm.txt").write_text("Well?\n")
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    recorded = ["--prompts", str(folder / "warm.txt"), "--out", str(folder / "store.trace"), "--max-new-tokens", "3"]
    assert main(["record", "--model", str(folder / "model"), *recorded]) == 0
    return folder


def test_a_store_of_another_shape_is_refused(folder: Path) -> None:
    other = SimpleNamespace(expert_index=SimpleNamespace(layouts=[SimpleNamespace(experts=3)]))
    with pytest.raises(ConfigError, match=r"--store: .*store.trace has .* the model 1 of 3; record one"):
        learn_trace(other, folder / "store.trace")


@pytest.mark.usefixtures("in_process")
def test_all_policies_and_budgets_give_equal_answers(folder: Path) -> None:
    log: list[str] = []
    config = BenchConfig(
        model=str(folder / "model"),
        prompts=str(folder / "prompts.jsonl"),
        warm_prompts=str(folder / "warm.txt"),
        store=str(folder / "store.trace"),
        policy="moe-infinity,deepspeed",
        expert_memory="25%,50%",
        baselines="eager",
        new_tokens=4,
        link_probe_mib=1,
        link_bandwidth="64MiB",
        threads=1,
    )
    made = run_bench(config, log.append)
    assert [row.error for row in made.rows] == [None] * 5
    assert all(row.tokens_equal and row.logits_equal for row in made.rows), render(made)
    assert made.requests is not None
    assert (made.requests["requests"], made.requests["warm_requests"], made.requests["stored_requests"]) == (2, 1, 1)
    assert "policies trained on 1 recorded ones" in render(made)
    assert any("longer than 508 tokens: 1" in line for line in log)
    first, *_, eager = made.rows
    assert first.figure("prefill_hit_rate") is not None
    assert made.rows[2].figure("prefetched") is not None  # the number depends on timing
    assert (first.figure("precision") is None) == (first.figure("prefetched") == 0)
    assert eager.figure("stall_share") is None
    assert all((first.figure(name) or 0) > 0 for name in ("layer_s", "before_gate", "link_ratio", "tokens_per_unit"))
    assert eager.figure("layer_s") is eager.figure("gap") is None
    assert "finemoe deepspeed 50%" in render(made)
    assert "throttled to 64.0 MiB/s" in render(made)
    assert json.loads(json.dumps(made.as_dict()))["rows"][0]["decode_hit_rate"] >= 0


def test_a_file_without_prompts_is_named(folder: Path) -> None:
    config = BenchConfig(model=str(folder / "model"), prompts=str(folder / "prompts.jsonl"))
    with pytest.raises(ConfigError, match=r"--warm-prompts: .*nowhere"):
        run_bench(replace(config, warm_prompts="nowhere"), lambda _: None)
    with pytest.raises(ConfigError, match="--prompt-field"):
        run_bench(replace(config, prompt_field="goal"), lambda _: None)
