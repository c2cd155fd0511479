"""The command line: a table of subcommands, each imported when it runs."""

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
from finemoe.system import limit_openmp_spin, return_freed_memory

COMMANDS = {
    "generate": "answer one prompt",
    "chat": "talk to a model in the terminal",
    "serve": "serve a model over HTTP with OpenAI's API",
    "inspect": "show a model's layers, experts and bytes, from headers only",
    "plan": "show which budgets fit this machine, and the speed to expect",
    "record": "run prompts and record the routing to a trace",
    "trace": "import, describe, show and measure recorded routing",
    "simulate": "replay recorded routing on a modelled machine, policy by policy",
    "maps": "show, merge, prune and make files of learned expert maps",
    "bench": "measure policies and budgets, beside transformers resident and with its disk offload",
}
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0, 1 if a part of the work failed, 2 for bad input, 130 after Ctrl-C.
    """
    interrupts = Interrupts()  # first: imports take seconds
    given = list(sys.argv[1:] if argv is None else argv)
    _tolerate_encodings()
    output = Output(sys.stdout)
    try:
        with redirect_stdout(output):
            try:
                with interrupts.translated():
                    status = _run(given, interrupts)
            except SystemExit:  # help was shown
                output.flush()
                raise
            output.flush()  # write errors surface here, not at interpreter exit
    except FinemoeError as error:
        print(f"finemoe: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfinemoe: interrupted", file=sys.stderr)
        return INTERRUPTED
    except LostOutputError as error:
        output.discard()
        if error.errno == EPIPE:  # the reader of our output is gone
            return 0
        print(f"finemoe: error: standard output: {error.strerror}", file=sys.stderr)
        return 2
    return status


def _run(given: list[str], interrupts: Interrupts) -> int:
    parser = Parser(prog="finemoe", description="Runs Mixture-of-Experts models larger than memory.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    chosen = next((word for word in given if not word.startswith("-")), None)
    _silence_libraries()  # before they are imported
    limit_openmp_spin()
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


def _tolerate_encodings() -> None:
    """Replaces characters that the terminal can't show by `?`; undecodable input is refused where it is used."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def _silence_libraries() -> None:
    """Silences libraries' notices and progress bars; errors are reported as one line of our own."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not sys.stderr.isatty():  # no progress bars in logs
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("torchao", "torch.utils._pytree"):  # transformers imports torchao if installed, which warns
        logging.getLogger(name).setLevel(logging.ERROR)
    if warnings.formatwarning is not _one_line:
        _FORMATS.append(warnings.formatwarning)
        warnings.formatwarning = _one_line


_FORMATS: list[Any] = []  # the previous `warnings.formatwarning`


def _one_line(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
    """Shows our own warnings in one line, without the source location."""
    if issubclass(category, FinemoeWarning):
        return f"finemoe: warning: {message}\n"
    shown: str = _FORMATS[-1](message, category, *place, **more)
    return shown
