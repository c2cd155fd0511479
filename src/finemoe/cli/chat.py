"""`finemoe chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from finemoe.cli.flags import add_flags, read_flags
from finemoe.cli.generate import summary, warn_if_lossy
from finemoe.config import GenerateConfig, LoadConfig, PrefillConfig, refuse_undecodable
from finemoe.errors import ConfigError
from finemoe.system import unmap_idle_code

if TYPE_CHECKING:
    from finemoe.model.reply import Reply

_HELP = "/reset clears the conversation, /stats shows the last answer's speed and hits, /exit or Ctrl-D leaves"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    parser.add_argument("--system", default=None, help="instructions that precede the conversation")
    parser.add_argument("--json", action="store_true", help="print each answer as one line of JSON, and nothing else")
    add_flags(parser, LoadConfig)
    add_flags(parser, GenerateConfig)
    add_flags(parser, PrefillConfig)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    load_config, generate_config = read_flags(arguments, LoadConfig), read_flags(arguments, GenerateConfig)
    chunk = read_flags(arguments, PrefillConfig).prefill_chunk
    with suppress(ImportError):  # line editing, where the platform has it
        import readline  # noqa: F401
    from finemoe.model import load_config as load
    from finemoe.model.backend import open_session

    def show(text: str) -> None:
        arguments.interrupts.check()
        if not arguments.json:
            print(text, end="", flush=True)

    refuse_undecodable(arguments.system or "", "--system")
    opening = [{"role": "system", "content": arguments.system}] if arguments.system else []
    with load(load_config) as model:
        session = open_session(model)
        unmap_idle_code()
        turns, reply = list(opening), None
        print(_HELP, file=sys.stderr)
        warn_if_lossy(load_config)
        while (line := _ask()) is not None:
            if line == "/exit":
                break
            if line == "/reset":
                turns = list(opening)
            elif line == "/stats":
                print(summary(reply) if reply else "no answer yet", file=sys.stderr)
            elif line.startswith("/"):
                print(f"no command {line}; {_HELP}", file=sys.stderr)
            elif line:
                asked = [*turns, {"role": "user", "content": line}]
                answered = _reply(partial(session.reply, asked, generate_config, show, prefill_chunk=chunk), arguments)
                if answered is not None:
                    reply = answered
                    print(json.dumps(reply.as_dict()) if arguments.json else "", flush=True)
                    turns = [*asked, {"role": "assistant", "content": reply.text}]
    return 0


def _reply(ask: Callable[[], Reply], arguments: argparse.Namespace) -> Reply | None:
    """The answer, or `None` after a line on standard error if this turn failed or was interrupted."""
    try:
        return ask()
    except KeyboardInterrupt:  # interrupts the answer; the conversation goes on
        arguments.interrupts.clear()
        print("\n(interrupted; this turn is dropped)", file=sys.stderr)
    except ConfigError as error:  # this turn is too long, or not text
        print(f"finemoe: error: {error}; this turn is dropped", file=sys.stderr)
    return None


def _ask() -> str | None:
    """The user's next line, or `None` at the end of the input."""
    try:
        if sys.stdin.isatty():
            return input("> ").strip()
        line = sys.stdin.readline()
        return line.strip() if line else None
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None
