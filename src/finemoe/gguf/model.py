"""A loaded GGUF model: tokens in, tokens out, under an expert memory budget.

One sequence at a time. What is computed of it stays: a prompt that continues it costs its new tokens alone.
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

_ROOM_TOKENS = 256  # contexts grow by


class GgufModel:
    """What `finemoe.load` returns for a GGUF file.

    Args:
        loaded: its parts, which it owns from here on.
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
        self._saved: tuple[list[int], bytes] = [], b""  # a prompt, and what was remembered at its end
        self._requests = itertools.count()
        self._lock = threading.RLock()
        self._finalizer = weakref.finalize(self, loaded.resources.close)
        self.finemoe: Any = None  # what `attach` is given

    @property
    def parts(self) -> Loaded:
        """What it is made of, for statistics and tests."""
        return self._loaded

    def attach(self, handle: Any) -> None:
        """`handle` becomes `model.finemoe`, as of every other model: statistics, maps, and a `close` that frees all."""
        self.finemoe = handle
        self._finalizer.detach()
        self._finalizer = weakref.finalize(self, handle.close)

    @property
    def lock(self) -> threading.RLock:
        """Held during a pass, and while the pool is emptied or the model closed."""
        return self._lock

    def encode(self, prompt: str | Sequence[dict[str, str]], *, raw: bool = False) -> list[int]:
        """Tokens of a conversation, or of a prompt: one user turn where there is a chat template.

        Raises:
            CheckpointError: the chat template fails, or there is none for a conversation.
        """
        if isinstance(prompt, str) and (raw or not self.chat_template):
            return self.vocabulary.encode(prompt)
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if not self.chat_template:
            raise CheckpointError(f"{self.file.name}: has no chat template for a conversation; use finemoe generate")
        bos = self.vocabulary.bos
        text = render(self.chat_template, turns, bos=bos, eos=self.vocabulary.eos, name=self.file.name)
        if bos and self.vocabulary.adds_bos:  # or there would be two
            text = text.removeprefix(bos)
        return self.vocabulary.encode(text, special=True)

    def generate(
        self,
        tokens: Sequence[int],
        max_new_tokens: int,
        sampling: SamplingOptions | None = None,
        on_prefill: Callable[[int], object] | None = None,
    ) -> Generator[int]:
        """Continue `tokens`; yields each new one, the one that ends the answer included.

        Args:
            tokens: the whole text so far; what the sequence has of it already is not computed again.
            max_new_tokens: at most so many.
            sampling: how each is chosen; greedy by default.
            on_prefill: called with the number of the prompt's tokens that were computed, as they are.

        Raises:
            ConfigError: there are no tokens, or one that the model does not have, or no room for an answer.
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
                    runner.logits()  # refuses what is not finite
                    token = sampler.next(runner.context)
                    yield token
                    if number == max_new_tokens or self.vocabulary.ends(token):
                        return
                    runner.extend(request, [token], logits=True, decoding=True)
            finally:
                sampler.close()

    def close(self) -> None:
        """Free the model, its slots, the readers and the open files. It can't run any more."""
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
            raise ConfigError(f"PROMPT: has tokens outside of the model's {self.vocabulary.size}")
        if self.context_tokens is not None and len(tokens) >= self.context_tokens:
            raise ConfigError(
                f"PROMPT: has {len(tokens)} tokens, and the model's context holds {self.context_tokens}, at least one "
                "of them an answer's; give a shorter one"
            )

    def _room(self, tokens: int) -> int:
        """For so many tokens, and a few more, as far as the model goes."""
        tokens = -(-tokens // _ROOM_TOKENS) * _ROOM_TOKENS
        return tokens if self.context_tokens is None else min(tokens, max(self.context_tokens, _ROOM_TOKENS))

    def _prefill(self, request: int, tokens: list[int], on_prefill: Callable[[int], object]) -> None:
        """Compute a prompt, but for what the sequence has of it already."""
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
        """How many tokens the sequence and a prompt begin with alike; at least the prompt's last one is computed."""
        computed = self._loaded.runner.tokens
        both = zip(computed, tokens[:-1], strict=False)
        return next((n for n, (a, b) in enumerate(both) if a != b), min(len(computed), len(tokens) - 1))
