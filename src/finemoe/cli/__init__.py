"""The command line: a table of subcommands. It holds no logic of its own, and imports a command when it runs."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from errno import EPIPE
from io import TextIOWrapper
from typing import Any

from finemoe.cli.flags import Parser
from finemoe.cli.terminal import Interrupts, LostOutputError, Output
from finemoe.errors import FinemoeError, FinemoeWarning
from finemoe.system import return_freed_memory, share_cores

COMMANDS = {
    "generate": "answer one prompt",
    "chat": "talk to a model in the terminal",
    "serve": "answer over HTTP, by OpenAI's API",
    "inspect": "show a model's layers, experts and bytes, from headers only",
    "plan": "say which budgets fit this machine, and how fast they would be",
    "record": "run prompts and record what the routers choose",
    "trace": "import, describe, show and measure recorded routing",
    "simulate": "replay recorded routing under a modelled link, policy by policy",
    "maps": "show, merge, prune and make files of expert maps, what policies learned",
    "bench": "measure against transformers, resident and with its own disk offload",
}
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0, 1 if a part of the work failed, 2 for bad input, 130 after Ctrl-C.
    """
    interrupts = Interrupts()  # first: imports take seconds
    given = list(sys.argv[1:] if argv is None else argv)
    _take_any_text()
    output = Output(sys.stdout)
    try:
        with redirect_stdout(output):
            try:
                with interrupts.told():
                    status = _run(given, interrupts)
            except SystemExit:  # help was shown
                output.flush()
                raise
            output.flush()  # what can't be written shows here, not at exit, where nobody can tell of it
    except FinemoeError as error:
        print(f"finemoe: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfinemoe: interrupted", file=sys.stderr)
        return INTERRUPTED
    except LostOutputError as error:
        output.give_up()
        if error.errno == EPIPE:  # the reader of our output went away: nothing is left to tell it
            return 0
        print(f"finemoe: error: standard output: {error.strerror}", file=sys.stderr)
        return 2
    return status


def _run(given: list[str], interrupts: Interrupts) -> int:
    parser = Parser(prog="finemoe", description="Mixture-of-Experts models from a device too small for them.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    chosen = next((word for word in given if not word.startswith("-")), None)
    _quieten()  # first: these libraries look when they are imported
    share_cores()
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == chosen:
            importlib.import_module(f"finemoe.cli.{name}").configure(command)
    arguments = parser.parse_args(given)
    if arguments.version:
        from finemoe import __version__

        print(f"finemoe {__version__}")
        return 0
    if arguments.command is None:
        parser.print_help()
        return 2
    return_freed_memory()
    arguments.interrupts = interrupts
    status: int = importlib.import_module(f"finemoe.cli.{arguments.command}").run(arguments)
    return status


def _take_any_text() -> None:
    """No character ends a command: what can't be shown is a `?`, input that is no text is refused where it is used."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def _quieten() -> None:
    """Libraries' notices are for their developers; errors come as our own one line."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not sys.stderr.isatty():  # a bar that moves is for eyes, not for a log
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("torchao", "torch.utils._pytree"):  # transformers imports torchao where it finds it, with complaints
        logging.getLogger(name).setLevel(logging.ERROR)
    if warnings.formatwarning is not _one_line:
        _FORMATS.append(warnings.formatwarning)
        warnings.formatwarning = _one_line


_FORMATS: list[Any] = []  # how warnings were shown before


def _one_line(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
    """Our own warnings are for users: without the line of code that they come from."""
    if issubclass(category, FinemoeWarning):
        return f"finemoe: warning: {message}\n"
    shown: str = _FORMATS[-1](message, category, *place, **more)
    return shown
