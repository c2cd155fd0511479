"""The soak asks everything there is to ask, and sees what is left."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.chat_model import make_chat_model

Scripts = Callable[[str], Any]
END = {"running": 0, "waiting": 0, "held_blocks": 0, "pinned": 0, "integrity": "holds", "failure": None}


def test_a_slope_is_found_with_its_confidence(scripts: Scripts) -> None:
    slope = scripts("soak").slope
    times_s = np.arange(0, 3600, 5.0)
    noise = np.random.default_rng(0).normal(0, 3, len(times_s))
    per_hour, half = slope(times_s, 100 + 12 * times_s / 3600 + noise)
    assert abs(per_hour - 12) < half < 2
    flat, half = slope(times_s, 100 + noise)
    assert abs(flat) < half
    per_hour, half = slope(times_s, [float("nan"), *(5 * times_s[1:] / 3600)])
    assert (per_hour, half) == (pytest.approx(5), pytest.approx(0, abs=1e-6))
    assert slope(times_s[:39], noise[:39]) is None


@pytest.mark.parametrize(
    "found", [{"held_blocks": 1}, {"pinned": 2}, {"integrity": "slot 3 is nobody's"}, {"failure": "dead"}]
)
def test_what_is_left_is_seen(scripts: Scripts, found: dict[str, Any]) -> None:
    assert scripts("soak").sound(END)
    assert not scripts("soak").sound(END | found)
    assert not scripts("soak").sound(None)


def test_a_served_model_is_soaked_and_leaves_nothing(
    scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = make_chat_model(tmp_path / "model"), tmp_path / "out.json"
    (tmp_path / "prompts.txt").write_text("What is water?\nWho knows?\n")
    flags = [
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--model",
        str(model),
        "--minutes",
        "0.02",
        "--sample-s",
        "0.02",
    ]
    sizes = ["--warm-up-minutes", "0", "--policy", "lru", "--max-output-tokens", "64", "--cache-bytes", "16MiB"]
    monkeypatch.setattr(sys, "argv", ["soak.py", *flags, *sizes, "--json", str(out)])
    monkeypatch.setenv("FINEMOE_MAPS", "none")
    monkeypatch.setattr(scripts("soak"), "end_as_by_ctrl_c", lambda: None)
    assert scripts("soak").main() == 0
    report = json.loads(out.read_text())
    assert report["end"] == END
    assert report["bad"] == []
    assert report["samples"][-1]["rss_mib"] > 10
    assert {kind.partition(":")[0] for kind in report["outcomes"]} <= set(scripts("soak").WEIGHTS)
    assert sum(report["outcomes"].values()) > 5
    table = capsys.readouterr().out
    assert "MiB/h of resident memory" in table
    assert "bad   nothing" in table
