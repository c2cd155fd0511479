"""Settings of the server: parsing, and errors in one line that name the flag."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.errors import ConfigError
from finemoe.serving.config import ServeConfig


def test_the_cache_size_is_parsed() -> None:
    assert ServeConfig(cache_bytes="2GiB").key_value_bytes == 2 << 30
    assert ServeConfig(cache_bytes="800").key_value_bytes == 800


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cache_bytes": "25%"}, r"^--cache-bytes: can't read '25%'; give bytes \(2GiB, 800MB\)$"),
        ({"cache_bytes": "0"}, r"^--cache-bytes: '0' is zero; give bytes \(2GiB, 800MB\)$"),
        ({"max_batch_tokens": 0}, r"^--max-batch-tokens: 0 is not at least 1$"),
        ({"max_running": 0}, r"^--max-running: 0 is not at least 1$"),
        ({"max_running": 9, "max_batch_tokens": 8}, r"^--max-running: 9 answers do not fit .* --max-batch-tokens 8$"),
    ],
)
def test_invalid_values_are_refused_in_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ServeConfig(**given)
    assert "\n" not in str(caught.value)


@given(st.text())
def test_any_text_is_a_size_or_an_error(text: str) -> None:
    with suppress(ConfigError):
        assert ServeConfig(cache_bytes=text).key_value_bytes > 0
