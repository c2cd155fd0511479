"""Settings: a bad value names its flag, and every setting has a help text."""

from __future__ import annotations

import pytest

from finemoe.config import GenerateConfig, LoadConfig
from finemoe.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"expert_memory": "none"}, "--expert-memory"),
        ({"reader_threads": 0}, "--reader-threads"),
        ({"reader_threads": 65}, "--reader-threads"),
        ({"dtype": "int8"}, "--dtype"),
        ({"io": "fast"}, "--io"),
    ],
)
def test_a_bad_setting_is_refused_by_the_name_of_its_flag(settings: dict[str, object], flag: str) -> None:
    with pytest.raises(ConfigError, match=f"^{flag}: "):
        LoadConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"max_new_tokens": -3}, "--max-new-tokens"),
        ({"temperature": -1}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"temperature": float("inf")}, "--temperature"),
        ({"top_p": 0.0, "temperature": 1}, "--top-p"),
        ({"top_p": 1.1, "temperature": 1}, "--top-p"),
        ({"top_p": float("nan"), "temperature": 1}, "--top-p"),
        ({"top_p": 0.5}, "--top-p"),
        ({"seed": -1}, "--seed"),
        ({"seed": 1 << 63}, "--seed"),
    ],
)
def test_a_bad_sampling_setting_is_refused_by_the_name_of_its_flag(settings: dict[str, object], flag: str) -> None:
    with pytest.raises(ConfigError, match=f"^{flag}: "):
        GenerateConfig(**settings)  # type: ignore[arg-type]


def test_every_setting_has_a_help_text() -> None:
    for config in (LoadConfig, GenerateConfig):
        assert all(field.metadata["help"] for field in config.__dataclass_fields__.values())
