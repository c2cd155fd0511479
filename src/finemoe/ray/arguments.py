"""What a user gives to the application: names and values, from a command line or a YAML file, as dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from finemoe.config import LoadConfig
from finemoe.errors import ConfigError
from finemoe.ray.config import RayConfig
from finemoe.serving.config import ServeConfig

C = TypeVar("C")
_RAYS = frozenset({"host", "port"})  # Ray's proxy listens, not the server


@dataclass(frozen=True)
class Arguments:
    """All settings of an application."""

    ray: RayConfig = field(default_factory=RayConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)


def read_arguments(given: Mapping[str, Any]) -> Arguments:
    """The settings out of names and values; text becomes numbers and truth values where these are expected.

    Raises:
        ConfigError: an unknown name, or a value that can't be used; the message names it.
    """
    configs: tuple[type, ...] = (RayConfig, LoadConfig, ServeConfig)
    known = {each.name for config in configs for each in fields(config)} - _RAYS
    for name in given:
        if name in _RAYS:
            raise ConfigError(f"{name}: Ray's proxy listens; set http_options in the Ray Serve config")
        if name not in known:
            near = get_close_matches(str(name).lstrip("-").replace("-", "_"), known, n=1)
            hint = f"; is it {near[0]}?" if near else "; docs/ray.md lists what there is"
            raise ConfigError(f"{name}: is unknown{hint}")
    return Arguments(_read(given, RayConfig), _read(given, LoadConfig), _read(given, ServeConfig))


def _read(given: Mapping[str, Any], config: type[C]) -> C:
    hints = get_type_hints(config)
    names = [each.name for each in fields(config) if each.name in given]  # type: ignore[arg-type]
    return config(**{name: _converted(name, given[name], hints[name]) for name in names})


def _converted(name: str, value: Any, hint: Any) -> Any:
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hint, config=ConfigDict(coerce_numbers_to_str=True))
        return adapter.validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"{name}: can't use {value!r} ({error.errors()[0]['msg']})") from error
