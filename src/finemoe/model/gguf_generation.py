"""Generates streamed text with timings from a loaded GGUF model, for a prompt or a conversation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing

from tqdm import tqdm

from finemoe.config import GenerateConfig, refuse_undecodable
from finemoe.errors import ConfigError
from finemoe.gguf.model import GgufModel
from finemoe.gguf.sampler import SamplingOptions
from finemoe.gguf.vocabulary import TextStream
from finemoe.model.reply import Reply, fitting_tokens

_ALL_TOKENS = 1 << 16  # penalty window: the complete text


class GgufSession:
    """A session with a GGUF model and its tokenizer.

    Args:
        model: from `finemoe.load`.
    """

    def __init__(self, model: GgufModel) -> None:
        self.model = model
        self.context_tokens = model.context_tokens

    def prompt_ids(self, prompt: str | Sequence[dict[str, str]], *, raw: bool = False) -> list[int]:
        """Tokenize a conversation or a prompt. With a chat template, a prompt becomes one user turn unless `raw`."""
        refuse_undecodable(prompt if isinstance(prompt, str) else prompt[-1]["content"], "PROMPT")
        return self.model.encode(prompt, raw=raw)

    def reply(
        self,
        prompt: str | Sequence[dict[str, str]],
        config: GenerateConfig,
        on_text: Callable[[str], None] = lambda _: None,
        *,
        prefill_chunk: int | None = None,
        progress: bool = False,
    ) -> Reply:
        """Answer `prompt`. For a continued conversation only new tokens are computed.

        Args:
            prompt: text, or the turns of a conversation (`role`, `content`).
            config: length limit and sampling settings.
            on_text: called with each piece of new text, in complete characters.
            prefill_chunk: must be `None`: the expert memory determines the micro-batch.
            progress: show a progress bar on standard error until the first token.

        Raises:
            ConfigError: the prompt is empty, or fills the model's context.
            CheckpointError: the chat template fails, or the model's logits are not finite.
        """
        if prefill_chunk is not None:
            raise ConfigError("--prefill-chunk: for GGUF models it follows from --expert-memory; leave it out")
        tokens = self.prompt_ids(prompt, raw=config.raw)
        if not tokens:
            raise ConfigError("PROMPT: is empty; there is nothing to continue")
        max_new_tokens = fitting_tokens(self.context_tokens, len(tokens), config.max_new_tokens)
        self.model.finemoe.reset_stats()
        stream, new, times_s = TextStream(self.model.vocabulary), list[int](), list[float]()
        with ExitStack() as prefill:
            advance = self._show_prefill(prefill, len(tokens)) if progress else None
            start_s = time.perf_counter()
            with closing(self.model.generate(tokens, max_new_tokens, sampling_options(config), advance)) as answer:
                for token in answer:
                    times_s.append(time.perf_counter())
                    prefill.close()
                    new.append(token)
                    if text := stream.add(token):
                        on_text(text)
            if rest := stream.end():
                on_text(rest)
            total_s = time.perf_counter() - start_s
        return Reply(
            text=self.model.vocabulary.decode(new),
            token_ids=new,
            prompt_tokens=len(tokens),
            finish_reason="stop" if self.model.vocabulary.ends(new[-1]) else "length",
            ttft_s=times_s[0] - start_s,
            tpot_s=(times_s[-1] - times_s[0]) / (len(times_s) - 1) if len(times_s) > 1 else 0.0,
            total_s=total_s,
            stats=self.model.finemoe.stats(),
        )

    @staticmethod
    def _show_prefill(until_first_token: ExitStack, tokens: int) -> Callable[[int], object]:
        """A progress bar over the prompt's tokens."""
        bar = until_first_token.enter_context(
            tqdm(total=tokens, desc="Reading prompt", unit="token", leave=False, delay=1)
        )
        advance: Callable[[int], object] = bar.update
        return advance


def sampling_options(config: GenerateConfig) -> SamplingOptions:
    """The sampling settings of a `GenerateConfig`."""
    return SamplingOptions(
        config.temperature,
        config.top_k,
        config.top_p,
        config.min_p,
        1.0 if config.repetition_penalty is None else config.repetition_penalty,
        config.frequency_penalty,
        config.presence_penalty,
        _ALL_TOKENS,
        config.seed,
    )
