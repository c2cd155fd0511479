"""`finemoe.load`'s arguments are the settings of `LoadConfig`."""

from __future__ import annotations

from dataclasses import fields
from inspect import getdoc, signature
from typing import get_type_hints

import pytest

import finemoe
from finemoe.config import LoadConfig
from finemoe.model.load import LoadSettings


def test_every_setting_is_an_argument_with_its_one_default() -> None:
    parameters = signature(finemoe.load).parameters
    assert {name: each.default for name, each in parameters.items()} == {
        each.name: each.default for each in fields(LoadConfig)
    }
    assert set(parameters) == {"model", *get_type_hints(LoadSettings)}
    assert all(f"{name}: " in str(getdoc(finemoe.load)) for name in parameters)


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(TypeError, match=r"^load\(\) got an unexpected keyword argument 'expert_mem'$"):
        finemoe.load("/no/where", expert_mem="1GiB")  # type: ignore[call-arg]
