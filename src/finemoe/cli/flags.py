"""Command-line flags out of config dataclasses: names, types, defaults and help stand once, in the dataclass."""

from __future__ import annotations

import argparse
import sys
from dataclasses import MISSING, fields
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

C = TypeVar("C")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and exits with 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"{self.prog}: error: {message} (see {self.prog} --help)\n")
        raise SystemExit(2)


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """One flag per field of a dataclass: `expert_memory` becomes `--expert-memory`."""
    hints = get_type_hints(config)
    group = parser.add_argument_group(f"{config.__name__.removesuffix('Config').lower()} options")
    for field in fields(config):
        flag = "--" + field.name.replace("_", "-")
        text = field.metadata.get("help", "")
        hint = hints[field.name]
        default = field.default if field.default is not MISSING else None
        if hint is bool:
            group.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text.replace("%", "%%"))
            continue
        options = [argument for argument in get_args(hint) if argument is not NoneType]
        choices = list(get_args(hint)) if get_origin(hint) is Literal else None
        kind = str if choices else options[0] if options else hint
        help_text = text if default is None else f"{text} (default: {default!s})"
        metavar = None if choices else field.name.upper()
        group.add_argument(
            flag,
            type=kind,
            choices=choices,
            metavar=metavar,
            default=argparse.SUPPRESS,
            help=help_text.replace("%", "%%"),
        )


def read_flags(arguments: argparse.Namespace, config: type[C]) -> C:
    """The dataclass out of parsed flags. What was not given keeps its default.

    Raises:
        ConfigError: a value that the dataclass refuses.
    """
    given = vars(arguments)
    names = [field.name for field in fields(config) if field.name in given]  # type: ignore[arg-type]
    return config(**{name: given[name] for name in names})
