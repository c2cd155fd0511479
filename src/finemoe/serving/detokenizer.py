"""Incremental detokenization of one choice: tokens in, pieces of text out, ended by stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from finemoe.serving.scheduler.job import Finished, Token

Decode = Callable[[Sequence[int]], str]
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what an incomplete UTF-8 sequence decodes to


@dataclass(frozen=True)
class TokenText:
    """A token and the offset of its text in the answer, in characters."""

    token: Token
    start: int


@dataclass(frozen=True)
class TextPiece:
    """The next text of a choice and the tokens whose text begins in it. Only the last piece has a `finish` reason."""

    choice: int
    text: str
    tokens: tuple[TokenText, ...] = ()
    finish: Literal["stop", "length"] | None = None


class Detokenizer:
    """Decodes an answer token by token.

    Withholds incomplete UTF-8 characters. The pieces and `rest` together equal `decode` of all tokens, where that is
    valid UTF-8.

    Args:
        decode: token ids to text, without special tokens.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._context: list[int] = []  # the tokens emitted last; a leading space depends on them
        self._pending: list[int] = []

    def step(self, token: int) -> str:
        """The text that `token` completes; often empty."""
        self._pending.append(token)
        piece = self._decode_pending()
        if not piece or piece.endswith(_INCOMPLETE):
            return ""
        self._context, self._pending = self._pending, []
        return piece

    def rest(self) -> str:
        """The withheld text, complete or not; call it after the last token."""
        piece, self._pending = self._decode_pending(), []
        return piece

    def _decode_pending(self) -> str:
        context = self._decode(self._context) if self._context else ""
        both = self._decode([*self._context, *self._pending])
        return both[len(context) :] if both.startswith(context) else self._decode(self._pending)


class StopStrings:
    """Ends a text before the first of some strings. Withholds text that may be the beginning of one.

    Args:
        strings: stop strings, none of them empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._longest = max(map(len, strings), default=0)
        self._pending = ""

    def feed(self, piece: str) -> tuple[str, bool]:
        """The text that can be emitted now, and whether a stop string ended it."""
        text = self._pending + piece
        found = [at for string in self._strings if (at := text.find(string)) >= 0]
        if found:
            self._pending = ""
            return text[: min(found)], True
        first = max(0, len(text) - self._longest + 1) if self._longest else len(text)
        cut = next(
            (at for at in range(first, len(text)) if any(s.startswith(text[at:]) for s in self._strings)), len(text)
        )
        self._pending = text[cut:]
        return text[:cut], False

    def rest(self) -> str:
        """The withheld text; call it at the end of the text."""
        pending, self._pending = self._pending, ""
        return pending


class ChoiceOutput:
    """The output of one choice: detokenizes, applies stop strings, counts tokens.

    Args:
        choice: its index in the response.
        detokenizer: used by this choice only.
        stops: used by this choice only.
        stop_ids: tokens that end the answer; counted, but without text.
    """

    def __init__(
        self, choice: int, detokenizer: Detokenizer, stops: StopStrings, stop_ids: frozenset[int] = frozenset()
    ) -> None:
        self.choice = choice
        self.num_tokens = 0
        self.text = ""  # emitted so far
        self.ended = False
        self._detokenizer = detokenizer
        self._stops = stops
        self._stop_ids = stop_ids
        self._decoded = 0  # characters decoded, emitted or withheld
        self._pending: list[TokenText] = []  # tokens not emitted yet

    def append(self, token: Token) -> TextPiece | None:
        """The piece of text that a token completes, if any. A stop string in it ends the answer."""
        if self.ended:
            return None
        self.num_tokens += 1
        if token.id in self._stop_ids:
            return None
        self._pending.append(TokenText(token, self._decoded))
        piece = self._detokenizer.step(token.id)
        self._decoded += len(piece)
        text, self.ended = self._stops.feed(piece)
        if not text and not self.ended:
            return None
        return self._piece(text, "stop" if self.ended else None)

    def finish(self, finished: Finished) -> TextPiece | None:
        """The last piece, with all withheld text; `None` if a stop string already ended the answer."""
        if self.ended:
            return None
        self.ended = True
        rest = self._detokenizer.rest()
        self._decoded += len(rest)
        text, stopped = self._stops.feed(rest)
        if not stopped:
            text += self._stops.rest()
        return self._piece(text, "stop" if stopped or finished.reason == "stop" else "length", all_tokens=not stopped)

    def _piece(self, text: str, finish: Literal["stop", "length"] | None, *, all_tokens: bool = False) -> TextPiece:
        self.text += text
        count = len(self._pending) if all_tokens else sum(each.start < len(self.text) for each in self._pending)
        tokens, self._pending = self._pending[:count], self._pending[count:]
        return TextPiece(self.choice, text, tuple(tokens), finish)
