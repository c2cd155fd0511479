"""What to record, and how: the flags of `finemoe record`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from finemoe.errors import ConfigError


@dataclass(frozen=True)
class RecordConfig:
    """Which prompts to record, how many together, and how far the gates look ahead."""

    field: str | None = dataclasses.field(default=None, metadata={"help": "the JSON field that holds the prompt"})
    limit: int | None = dataclasses.field(default=None, metadata={"help": "record at most this many prompts"})
    skip: int = dataclasses.field(default=0, metadata={"help": "pass over this many prompts first"})
    batch_size: int = dataclasses.field(default=1, metadata={"help": "prompts that run together"})
    max_prompt_tokens: int | None = dataclasses.field(default=None, metadata={"help": "leave longer prompts out"})
    lookahead: int = dataclasses.field(
        default=0, metadata={"help": "record what the gates of this many later layers make of each layer's state"}
    )
    append: bool = dataclasses.field(default=False, metadata={"help": "add to the trace if it exists"})
    force: bool = dataclasses.field(default=False, metadata={"help": "replace the trace if it exists"})

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("skip", 0), ("batch_size", 1), ("max_prompt_tokens", 1), ("lookahead", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')}: {value} is not at least {least}")
        if self.append and self.force:
            raise ConfigError("--force: replaces the trace, --append adds to it; give one of them")
