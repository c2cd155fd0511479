"""Exactness for every MoE architecture of the library for which a random file can be created."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.gguf.conftest import MakeFile
from tests.gguf.test_exactness import check

EXACT = (
    "afmoe", "arctic", "bailingmoe", "bailingmoe2", "cohere2moe", "dbrx", "deepseek", "deepseek2",
    "deepseek32", "dots1", "ernie4_5-moe", "exaone-moe", "gemma4", "glm-dsa", "glm4moe", "gpt-oss",
    "granitehybrid", "granitemoe", "grok", "grovemoe", "hunyuan-moe", "jamba", "kimi-linear", "laguna", "lfm2moe",
    "llama", "llama4", "mellum", "mimo2", "minimax-m2", "mistral3", "mistral4", "nemotron_h_moe", "olmoe", "phimoe",
    "qwen2moe", "qwen35moe", "qwen3moe", "qwen3next", "qwen3vlmoe", "smallthinker", "step35",
)  # fmt: skip


@pytest.mark.parametrize("arch", EXACT)
def test_output_is_that_of_the_library(random_gguf: MakeFile, loaded: Callable[..., Any], arch: str) -> None:
    check(random_gguf(arch), loaded, "minimum")
    check(random_gguf(arch), loaded, "50%")
