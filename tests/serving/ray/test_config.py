"""Settings of the Ray application: all names, as text or YAML values, and nothing else; and its import paths."""

from __future__ import annotations

import importlib
from dataclasses import fields
from pathlib import Path

import pytest

import finemoe.serving.ray
from finemoe.config import LoadConfig
from finemoe.errors import ConfigError
from finemoe.serving.config import ServeConfig
from finemoe.serving.ray.config import RayAppSettings, RayConfig, parse_arguments

DOCUMENT = (Path(__file__).parents[3] / "docs" / "ray.md").read_text(encoding="utf-8")


def test_text_and_values_are_parsed_alike() -> None:
    text = {"model": "m", "replicas": "2", "gpus_per_replica": "0.5", "log_prompts": "true", "max_running": "4"}
    values = {"model": "m", "replicas": 2, "gpus_per_replica": 0.5, "log_prompts": True, "max_running": 4}
    assert parse_arguments(text) == parse_arguments(values)
    read = parse_arguments(text | {"expert_memory": 2_000_000})
    assert (read.ray.replicas, read.load.expert_memory, read.serve.max_running) == (2, "2000000", 4)
    assert parse_arguments({}) == RayAppSettings()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"replica": 2}, "replica: is unknown; is it replicas?"),
        ({"--expert-memory": "all"}, "--expert-memory: is unknown; is it expert_memory?"),
        ({"zzz": 2}, "zzz: is unknown; docs/ray.md lists what there is"),
        ({"port": 80}, "port: Ray's proxy listens; set http_options in the Ray Serve config"),
        ({"replicas": "two"}, "replicas: can't use 'two' ("),
        ({"replicas": 0}, "replicas: 0 is not at least 1"),
        ({"gpus_per_replica": "nan"}, "gpus_per_replica: nan is not between"),
        ({"health_check_period_s": 0}, "health_check_period_s: 0.0 is not above 0"),
        ({"memory_per_replica": "much"}, "memory_per_replica: can't read 'much'"),
        ({"io": "fast"}, "io: can't use 'fast' ("),
        ({"policy": None}, "policy: can't use None ("),
        ({"max_running": 0}, "--max-running: 0 is not at least 1"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(given)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_names_are_unique_and_documented() -> None:
    names = [each.name for config in (RayConfig, LoadConfig, ServeConfig) for each in fields(config)]
    assert len(names) == len(set(names))
    for each in fields(RayConfig):
        assert f"`{each.name}`" in DOCUMENT


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "ray" else object())
    with pytest.raises(ConfigError, match=r"^finemoe\.serving\.ray: ray not installed; pip install 'finemoe\[ray\]'$"):
        finemoe.serving.ray.app({})


def test_the_earlier_import_path_works() -> None:
    """Existing Ray Serve configs name `finemoe.ray:app`."""
    assert importlib.import_module("finemoe.ray").app is finemoe.serving.ray.app
