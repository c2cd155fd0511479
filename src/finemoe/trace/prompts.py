"""Reads prompt files: JSON lines, a JSON list, or plain text; gzipped or not."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from finemoe.config import refuse_undecodable
from finemoe.errors import ConfigError

# the fields that hold a prompt, in order of preference
FIELDS = ("prompt", "question", "instruction", "text", "turns", "messages", "conversations", "conversation")
_USER_ROLES = {"human", "user", "prompter"}


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a file."""

    texts: tuple[str, ...]
    skipped: int  # entries without a prompt


class PromptFlags(NamedTuple):
    """A command's names of its flags for prompts, for error messages."""

    file: str = "--prompts"
    field: str = "--field"


def read_prompts(
    path: Path, field: str | None = None, limit: int | None = None, skip: int = 0, flags: PromptFlags | None = None
) -> PromptSet:
    """The prompts of a file; for a conversation, the user's first turn.

    Args:
        path: JSON lines or a JSON list, of objects or strings; anything else is text with one prompt per line.
        field: the field of an object to read; by default the first of `FIELDS` that it has.
        limit: stop after this many prompts.
        skip: leave out this many first.
        flags: named in errors; by default those of `finemoe record`.

    Raises:
        ConfigError: the file is missing, damaged or has no prompt; the message names line and fields.
    """
    flags = flags or PromptFlags()
    skipped = 0

    def texts() -> Iterator[str]:
        nonlocal skipped
        for place, entry in _entries(path, flags):
            text = _text(entry, field, place, flags)
            if text.strip():
                refuse_undecodable(text, f"{flags.file}: {place}")  # JSON escapes allow lone surrogates
                yield text
            else:
                skipped += 1

    try:
        found = tuple(islice(texts(), skip, None if limit is None else skip + limit))
    except (OSError, EOFError) as error:
        raise ConfigError(
            f"{flags.file}: {path} can't be read ({getattr(error, 'strerror', None) or error})"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{flags.file}: {path} is neither JSON nor text ({error.reason})") from error
    if not found:
        raise ConfigError(f"{flags.file}: {path} holds no prompt{f' beyond the {skip} to skip' if skip else ''}")
    return PromptSet(found, skipped)


def _entries(path: Path, flags: PromptFlags) -> Iterator[tuple[str, Any]]:
    """Place and content of each entry."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        file.seek(0)
        if start == "[":
            try:
                entries = json.load(file)
            except ValueError as error:
                raise ConfigError(f"{flags.file}: {path} is damaged JSON ({error})") from error
            yield from ((f"{path}: entry {number}", entry) for number, entry in enumerate(entries))
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if start != "{":
                yield f"{path}:{number}", line.strip()
                continue
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{flags.file}: {path}:{number} is damaged JSON ({error})") from error


def _text(entry: Any, field: str | None, place: str, flags: PromptFlags) -> str:
    """The prompt of an entry; empty for a conversation without a user's turn."""
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, dict):
        raise ConfigError(f"{flags.file}: {place} is neither an object nor a string")
    name = field if field is not None else next((name for name in FIELDS if name in entry), None)
    if name not in entry:
        missing = f"no field {field!r}" if field else f"none of the fields {', '.join(FIELDS)}"
        raise ConfigError(f"{flags.file}: {place} has {missing}, but {', '.join(map(repr, entry))}; give {flags.field}")
    value = entry[name]
    if isinstance(value, list):
        return next((text for turn in value if (text := _user_text(turn)) is not None), "")
    if not isinstance(value, str):
        raise ConfigError(f"{flags.file}: {place}: its {name} is neither text nor a conversation")
    return value


def _user_text(turn: Any) -> str | None:
    """The text of a turn; `None` if it is not the user's."""
    if isinstance(turn, str):
        return turn
    if isinstance(turn, dict) and turn.get("from", turn.get("role")) in _USER_ROLES:
        text = turn.get("value", turn.get("content"))
        return text if isinstance(text, str) else None
    return None
