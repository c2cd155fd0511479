"""Recorded routing: what a model's routers chose, token by token. See docs/trace-format.md.

Reading needs neither torch nor a model; only `finemoe.trace.recorder` does, and is imported where it is used.
"""

from finemoe.trace.format import RequestTrace, TraceHeader
from finemoe.trace.reader import Trace, open_trace
from finemoe.trace.stats import split
from finemoe.trace.writer import TraceWriter, refuse_existing
from finemoe.types import DECODE, PREFILL

__all__ = [
    "DECODE",
    "PREFILL",
    "RequestTrace",
    "Trace",
    "TraceHeader",
    "TraceWriter",
    "open_trace",
    "refuse_existing",
    "split",
]
