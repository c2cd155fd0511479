"""Runs a benchmark's rows in the test's process: worker processes take longer to start than tiny rows to measure."""

from __future__ import annotations

import gc
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from finemoe.bench import worker_process
from finemoe.bench.measurements import PromptsResult, RandomTokensResult, WorkerTask
from finemoe.errors import FinemoeError


def run_rows_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces `run_worker` by the worker's functions in this process; tasks and results still pass through JSON."""

    def run_worker(task: WorkerTask, _scratch: Path, _timeout_s: float) -> RandomTokensResult | PromptsResult | str:
        given = WorkerTask.from_dict(json.loads(json.dumps(asdict(task))))
        try:
            result = asdict(
                worker_process.measure_prompts(given) if given.requests else worker_process.measure_random_tokens(given)
            )
        except FinemoeError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            gc.collect()  # the model
        raw = json.loads(json.dumps(result))
        return PromptsResult.from_dict(raw) if given.requests else RandomTokensResult.from_dict(raw)

    monkeypatch.setattr("finemoe.bench.run.run_worker", run_worker)
    monkeypatch.setattr(worker_process, "unmap_idle_code", lambda: 0)  # this process uses that code
    monkeypatch.setattr(worker_process, "PROBE_BYTES", 1 << 20)
