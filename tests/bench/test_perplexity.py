"""Perplexity, and its comparison between lossy and exact rows."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finemoe.bench import BenchConfig
from finemoe.bench.inputs import perplexity, read_text
from finemoe.bench.run import run_bench
from finemoe.bench.table import render
from finemoe.checkpoint import locate
from finemoe.errors import ConfigError
from tests.chat_model import make_chat_model
from tests.tiny import eager


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("chat"))


def test_perplexity_is_the_exponential_of_the_models_loss(folder: Path) -> None:
    model = eager(folder)
    ids = tuple(range(3, 103))
    row = torch.tensor([ids])
    with torch.no_grad():
        assert perplexity(model, ids) == pytest.approx(math.exp(model(input_ids=row, labels=row).loss), rel=1e-3)
    assert perplexity(model, ids * 6) > 1  # in windows


def test_the_text_is_truncated_and_has_a_default(folder: Path, tmp_path: Path) -> None:
    checkpoint = locate(str(folder))
    cache = tmp_path / "book.txt"
    cache.write_text("so it goes " * 100)
    config = BenchConfig(model=str(folder), perplexity=str(cache), perplexity_tokens=40)
    assert len(read_text(config, checkpoint)) == 40
    assert read_text(BenchConfig(model=str(folder)), checkpoint) == ()
    assert len(read_text(BenchConfig(model=str(folder), expert_dtype="int8"), checkpoint)) == 512
    with pytest.raises(ConfigError, match=r"^--perplexity: .*can't be read"):
        read_text(replace(config, perplexity=str(tmp_path / "none")), checkpoint)
    cache.write_text("")
    with pytest.raises(ConfigError, match=r"^--perplexity: .*fewer than two tokens"):
        read_text(config, checkpoint)


@pytest.mark.usefixtures("in_process")
def test_a_lossy_row_is_compared_with_the_exact_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setenv("FINEMOE_CACHE", str(tmp_path))
    config = BenchConfig(
        model=str(folder), expert_memory="50%", expert_dtype="stored,int4", baselines="none", prompt_tokens=16,
        context_tokens=4, new_tokens=4, perplexity_tokens=64, link_probe_mib=1, threads=1,
    )  # fmt: skip
    log: list[str] = []
    report = run_bench(config, log.append)
    assert log[0] == "copy of the experts as int4 ..."
    exact, lossy = report.rows
    assert (exact.error, lossy.error) == (None, None)
    assert exact.perplexity_ratio == 1
    assert lossy.perplexity_ratio not in {None, 1}
    assert (lossy.figure("pool_bytes") or 0) < 0.5 * (exact.figure("pool_bytes") or 0)
    assert "LOSSY (--expert-dtype), answers differ from the checkpoint's: finemoe finemoe 50% int4." in render(report)
    assert [row["lossy"] for row in json.loads(json.dumps(report.as_dict()))["rows"]] == [False, True]
