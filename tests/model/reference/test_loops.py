"""The loop detector finds stuck answers and leaves good ones alone."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def loops() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "reference" / "loops.py"
    spec = importlib.util.spec_from_file_location("reference_loops", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_repeated_sentence_is_a_loop(loops: ModuleType) -> None:
    text = "The cat sat on the old mat and slept well. " * 3
    assert loops.is_loop(text, range(30))
    assert loops.is_loop("a b c d", [7, 8, 9] + [5] * 12)
    assert loops.is_loop("a b c d", [1, 2] + [7, 8, 9] * 4)


def test_an_answer_that_moves_on_is_none(loops: ModuleType) -> None:
    text = "First, pick a warm day. Second, take a map, a map of the hills. Third, walk and do not run."
    assert not loops.is_loop(text, range(30))
    assert not loops.is_loop("ha ha ha", [5, 5, 5])
    assert not loops.is_loop("", [])
