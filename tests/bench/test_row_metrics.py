"""Figures derived from measurements, and the comparison of rows."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from finemoe.bench.measurements import Phase, RandomTokensResult, Variant, WorkerTask
from finemoe.bench.row_metrics import RANDOM_TOKEN_FIGURES, BenchReport, BenchRun, random_token_figures, summarise
from finemoe.bench.table import render

EAGER = Variant("resident", implementation="eager")
GROUPED = Variant("resident", implementation="grouped_mm")
OURS = Variant("finemoe", budget="25%", policy="lfru")
OFFLOAD = Variant("disk-offload", implementation="eager")


def measured(
    *seconds: float, tokens: tuple[int, ...] = (1, 2, 3), logits: tuple[str, ...] = ("a", "b", "c")
) -> RandomTokensResult:
    decode = Phase(
        seconds, disk_bytes=None, accesses=10, hits=6, late=1, bytes_read=600, stall_s=0.5, stalled_bytes=400
    )
    prompt = Phase((2.0,), disk_bytes=None, bytes_read=1000)
    return RandomTokensResult(
        load_s=1.0,
        prompt=prompt,
        decode=decode,
        tokens=tokens,
        logits=logits,
        dense_bytes=100,
        pool_bytes=50,
        peak_rss_bytes=190,
        torch_threads=1,
    )


def run(variant: Variant, result: RandomTokensResult | None, repeat: int = 0) -> BenchRun:
    error = None if result else "killed, perhaps out of memory"
    return BenchRun(variant, repeat, link_bytes_s=1000.0, cached_share=0.0, measured=result, error=error)


def report(*runs: BenchRun) -> BenchReport:
    rows, fastest = summarise(list(runs))
    return BenchReport("m", {"cores": 2}, {}, True, (1e9, 2e9, 4e9), rows, fastest)


def test_bandwidth_between_tokens_takes_precedence_over_that_around_the_row() -> None:
    result = measured(0.1, 0.2, 0.9)
    around = random_token_figures(result, link_bytes_s=1000)["link_utilisation"]
    between = random_token_figures(
        replace(result, decode=replace(result.decode, link_bytes_s=500.0)), link_bytes_s=1000
    )
    assert around is not None
    assert between["link_utilisation"] == 2 * around


def test_figures_follow_from_the_measurements() -> None:
    figures = random_token_figures(measured(0.1, 0.2, 0.9), link_bytes_s=1000)
    assert set(figures) == set(RANDOM_TOKEN_FIGURES)
    expected = {
        "ttft_s": 2.0,
        "tpot_s": 0.2,
        "tpot_mean_s": 0.4,
        "tok_s": 2.5,
        "hit_rate": 0.6,
        "bytes_per_token": 200,
        "stall_share": 0.5 / 1.2,
        "link_utilisation": 0.8,
        "prompt_link_utilisation": 0.5,
        "overhead_bytes": 40,
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected)


def test_the_kernels_count_of_bytes_is_preferred() -> None:
    result = measured(0.1, 0.2)
    counted = replace(result, decode=replace(result.decode, disk_bytes=1000))
    assert random_token_figures(counted, 1000)["bytes_per_token"] == 500


def test_resident_rows_have_neither_stall_nor_link() -> None:
    figures = random_token_figures(replace(measured(0.1, 0.2), pool_bytes=0), 1000)
    assert figures["stall_share"] is figures["link_utilisation"] is figures["prompt_link_utilisation"] is None


def test_a_stall_too_short_to_measure_has_no_utilisation() -> None:
    result = measured(0.1, 0.2)
    assert (
        random_token_figures(replace(result, decode=replace(result.decode, stall_s=0.001)), 1000)["link_utilisation"]
        is None
    )


def test_ratios_are_taken_within_a_repeat() -> None:
    rows = report(
        run(OURS, measured(1.0, 1.0), 0),
        run(EAGER, measured(0.5, 0.5), 0),
        run(OURS, measured(4.0, 4.0), 1),
        run(EAGER, measured(4.0, 4.0), 1),
        run(OURS, measured(3.0, 3.0), 2),
        run(EAGER, measured(1.0, 1.0), 2),
    ).rows
    assert rows[0].tpot_ratio == 2.0  # of 2, 1 and 3; the ratio of medians would be 3
    assert rows[1].tpot_ratio == 1.0


def test_ratios_are_to_the_fastest_resident_row() -> None:
    made = report(run(EAGER, measured(0.4, 0.4)), run(GROUPED, measured(0.2, 0.2)), run(OURS, measured(0.1, 0.1)))
    assert made.fastest_resident == "transformers grouped_mm"
    assert made.rows[2].tpot_ratio == 0.5


def test_tokens_are_compared_with_eager_up_to_a_rows_length() -> None:
    rows = report(
        run(EAGER, measured(0.1, 0.1)),
        run(OFFLOAD, measured(0.1, tokens=(1, 2), logits=("a", "b"))),
        run(GROUPED, measured(0.1, 0.1, logits=("a", "b", "x"))),
        run(OURS, measured(0.1, 0.1, tokens=(1, 2, 4))),
    ).rows
    assert [row.tokens_equal for row in rows] == [True, True, True, False]
    assert [row.logits_equal for row in rows] == [True, True, False, True]


def test_one_wrong_run_makes_a_row_wrong() -> None:
    rows = report(
        run(EAGER, measured(0.1, 0.1)), run(OURS, measured(0.1)), run(OURS, measured(0.1, tokens=(1, 9, 9)), 1)
    ).rows
    assert rows[1].tokens_equal is False


def test_without_eager_tokens_are_not_compared() -> None:
    assert report(run(OURS, measured(0.1, 0.1))).rows[0].tokens_equal is None


def test_a_failed_row_has_its_error_and_the_others_their_figures() -> None:
    made = report(run(EAGER, None), run(OURS, measured(0.1, 0.1)))
    assert made.fastest_resident is None
    assert made.rows[0].error == "killed, perhaps out of memory"
    text = render(made)
    assert "transformers eager: killed, perhaps out of memory" in text
    assert "100.0" in text
    raw = json.loads(json.dumps(made.as_dict()))
    assert raw["rows"][0]["tpot_s"] is None
    assert raw["rows"][1]["tpot_s"] == 0.1
    assert raw["rows"][1]["runs"][0]["measured"]["decode"]["hits"] == 6


def test_wrong_tokens_are_marked_in_the_table() -> None:
    made = report(run(EAGER, measured(0.1, 0.1)), run(OURS, measured(0.1, 0.1, tokens=(7,))))
    assert "NO" in render(made)


def test_tasks_and_results_survive_json() -> None:
    task = WorkerTask(OURS, {"model": "m"}, (1, 2), (3,), 4, 0)
    assert WorkerTask.from_dict(json.loads(json.dumps(asdict(task)))) == task
    result = measured(0.1, 0.2)
    assert RandomTokensResult.from_dict(json.loads(json.dumps(asdict(result)))) == result
