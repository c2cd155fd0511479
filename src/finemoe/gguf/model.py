"""A loaded GGUF model that generates tokens within an expert memory budget.

It runs one sequence at a time and keeps its KV cache: for a prompt that continues the sequence, only new tokens are
computed.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from types import TracebackType
from typing import Any, Self

from finemoe.errors import CheckpointError, ConfigError, FinemoeError
from finemoe.gguf.chat_template import render
from finemoe.gguf.load import Loaded
from finemoe.gguf.sampler import SamplingOptions, TokenSampler
from finemoe.gguf.vocabulary import GgufVocabulary

_ROOM_TOKENS = 256  # context lengths are multiples of this


class GgufModel:
    """What `finemoe.load` returns for a GGUF file.

    Args:
        loaded: the loaded parts; the model takes ownership.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        api = loaded.library.api
        self.file = loaded.file
        self.vocabulary = GgufVocabulary(loaded.library, loaded.model, loaded.file.name)
        trained = int(api.llama_model_n_ctx_train(loaded.model))
        self.context_tokens = trained if trained > 0 else None
        template = api.llama_model_chat_template(loaded.model, None)
        self.chat_template: str | None = None if template is None else template.decode(errors="replace")
        self._cuts = not (api.llama_model_is_hybrid(loaded.model) or api.llama_model_is_recurrent(loaded.model))
        self._saved: tuple[list[int], bytes] = [], b""  # the last prompt, and the state after it
        self._requests = itertools.count()
        self._lock = threading.RLock()
        self._finalizer = weakref.finalize(self, loaded.resources.close)
        self.finemoe: Any = None  # set by `attach`

    @property
    def parts(self) -> Loaded:
        """The loaded parts, for statistics and tests."""
        return self._loaded

    def attach(self, handle: Any) -> None:
        """Set `model.finemoe`, as on every other model: statistics, maps, and a `close` that frees everything."""
        self.finemoe = handle
        self._finalizer.detach()
        self._finalizer = weakref.finalize(self, handle.close)

    @property
    def lock(self) -> threading.RLock:
        """Held during a pass, while the pool is cleared and while the model is closed."""
        return self._lock

    def encode(self, prompt: str | Sequence[dict[str, str]], *, raw: bool = False) -> list[int]:
        """Tokenize a conversation or a prompt. With a chat template, a prompt becomes one user turn unless `raw`.

        Raises:
            CheckpointError: the chat template fails, or a conversation is given without a chat template.
        """
        if isinstance(prompt, str) and (raw or not self.chat_template):
            return self.vocabulary.encode(prompt)
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if not self.chat_template:
            raise CheckpointError(f"{self.file.name}: has no chat template for a conversation; use finemoe generate")
        bos = self.vocabulary.bos
        text = render(self.chat_template, turns, bos=bos, eos=self.vocabulary.eos, name=self.file.name)
        if bos and self.vocabulary.adds_bos:  # `encode` adds it
            text = text.removeprefix(bos)
        return self.vocabulary.encode(text, special=True)

    def generate(
        self,
        tokens: Sequence[int],
        max_new_tokens: int,
        sampling: SamplingOptions | None = None,
        on_prefill: Callable[[int], object] | None = None,
    ) -> Generator[int]:
        """Generate tokens that continue `tokens`; yields each one, including the end token.

        Args:
            tokens: the complete prompt; a prefix that is in the KV cache is not computed again.
            max_new_tokens: maximum number of new tokens.
            sampling: sampling settings; greedy by default.
            on_prefill: called with the number of cached prompt tokens, then with the size of each computed
                micro-batch.

        Raises:
            ConfigError: `tokens` is empty, has an id outside the vocabulary, or fills the context.
            ExpertReadError: an expert can't be read.
            CheckpointError: the model's logits are not finite.
        """
        self._refuse_tokens(tokens)
        runner = self._loaded.runner
        request = next(self._requests)
        with self._lock:
            runner.make_room(self._room(len(tokens) + max_new_tokens))
            self._prefill(request, list(tokens), on_prefill or (lambda _: None))
            sampler = TokenSampler(self._loaded.library, sampling or SamplingOptions(), self.vocabulary.size, tokens)
            try:
                for number in range(1, max_new_tokens + 1):
                    runner.logits()  # raises if not finite
                    token = sampler.next(runner.context)
                    yield token
                    if number == max_new_tokens or self.vocabulary.ends(token):
                        return
                    runner.extend(request, [token], logits=True, decoding=True)
            finally:
                sampler.close()

    def close(self) -> None:
        """Free the model, its slots, readers and open files. A closed model can't run."""
        with self._lock:
            self._finalizer()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._finalizer.alive

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _refuse_tokens(self, tokens: Sequence[int]) -> None:
        if self.closed:
            raise FinemoeError("this model was closed; load it again")
        if not len(tokens):
            raise ConfigError("PROMPT: is empty; there is nothing to continue")
        if min(tokens) < 0 or max(tokens) >= self.vocabulary.size:
            raise ConfigError(f"PROMPT: has token ids outside the vocabulary of {self.vocabulary.size}")
        if self.context_tokens is not None and len(tokens) >= self.context_tokens:
            raise ConfigError(
                f"PROMPT: has {len(tokens)} tokens, and the model's context holds {self.context_tokens}, including "
                "at least one for the answer; shorten it"
            )

    def _room(self, tokens: int) -> int:
        """The context length for this many tokens: rounded up, limited by the trained context length."""
        tokens = -(-tokens // _ROOM_TOKENS) * _ROOM_TOKENS
        return tokens if self.context_tokens is None else min(tokens, max(self.context_tokens, _ROOM_TOKENS))

    def _prefill(self, request: int, tokens: list[int], on_prefill: Callable[[int], object]) -> None:
        """Compute the part of a prompt that is not in the KV cache."""
        runner = self._loaded.runner
        done = self._shared(tokens)
        if done < len(runner.tokens):
            before, state = self._saved
            if self._cuts and done and runner.context.cut(done):
                del runner.tokens[done:]
            elif before and len(before) < len(tokens) and tokens[: len(before)] == before:
                runner.tokens = list(before) if runner.context.restore(state) else []
            else:
                runner.forget()
        on_prefill(len(runner.tokens))
        runner.extend(request, tokens[len(runner.tokens) :], logits=True, progress=on_prefill)
        if not self._cuts:
            self._saved = list(tokens), runner.context.save()

    def _shared(self, tokens: list[int]) -> int:
        """Length of the common prefix of sequence and prompt, excluding the prompt's last token: it needs logits."""
        computed = self._loaded.runner.tokens
        both = zip(computed, tokens[:-1], strict=False)
        return next((n for n, (a, b) in enumerate(both) if a != b), min(len(computed), len(tokens) - 1))
