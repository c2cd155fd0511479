"""The server as a Ray Serve application: replicas that share learned maps. See docs/ray.md.

`serve run finemoe.serving.ray:app model=./my-model policy=finemoe replicas=2` starts two replicas.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finemoe.errors import ConfigError


def app(arguments: Mapping[str, Any]) -> Any:
    """Builds the application, for `serve run`, a Ray Serve config file, or `ray.serve.run`.

    Args:
        arguments: values by the names of the fields of `RayConfig`, `LoadConfig` and `ServeConfig`; text is converted.

    Returns:
        A `ray.serve.Application`.

    Raises:
        ConfigError: an argument is unknown or invalid, or Ray is not installed.
    """
    refuse_missing_extra()
    from finemoe.serving.ray.application import build

    return build(arguments)


def refuse_missing_extra() -> None:
    """Raises `ConfigError` if a library of the extra `ray` is not installed."""
    from importlib.util import find_spec

    missing = [name for name in ("ray", "fastapi", "llguidance", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"finemoe.serving.ray: {', '.join(missing)} not installed; pip install 'finemoe[ray]'")
