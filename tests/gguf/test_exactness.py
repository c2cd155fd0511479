"""Tokens and logits are those of the library with everything resident, bit for bit, whatever the budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.gguf.conftest import MakeFile

Load = Callable[..., Any]
BUDGETS = ("minimum", "25%", "50%", "all")
ANSWER_TOKENS = 12


def least(path: Path) -> str:
    """The smallest budget, as its message names it."""
    from finemoe.errors import BudgetError
    from tests.gguf.run import load

    with pytest.raises(BudgetError, match="at least") as error:
        load(path, "1")
    return str(error.value).partition("one token: ")[2].partition(" bytes")[0]


def check(path: Path, loaded: Load, budget: str, **options: Any) -> None:
    from tests.gguf.run import LONG, SHORT, Plain, answer

    model = loaded(path, least(path) if budget == "minimum" else budget, **options)
    plain = Plain(path)
    try:
        for prompt in (SHORT, LONG, LONG[:1]):
            tokens, logits = answer(model, prompt, ANSWER_TOKENS)
            micro_batch = model.parts.runner.options.micro_batch
            cache_type = model.parts.runner.options.cache_type
            expected, their_logits = plain.answer(prompt, len(tokens), micro_batch, cache_type)
            assert tokens == expected
            assert np.array_equal(np.array(logits), np.array(their_logits))
            model.parts.engine.check_integrity()
            model.parts.runner.forget()
    finally:
        plain.close()


@pytest.mark.parametrize("budget", BUDGETS)
def test_output_does_not_depend_on_the_budget(random_gguf: MakeFile, loaded: Load, budget: str) -> None:
    check(random_gguf(), loaded, budget)
