"""Tokens and logits are bit-identical to those of the library with everything resident, for every budget."""

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
    """The smallest budget in bytes, from the error message."""
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


def mixed(name: str, _width: int) -> Any:
    """A different type for each layer, as in mixed-precision files."""
    from gguf import GGMLQuantizationType as Type

    layer = int(name.split(".")[1])
    return (Type.Q8_0, Type.Q4_K, Type.F16, Type.MXFP4)[layer % 4 if "down" not in name else (layer + 1) % 4]


@pytest.mark.parametrize("budget", BUDGETS)
def test_types_may_differ_between_layers_and_tensors(random_gguf: MakeFile, loaded: Load, budget: str) -> None:
    overrides = {"expert_feed_forward_length": 512}  # Q4_K has blocks of 256
    check(random_gguf(key="mixed", stored_as=mixed, overrides=overrides), loaded, budget)


@pytest.mark.parametrize("kind", ["F16", "Q4_K", "MXFP4", "Q6_K", "IQ4_XS"])
def test_output_is_exact_in_every_type(random_gguf: MakeFile, loaded: Load, kind: str) -> None:
    from gguf import GGMLQuantizationType as Type

    overrides = {"expert_feed_forward_length": 512}
    path = random_gguf(key=kind, stored_as=lambda _name, _width: Type[kind], overrides=overrides)
    check(path, loaded, "25%")


@pytest.mark.parametrize("budget", ["minimum", "50%"])
def test_a_split_set_is_one_model(random_gguf: MakeFile, loaded: Load, budget: str) -> None:
    path = random_gguf(key="split", split_bytes=4_000_000)
    assert len(list(path.parent.glob("*.gguf"))) > 2
    check(path, loaded, budget)


def test_keys_and_values_in_8_bits_are_exact_too(random_gguf: MakeFile, loaded: Load) -> None:
    check(random_gguf(), loaded, "25%", cache_type="q8_0")


@pytest.mark.parametrize("budget", ["minimum", "25%"])
@pytest.mark.parametrize("policy", ["lfu", "mixtral-offloading", "finemoe"])
def test_output_does_not_depend_on_the_policy(random_gguf: MakeFile, loaded: Load, policy: str, budget: str) -> None:
    check(random_gguf(), loaded, budget, policy=policy)


def test_output_is_exact_where_the_librarys_calls_cannot_be_redirected(
    random_gguf: MakeFile, loaded: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finemoe.gguf.relocation.find_entries", lambda path, name: [])
    check(random_gguf(), loaded, "25%")
    check(random_gguf(key="split", split_bytes=4_000_000), loaded, "25%")
