"""What all server benchmarks share: a JSON document that grows while they run, tables, and prompts."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from finemoe.bench.serve.config import ScenarioConfig
from finemoe.checkpoint import locate
from finemoe.config import LoadConfig
from finemoe.model import chosen_model, read_config
from finemoe.model.generation import load_tokenizer
from finemoe.trace.prompts import read_prompts


class Scenario(ABC):
    """One run of a benchmark.

    Args:
        config: its settings; they stand in the document under `settings`, with the model's folder.
        out: file to write the document to, again and again as it grows; `None` for none.
    """

    def __init__(self, config: ScenarioConfig, out: Path | None = None) -> None:
        self.folder = locate(chosen_model(config.model)).folder
        self._model = config
        self.document: dict[str, Any] = {"settings": asdict(config) | {"model": str(self.folder)}}
        self._out = out
        self._begin_s = time.perf_counter()

    @abstractmethod
    def run(self) -> None:
        """Measures. May be interrupted by `KeyboardInterrupt`: the document then holds what was measured."""

    @property
    @abstractmethod
    def measured(self) -> bool:
        """Whether there is anything for a table."""

    @abstractmethod
    def table(self) -> str:
        """The document as text."""

    @property
    def failed(self) -> bool:
        """Whether what was measured is a failure."""
        return False

    def load_config(self) -> LoadConfig:
        """How to load the model under test, with nothing learned beforehand."""
        given = self._model
        return LoadConfig(
            model=str(self.folder), expert_memory=given.expert_memory, policy=given.policy, map_store="none"
        )

    def server_flags(self, policy: str, map_store: Path | None = None) -> list[str]:
        """Flags of `finemoe serve` for the model under test; without a map store nothing is kept."""
        given = self._model
        flags = ["--model", str(self.folder), "--expert-memory", given.expert_memory, "--policy", policy]
        return [*flags, "--cache-bytes", given.cache_bytes, "--map-store", str(map_store or "none")]

    @property
    def elapsed_s(self) -> float:
        """Seconds since the benchmark was made."""
        return time.perf_counter() - self._begin_s

    def as_json(self) -> str:
        """The document; NaN becomes null."""
        return json.dumps(_finite(self.document), indent=1)

    def write(self) -> None:
        """Replaces the file by the document as it is now; a reader never sees a part of it."""
        if self._out is not None:
            partial = self._out.with_name(f".{self._out.name}.partial")
            partial.write_text(self.as_json() + "\n", encoding="utf-8")
            partial.replace(self._out)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def terminated_like_ctrl_c() -> Iterator[None]:
    """SIGTERM raises `KeyboardInterrupt` in the block, so that servers end and results are shown."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def prompt_ids(folder: Path, file: str | None, count: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """Token ids of prompts: those of a file, from the start again where it has fewer; or random ones.

    Args:
        folder: the model's.
        file: prompts, as for `finemoe record`; `None`: random tokens.
        count: prompts.
        tokens: length of random prompts; the others are cut to it.
        seed: of random prompts.
    """
    if file is None:
        vocabulary = read_config(folder).get_text_config().vocab_size
        drawn: list[list[int]] = np.random.default_rng(seed).integers(vocabulary, size=(count, tokens)).tolist()
        return drawn
    texts, tokenizer = read_prompts(Path(file)).texts, load_tokenizer(folder)
    return [tokenizer(texts[n % len(texts)])["input_ids"][:tokens] for n in range(count)]


def number(value: float | None, form: str, scale: float = 1.0) -> str:
    """A table's cell; `-` for `None` and NaN."""
    return "-" if value is None or math.isnan(value) else format(value * scale, form)


def log(line: str) -> None:
    """Shows progress on standard error."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
