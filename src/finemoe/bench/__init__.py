"""`finemoe bench`: finemoe and transformers on one checkpoint, in one run. `run.run_bench` is the entry point.

`config` has the settings, `inputs` the prompts and texts, `disk_probe` the disk's bandwidth, `run` the order of rows,
`worker_process` the process of a row, `measurements` the data between the two, `row_metrics` the figures derived from
it and their comparison, `table` their layout, `serve/` the benchmark of the server.
"""

from __future__ import annotations

from finemoe.bench.config import BenchConfig

__all__ = ["BenchConfig"]
