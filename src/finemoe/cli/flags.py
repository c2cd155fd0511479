"""Command-line flags generated from config dataclasses: names, types, defaults and help stand once, in the dataclass.

`--help` lists the settings that people set; a field with `metadata={"advanced": True}` is listed by `--help-all` only.
Both kinds always parse.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

C = TypeVar("C")


class Parser(argparse.ArgumentParser):
    """Reports an error in one line with exit status 2, and hides advanced flags from `--help`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)
        self._advanced: list[argparse.Action] = []

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"{self.prog}: error: {message} (see {self.prog} --help)\n")
        raise SystemExit(2)

    def hide(self, actions: Sequence[argparse.Action]) -> None:
        """Lists these actions under `--help-all` only. The first call adds that flag."""
        if actions and not self._advanced:
            self.add_argument("--help-all", action=_HelpAll, nargs=0, help="show all settings and exit")
        self._advanced.extend(actions)

    def format_help(self) -> str:
        """The help text without advanced flags."""
        texts = [action.help for action in self._advanced]
        for action in self._advanced:
            action.help = argparse.SUPPRESS
        try:
            shown = super().format_help()
        finally:
            for action, text in zip(self._advanced, texts, strict=True):
                action.help = text
        return shown

    def format_full_help(self) -> str:
        """The help text with every flag."""
        return super().format_help()


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        assert isinstance(parser, Parser)
        print(parser.format_full_help(), end="")
        parser.exit()


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """Adds one flag per field of a dataclass: `expert_memory` becomes `--expert-memory`."""
    hints = get_type_hints(config)
    title = config.__name__.removesuffix("Config").lower()
    groups = {
        False: parser.add_argument_group(f"{title} options"),
        True: parser.add_argument_group(f"{title} options, advanced"),
    }
    advanced: list[argparse.Action] = []
    for field in fields(config):
        hidden = bool(field.metadata.get("advanced"))
        action = _add_flag(groups[hidden], field.name, hints[field.name], field.default, field.metadata.get("help", ""))
        if hidden:
            advanced.append(action)
    if advanced:
        assert isinstance(parser, Parser)
        parser.hide(advanced)


def _add_flag(group: Any, name: str, hint: Any, default: Any, text: str) -> argparse.Action:
    flag = "--" + name.replace("_", "-")
    if hint is bool:
        switch: argparse.Action = group.add_argument(
            flag, action="store_true", default=argparse.SUPPRESS, help=text.replace("%", "%%")
        )
        return switch
    options = [argument for argument in get_args(hint) if argument is not NoneType]
    choices = list(get_args(hint)) if get_origin(hint) is Literal else None
    if default is not None and default is not MISSING:
        text = f"{text} (default: {default!s})"
    action: argparse.Action = group.add_argument(
        flag,
        type=str if choices else options[0] if options else hint,
        choices=choices,
        metavar=None if choices else name.upper(),
        default=argparse.SUPPRESS,
        help=text.replace("%", "%%"),
    )
    return action


def read_flags(arguments: argparse.Namespace, config: type[C]) -> C:
    """Builds the dataclass from parsed flags; fields not given keep their defaults.

    Raises:
        ConfigError: a value that the dataclass refuses.
    """
    given = vars(arguments)
    names = [field.name for field in fields(config) if field.name in given]  # type: ignore[arg-type]
    return config(**{name: given[name] for name in names})
