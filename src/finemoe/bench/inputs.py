"""Inputs of a benchmark: prompts, encoded once for all rows; the text for perplexity; a trace to learn from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F  # noqa: N812 - the name that torch users know

from finemoe.bench.config import BenchConfig
from finemoe.checkpoint import Checkpoint
from finemoe.errors import ConfigError
from finemoe.model import context_tokens, read_config
from finemoe.model.generation import encode, load_tokenizer
from finemoe.sim.workload import TraceView
from finemoe.trace import open_trace
from finemoe.trace.prompts import PromptFlags, read_prompts

Request = tuple[int, ...]  # token ids of a prompt, the chat template included


class Requests(NamedTuple):
    """The requests that every row answers: `warm` first, unmeasured."""

    measured: tuple[Request, ...]
    warm: tuple[Request, ...] = ()
    stored: int = 0  # number of recorded requests that policies learn from first


def read_requests(config: BenchConfig, checkpoint: Checkpoint, log: Callable[[str], None]) -> Requests:
    """The requests that `config` names; none without `--prompts`.

    Raises:
        CheckpointError: the model has no tokenizer.
        ConfigError: a file can't be read, or holds no prompt that fits; the message names the flag.
        TraceError: `--store` is not a trace.
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
            log(f"{flag}: skipped entries without a prompt: {prompts.skipped}")
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
        log(f"{flag}: skipped prompts that are empty or longer than {longest} tokens: {left_out}")
    return fitting


WINDOW_TOKENS = 256  # of independent windows for perplexity


def read_text(config: BenchConfig, checkpoint: Checkpoint) -> tuple[int, ...]:
    """Token ids to measure perplexity on; none if it is not measured.

    Without `--perplexity FILE`, lossy rows use the reference manual of the running Python.

    Raises:
        CheckpointError: the model has no tokenizer.
        ConfigError: the file can't be read, or has fewer than two tokens; the message names the flag.
    """
    if config.perplexity is None and (not config.lossy or config.replay_routing is not None):
        return ()
    if config.perplexity is None:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
    else:
        try:
            text = Path(config.perplexity).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"--perplexity: {config.perplexity} can't be read ({error})") from error
    # a token has rarely more than eight characters: a long file need not be encoded in full
    ids = load_tokenizer(checkpoint.folder)(text[: 64 * config.perplexity_tokens])["input_ids"]
    if len(ids) < 2:
        raise ConfigError(f"--perplexity: {config.perplexity} has fewer than two tokens")
    return tuple(ids[: config.perplexity_tokens])


@torch.no_grad()
def perplexity(model: Any, ids: Sequence[int]) -> float:
    """Perplexity of `ids`: exp of the mean negative log-likelihood of each token but the first of each window."""
    total, count = 0.0, 0
    for window in torch.tensor([list(ids)]).split(WINDOW_TOKENS, dim=1):
        if window.shape[1] > 1:
            logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
            total += float(F.cross_entropy(logits, window[0, 1:], reduction="sum"))
            count += window.shape[1] - 1
    return math.exp(total / count)


def learn_trace(handle: Any, path: Path) -> None:
    """Trains the policy of a loaded model on a trace, as the simulator does.

    Args:
        handle: `model.finemoe`.
        path: the trace.

    Raises:
        ConfigError: the trace has another number of layers or experts than the model.
        TraceError: the file is not a trace.
    """
    with open_trace(path) as trace:
        header, layouts = trace.header, handle.expert_index.layouts
        shape = len(layouts), max(layout.experts for layout in layouts)
        if (header.layers, header.experts) != shape:
            raise ConfigError(
                f"--store: {path} has {header.layers} MoE layers of {header.experts} experts, the model {shape[0]} of "
                f"{shape[1]}; record one with finemoe record"
            )
        handle.learn(TraceView(trace).recorded(range(len(trace))))
