"""Traces: a model's recorded routing, token by token. See docs/trace-format.md.

Reading and writing need neither torch nor a model; `finemoe.trace.recorder` and `finemoe.trace.forced_routing` do.
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
