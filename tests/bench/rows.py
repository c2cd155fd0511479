"""Rows of a benchmark without a process for each, which takes longer to start than a tiny row to measure."""

from __future__ import annotations

import gc
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from finemoe.bench import worker_process as child
from finemoe.bench.measurements import Answered, Measured, Order
from finemoe.errors import FinemoeError


def run_rows_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows run here, by what their processes run, and what they are given and give is JSON on its way as ever."""

    def run_order(order: Order, _scratch: Path, _timeout_s: float) -> Measured | Answered | str:
        given = Order.from_dict(json.loads(json.dumps(asdict(order))))
        try:
            result = asdict(child.measure_answers(given) if given.requests else child.measure(given))
        except FinemoeError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            gc.collect()  # the model
        raw = json.loads(json.dumps(result))
        return Answered.from_dict(raw) if given.requests else Measured.from_dict(raw)

    monkeypatch.setattr("finemoe.bench.run.run_order", run_order)
    monkeypatch.setattr(child, "unmap_idle_code", lambda: 0)  # it is not idle here
    monkeypatch.setattr(child, "PROBE_BYTES", 1 << 20)
