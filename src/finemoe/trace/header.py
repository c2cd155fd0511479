"""What a trace says about itself: the model's sizes, which fields were recorded, and where it all comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from finemoe.errors import TraceError

# what a trace may lack; a field that is not listed in its header was not recorded, and is never made up
OPTIONAL = ("batch", "weights", "probs", "embeddings", "lookahead")
_LARGEST = np.iinfo(np.uint16).max


@dataclass(frozen=True, kw_only=True)
class TraceHeader:
    """Describes a trace. Letters as everywhere: `L` layers, `E` experts, `K` active, `D` width, `n` lookahead.

    Raises:
        TraceError: sizes that contradict each other or the fields; the message names the size.
    """

    model: str
    layers: int
    experts: int
    active: int
    width: int = 0  # D; 0 without embeddings
    lookahead: int = 0  # n; 0 without lookahead
    fields: tuple[str, ...] = ()  # of OPTIONAL, in its order
    fingerprint: str | None = None  # of the model's config and checkpoint headers
    source: str = "recorded"
    normalisation: str | None = None  # how `probs` and `lookahead` came from what the routers give
    licence: str | None = None
    notes: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # how it was recorded
    vocabulary: tuple[str, ...] | None = None  # what token ids count where the source has strings and no ids

    def __post_init__(self) -> None:
        for name, least in (("layers", 1), ("experts", 1), ("active", 1), ("width", 0), ("lookahead", 0)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= _LARGEST:
                raise TraceError(f"a trace's {name} must be a whole number from {least} to {_LARGEST}, not {value!r}")
        if self.active > self.experts:
            raise TraceError(f"a trace can't have {self.active} active of {self.experts} experts")
        if self.fields != tuple(name for name in OPTIONAL if name in self.fields):
            raise TraceError(f"a trace's fields must be of {', '.join(OPTIONAL)}, in this order, not {self.fields!r}")
        for name, size in (("embeddings", self.width), ("lookahead", self.lookahead)):
            if (name in self.fields) != (size > 0):
                raise TraceError(f"a trace has the field {name} if and only if its size is above 0, not {size}")

    @property
    def missing(self) -> tuple[str, ...]:
        """The optional fields that were not recorded."""
        return tuple(name for name in OPTIONAL if name not in self.fields)

    @property
    def sentinel(self) -> int:
        """The expert id that stands where a token executed fewer than `K` experts."""
        return int(np.iinfo(self.id_dtype).max)

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """Of expert ids: the smallest that has room for the sentinel too."""
        return np.dtype(np.uint8 if self.experts <= np.iinfo(np.uint8).max else np.uint16)

    def difference(self, other: TraceHeader) -> str | None:
        """What keeps requests under `other` from a trace under this header; `None` if nothing does."""
        alike = (
            "model", "fingerprint", "layers", "experts", "active", "width", "lookahead", "fields", "normalisation",
            "vocabulary",
        )  # fmt: skip
        for name in alike:
            own, theirs = getattr(self, name), getattr(other, name)
            if name == "model" and self.fingerprint and self.fingerprint == other.fingerprint:
                continue  # the same model by another path
            if own != theirs:
                return f"{name}: {_short(own)} there, {_short(theirs)} here"
        return None

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> TraceHeader:
        """The header out of its JSON. Keys of later minor additions are passed over.

        Raises:
            TraceError, KeyError, TypeError: it is not one.
        """
        known = {each.name for each in fields(cls)}
        given = {name: value for name, value in table.items() if name in known}
        for name in ("fields", "vocabulary"):
            if given.get(name) is not None:
                given[name] = tuple(given[name])
        return cls(**given)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
