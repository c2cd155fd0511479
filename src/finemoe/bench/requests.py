"""Real prompts for a benchmark: read, encoded once for all rows, those that are too long left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from finemoe.bench.config import BenchConfig
from finemoe.checkpoint import Checkpoint
from finemoe.errors import ConfigError
from finemoe.model import context_tokens, read_config
from finemoe.session import encode, load_tokenizer
from finemoe.trace import open_trace
from finemoe.trace.prompts import PromptFlags, read_prompts

Request = tuple[int, ...]  # token ids of a prompt, the chat template included


class Requests(NamedTuple):
    """What every row of a run answers: `warm` first, unmeasured."""

    measured: tuple[Request, ...]
    warm: tuple[Request, ...] = ()
    stored: int = 0  # recorded requests that policies learn from before


def read_requests(config: BenchConfig, checkpoint: Checkpoint, log: Callable[[str], None]) -> Requests:
    """The requests that `config` names; none without `--prompts`.

    Raises:
        CheckpointError: the model has no tokenizer.
        ConfigError: a file can't be read, or holds no prompt that fits; the message names the flag.
        TraceError: `--store` is no trace.
    """
    if config.prompts is None:
        return Requests(())
    tokenizer = load_tokenizer(checkpoint.folder)
    positions = context_tokens(read_config(checkpoint.folder, trust_remote_code=config.trust_remote_code))
    longest = None if positions is None else positions - config.new_tokens

    def read(file: str, limit: int | None, flag: str) -> tuple[Request, ...]:
        flags = PromptFlags(flag, "--prompt-field")
        prompts = read_prompts(Path(file), config.prompt_field, limit, flags=flags)
        if prompts.skipped:
            log(f"{flag}: entries without a prompt, left out: {prompts.skipped}")
        return _encoded(tokenizer, prompts.texts, longest, flag, log)

    stored = 0
    if config.store is not None:
        with open_trace(config.store) as trace:
            stored = len(trace)
    measured = read(config.prompts, config.prompts_limit, "--prompts")
    if config.warm_prompts is None:
        return Requests(measured, stored=stored)
    return Requests(measured, read(config.warm_prompts, config.warm_prompts_limit, "--warm-prompts"), stored)


def _encoded(
    tokenizer: Any, texts: tuple[str, ...], longest: int | None, flag: str, log: Callable[[str], None]
) -> tuple[Request, ...]:
    encoded = [tuple(encode(tokenizer, text)[0].tolist()) for text in texts]
    fitting = tuple(ids for ids in encoded if ids and (longest is None or len(ids) <= longest))
    if not fitting:
        raise ConfigError(f"{flag}: none of the {len(encoded)} prompts has at most {longest} tokens")
    if left_out := len(encoded) - len(fitting):
        log(f"{flag}: prompts that are empty or have more than {longest} tokens, left out: {left_out}")
    return fitting
