"""Recorded routing: what a model's routers chose, token by token. See docs/trace-format.md.

Reading needs neither torch nor a model; only `finemoe.trace.record` does, and is imported where it is used.
"""

from finemoe.trace.header import TraceHeader
from finemoe.trace.read import Trace, open_trace
from finemoe.trace.request import DECODE, PREFILL, RequestTrace
from finemoe.trace.split import split
from finemoe.trace.write import TraceWriter, refuse_existing

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
