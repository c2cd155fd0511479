"""`finemoe serve`: the OpenAI-compatible server."""

from __future__ import annotations

import argparse
from contextlib import closing

from finemoe.cli.flags import add_flags, read_flags
from finemoe.config import LoadConfig
from finemoe.errors import ConfigError
from finemoe.serving.config import ServeConfig
from finemoe.system import unmap_idle_code

_EXTRA = ("fastapi", "llguidance", "prometheus_client", "uvicorn")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    add_flags(parser, LoadConfig)
    add_flags(parser, ServeConfig)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    load_config, config = read_flags(arguments, LoadConfig), read_flags(arguments, ServeConfig)
    refuse_missing_extra()
    from finemoe.serving.middleware import log_to_stderr
    from finemoe.serving.server import address_of, read_api_key, reserve

    api_key = read_api_key(config)
    with closing(reserve(config)) as taken:  # before the model is loaded: that may take minutes
        from finemoe.serving.app import open_service
        from finemoe.serving.server import Server, ended_by_ctrl_c

        log_to_stderr()
        with open_service(load_config, config, api_key) as service:
            server, name = Server(service.app, service.app_state), service.app_state.served.name
            unmap_idle_code()
            arguments.interrupts.check()
            server.run(taken, lambda: print(f"{name} at {address_of(taken)}", flush=True))
    if ended_by_ctrl_c(server):
        raise KeyboardInterrupt
    return 0


def refuse_missing_extra() -> None:
    """Raises `ConfigError` where the libraries of the extra are not installed."""
    from importlib.util import find_spec

    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise ConfigError(f"serve: {', '.join(missing)} not installed; pip install 'finemoe[serve]'")
