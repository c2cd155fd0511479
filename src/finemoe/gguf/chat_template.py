"""Applies the file's chat template to a conversation, in Jinja's sandbox.

The sandbox is configured as in transformers, so that the same templates work; transformers itself is not imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finemoe.errors import CheckpointError


class _Generation(Extension):
    """Accepts `{% generation %}`, which marks the model's turns in training data and does not change the text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own type

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


@cache
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    helpers: dict[str, Callable[..., Any]] = {"raise_exception": _refuse, "strftime_now": _now}
    environment.globals |= helpers
    return environment.from_string(template)


def render(template: str, turns: Sequence[dict[str, str]], *, bos: str, eos: str, name: str) -> str:
    """Render a conversation as prompt text that ends where the model's answer begins.

    Args:
        template: Jinja source from the file.
        turns: messages with `role` and `content`.
        bos: text of the begin-of-sequence token.
        eos: text of the end-of-sequence token.
        name: the file's name, for error messages.

    Raises:
        CheckpointError: the template fails or rejects the conversation.
    """
    variables = {"messages": list(turns), "tools": None, "documents": None, "add_generation_prompt": True}
    try:
        return _compiled(template).render(**variables, bos_token=bos, eos_token=eos)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{name}: its chat template fails ({reason}); fix it, or use finemoe generate --raw"
        ) from error
