"""A conversation as the text that a model was trained on: the file's own template, in transformers' sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finemoe.errors import CheckpointError


def render(template: str, turns: Sequence[dict[str, str]], *, bos: str, eos: str, name: str) -> str:
    """The text of a conversation, up to where the model's answer begins.

    Args:
        template: Jinja, as the file has it.
        turns: with `role` and `content`.
        bos: name of the token that begins a text.
        eos: name of the token that ends one.
        name: of the file, for messages.

    Raises:
        CheckpointError: the template fails, or refuses the conversation.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered: Any = render_jinja_template(
            [list(turns)], chat_template=template, add_generation_prompt=True, bos_token=bos, eos_token=eos
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{name}: its chat template fails ({reason}); mend it, or use finemoe generate --raw"
        ) from error
    text: str = rendered[0][0]  # of one conversation, and before what was generated
    return text
