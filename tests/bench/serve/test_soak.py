"""The soak benchmark sends every kind of request, and notices what a server has left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finemoe.bench.serve.soak import WEIGHTS, is_clean, slope
from finemoe.cli import main
from tests.chat_model import make_chat_model

END = {"running": 0, "waiting": 0, "held_blocks": 0, "pinned": 0, "integrity": "holds", "failure": None}


def test_a_slope_is_found_with_its_confidence_interval() -> None:
    times_s = np.arange(0, 3600, 5.0)
    noise = np.random.default_rng(0).normal(0, 3, len(times_s))
    rising, flat = (
        slope(times_s.tolist(), (100 + 12 * times_s / 3600 + noise).tolist()),
        slope(times_s.tolist(), noise.tolist()),
    )
    assert rising is not None and abs(rising[0] - 12) < rising[1] < 2
    assert flat is not None and abs(flat[0]) < flat[1]
    exact = slope(times_s.tolist(), [float("nan"), *(5 * times_s[1:] / 3600)])
    assert exact is not None
    assert list(exact) == [pytest.approx(5), pytest.approx(0, abs=1e-6)]
    assert slope(times_s[:39].tolist(), noise[:39].tolist()) is None


@pytest.mark.parametrize(
    "found", [{"held_blocks": 1}, {"pinned": 2}, {"integrity": "slot 3 has no owner"}, {"failure": "dead"}]
)
def test_what_is_left_is_noticed(found: dict[str, Any]) -> None:
    assert is_clean(END)
    assert not is_clean(END | found)
    assert not is_clean(None)


@pytest.mark.usefixtures("own_process")
def test_a_served_model_is_soaked_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = make_chat_model(tmp_path / "model"), tmp_path / "out.json"
    (tmp_path / "prompts.txt").write_text("What is water?\nWho knows?\n")
    flags = ["--prompts", str(tmp_path / "prompts.txt"), "--model", str(model), "--policy", "lru"]
    sizes = ["--minutes", "0.02", "--warm-up-minutes", "0", "--sample-s", "0.02", "--max-output-tokens", "64"]
    assert main(["bench", "serve", "soak", *flags, *sizes, "--cache-bytes", "16MiB", "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert document["end"] == END
    assert document["bad"] == []
    assert document["samples"][-1]["rss_mib"] > 10
    assert {kind.partition(":")[0] for kind in document["outcomes"]} <= set(WEIGHTS)
    assert sum(document["outcomes"].values()) > 5
    table = capsys.readouterr().out
    assert "MiB/h of resident memory" in table
    assert "bad       nothing" in table
