"""Runs models within a budget, and the plain library with everything resident for comparison."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finemoe.checkpoint import ExpertIndex
from finemoe.config import LoadConfig
from finemoe.engine.engine import Engine
from finemoe.engine.engine_factory import make_engine
from finemoe.gguf.binding import load_library
from finemoe.gguf.context import Context, ContextOptions
from finemoe.gguf.expert_memory import ExpertMemory
from finemoe.gguf.file import open_gguf
from finemoe.gguf.load import GgufOptions, load_parts, observe
from finemoe.gguf.model import GgufModel
from finemoe.jit import interpreted
from finemoe.policy import policy_class
from finemoe.store.reader_threads import ReaderThreads

Floats = npt.NDArray[np.float32]
VOCABULARY = 300
SHORT = (5, 17, 250)
LONG = tuple(np.random.default_rng(1).integers(0, VOCABULARY, 75).tolist())


def load(path: Path, expert_memory: str = "25%", policy: str = "lru", **options: Any) -> GgufModel:
    def make(memory: ExpertMemory, transfer: ReaderThreads, expert_index: ExpertIndex) -> Engine:
        config = LoadConfig(policy=policy, map_store="none")
        options = {"jit": interpreted} if policy_class(policy).compiles else {}
        return make_engine(config, options, None, memory, transfer, expert_index)

    parts = load_parts(open_gguf(path), GgufOptions(expert_memory, threads=1, **options), make)
    seen = parts.engine.cache_manager.policy.needs | parts.engine.cache_manager.policy.uses
    if seen:
        observe(parts, 1)
    return GgufModel(parts)


def answer(model: GgufModel, prompt: Sequence[int], count: int) -> tuple[list[int], list[Floats]]:
    """Greedy tokens, with the logits of each."""
    tokens, logits = [], []
    for token in model.generate(prompt, count):
        tokens.append(token)
        logits.append(model.parts.runner.logits().copy())
    return tokens, logits


class Plain:
    """The plain library: its own mapping, no callback."""

    def __init__(self, path: Path) -> None:
        self._library = load_library()
        api = self._library.api
        params = api.llama_model_default_params()
        params.n_gpu_layers, params.load_mode, params.use_extra_bufts = 0, 1, False
        self._model = api.llama_model_load_from_file(os.fsencode(path), params)
        assert self._model

    def answer(
        self, prompt: Sequence[int], count: int, micro_batch: int, cache_type: str = "f16"
    ) -> tuple[list[int], list[Floats]]:
        """Like `answer`, with micro-batches of this size."""
        context = Context(self._library, self._model, 256, ContextOptions(micro_batch, 1, cache_type))
        try:
            tokens: list[int] = []
            logits: list[Floats] = []
            size = context.micro_batch
            for start in range(0, len(prompt), size):
                piece = prompt[start : start + size]
                assert not context.run(piece, start, logits=start + size >= len(prompt))
            for position in range(len(prompt), len(prompt) + count):
                logits.append(context.logits().copy())
                tokens.append(int(logits[-1].argmax()))
                assert not context.run(tokens[-1:], position, logits=True)
            return tokens, logits
        finally:
            context.close()

    def close(self) -> None:
        self._library.api.llama_model_free(self._model)
