"""The loop detector of tools/reference_model finds answers that repeat themselves, and no others."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def loops() -> ModuleType:
    path = Path(__file__).parents[3] / "tools" / "reference_model" / "loops.py"
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


def test_an_answer_without_repetition_is_no_loop(loops: ModuleType) -> None:
    text = "First, pick a warm day. Second, take a map, a map of the hills. Third, walk and do not run."
    assert not loops.is_loop(text, range(30))
    assert not loops.is_loop("ha ha ha", [5, 5, 5])
    assert not loops.is_loop("", [])
