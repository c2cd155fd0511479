"""A llama.cpp context: the KV cache of one sequence, and forward passes over new tokens."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from finemoe.errors import BudgetError, CheckpointError
from finemoe.gguf.binding import EvalCallback, Library
from finemoe.gguf.structure import Eval

CACHE_TYPES = {"f16": 1, "q8_0": 8}  # ggml types of the KV cache
_SEQUENCE = 0


@dataclass(frozen=True)
class ContextOptions:
    """Settings of forward passes. `micro_batch`, `threads` and `cache_type` affect the rounding of results."""

    micro_batch: int  # tokens per pass
    threads: int
    cache_type: str = "f16"  # of the KV cache


class Context:
    """The KV cache of one sequence, and forward passes over it.

    Args:
        library: the loaded library.
        model: handle of the library's model.
        tokens: the sequence's maximum length.
        options: settings of forward passes.
        evaluate: callback for every graph node: first asked whether it needs the node's result, then called with
            it; returning False for a result aborts the pass. It must not raise. `None`: no callbacks.

    Raises:
        BudgetError: there is not enough memory for the KV cache.
    """

    def __init__(
        self, library: Library, model: int, tokens: int, options: ContextOptions, evaluate: Eval | None = None
    ) -> None:
        self._library = library
        self._api = api = library.api
        self._model = model
        self._callback = EvalCallback(_adapt(evaluate)) if evaluate is not None else None
        params = api.llama_context_default_params()
        params.n_ctx = tokens
        params.n_batch = params.n_ubatch = min(options.micro_batch, tokens)
        params.n_threads = params.n_threads_batch = options.threads
        params.type_k = params.type_v = CACHE_TYPES[options.cache_type]
        params.op_offload = params.offload_kqv = False
        if self._callback is not None:
            params.cb_eval = ctypes.cast(self._callback, ctypes.c_void_p)
        library.last_error()
        self._context = api.llama_init_from_model(model, params)
        if not self._context:
            raise BudgetError(
                f"the model's context of {tokens} tokens can't be created ({library.last_error()}); use fewer tokens"
            )
        self.micro_batch: int = params.n_ubatch
        self.tokens = int(api.llama_n_ctx(self._context))
        self._vocabulary = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(model)))
        self._batch = api.llama_batch_init(self.micro_batch, 0, 1)

    @property
    def handle(self) -> int:
        """The library's context pointer."""
        handle: int = self._context
        return handle

    def run(self, tokens: Sequence[int], position: int, *, logits: bool) -> int:
        """Run a forward pass over at most one micro-batch of new tokens. Returns the library's status: 0 on success.

        Args:
            tokens: token ids.
            position: the first token's position in the sequence.
            logits: whether to compute the last token's logits.
        """
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = position + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = _SEQUENCE
            batch.logits[index] = 0
        batch.logits[len(tokens) - 1] = logits
        status: int = self._api.llama_decode(self._context, batch)
        return status

    def logits(self) -> npt.NDArray[np.float32]:
        """Logits of the last pass's last token, `[vocabulary]`; a view, valid until the next pass.

        Raises:
            CheckpointError: a logit is not finite.
        """
        pointer = self._api.llama_get_logits_ith(self._context, -1)
        values = np.ctypeslib.as_array(pointer, (self._vocabulary,))
        if not np.isfinite(values.max()):  # NaN propagates through max
            raise CheckpointError("the model's logits are not finite; its file is damaged: fetch it again")
        return values

    def cut(self, position: int) -> bool:
        """Remove the tokens at `position` and after. Returns whether the library supports it."""
        done: bool = self._api.llama_memory_seq_rm(self._api.llama_get_memory(self._context), _SEQUENCE, position, -1)
        return done

    def clear(self) -> None:
        """Remove all tokens."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)  # noqa: FBT003 - clears the data too

    def save(self) -> bytes:
        """The sequence's state for `restore`; empty if the library can't save it."""
        size = self._api.llama_state_seq_get_size(self._context, _SEQUENCE)
        state = ctypes.create_string_buffer(size)
        if not size or not self._api.llama_state_seq_get_data(self._context, state, size, _SEQUENCE):
            return b""
        return state.raw

    def restore(self, state: bytes) -> bool:
        """Restore a state from `save`. Returns whether it succeeded; on failure the sequence is empty."""
        self.clear()
        if state and self._api.llama_state_seq_set_data(self._context, state, len(state), _SEQUENCE):
            return True
        self.clear()
        return False

    def close(self) -> None:
        """Free the context."""
        if self._context:
            self._api.llama_batch_free(self._batch)
            self._api.llama_free(self._context)
            self._context = None


def _adapt(evaluate: Eval) -> Any:
    return lambda address, ask, _: evaluate(address, ask)
