"""The log: one line of JSON an event, on standard error. Prompts and answers are left out unless asked for."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

LOG = logging.getLogger("finemoe.serving")
_OURS = ("finemoe.serving", "uvicorn.error")


class JsonLines(logging.Formatter):
    """`time`, `level`, `event`, and whatever came with `extra={"fields": {..}}`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)  # in ASCII: a log's reader may know no other encoding


def log(event: str, level: int = logging.INFO, **fields: Any) -> None:
    """Write a line."""
    LOG.log(level, event, extra={"fields": fields})


def to_standard_error() -> None:
    """Send the server's own lines, and uvicorn's complaints, to standard error as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in _OURS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO if name == LOG.name else logging.WARNING)
        logger.propagate = False
