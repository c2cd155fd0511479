"""Measures finemoe beside transformers, on one checkpoint, in one run. `finemoe.bench.run.run_bench` is the way in.

`config` holds the settings, `link` the disk's own speed, `subject` what is passed between processes, `child` a row's
process, `run` the order of rows, `figures` and `report` what follows from it, `table` their layout for people.
"""

from __future__ import annotations

from finemoe.bench.config import BenchConfig

__all__ = ["BenchConfig"]
