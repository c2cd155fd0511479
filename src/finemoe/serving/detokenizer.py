"""One choice of a response: its tokens in, pieces of text out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from finemoe.serving.scheduler.job import Finished, Token

Decode = Callable[[Sequence[int]], str]
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Text of an answer, token by token.

    Holds back what may be half a character. The pieces, `rest` included, make up `decode` of all tokens, as far as
    these are valid UTF-8.

    Args:
        decode: token ids to text, special tokens left out.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._said: list[int] = []  # the last tokens that were handed out: a leading space depends on them
        self._held: list[int] = []

    def step(self, token: int) -> str:
        """What can be read now that was not before; often nothing."""
        self._held.append(token)
        piece = self._readable()
        if not piece or piece.endswith(_BROKEN):
            return ""
        self._said, self._held = self._held, []
        return piece

    def rest(self) -> str:
        """What was held back, however it reads: no token follows."""
        piece, self._held = self._readable(), []
        return piece

    def _readable(self) -> str:
        before = self._decode(self._said) if self._said else ""
        both = self._decode([*self._said, *self._held])
        return both[len(before) :] if both.startswith(before) else self._decode(self._held)


class StopStrings:
    """Ends a text at the first of some strings. Holds back whatever may be the beginning of one.

    Args:
        strings: none of them empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._longest = max(map(len, strings), default=0)
        self._held = ""

    def feed(self, piece: str) -> tuple[str, bool]:
        """Text that may be shown now, and whether one of the strings came: the text ends just before it."""
        text = self._held + piece
        found = [at for string in self._strings if (at := text.find(string)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        first = max(0, len(text) - self._longest + 1) if self._longest else len(text)
        cut = next(
            (at for at in range(first, len(text)) if any(s.startswith(text[at:]) for s in self._strings)), len(text)
        )
        self._held = text[cut:]
        return text[:cut], False

    def rest(self) -> str:
        """What was held back: no text follows."""
        held, self._held = self._held, ""
        return held


@dataclass(frozen=True)
class TokenText:
    """A token, and where its text begins, in characters of the answer."""

    token: Token
    start: int


@dataclass(frozen=True)
class TextPiece:
    """The next part of a choice: text, and the tokens whose text begins in it. `finish` is on the last one alone."""

    choice: int
    text: str
    said: tuple[TokenText, ...] = ()
    finish: Literal["stop", "length"] | None = None


class Answer:
    """What has come of one choice.

    Args:
        choice: its index in the response.
        detokenizer: of its own.
        stops: of its own.
        stop_ids: tokens that end the answer; they are counted, not shown.
    """

    def __init__(
        self, choice: int, detokenizer: Detokenizer, stops: StopStrings, stop_ids: frozenset[int] = frozenset()
    ) -> None:
        self.choice = choice
        self.tokens = 0
        self.text = ""  # that was shown
        self.ended = False
        self._detokenizer = detokenizer
        self._stops = stops
        self._stop_ids = stop_ids
        self._read = 0  # characters that were read, shown or held back
        self._said: list[TokenText] = []  # not handed out yet

    def hear(self, token: Token) -> TextPiece | None:
        """The piece that a token completes. A stop string in it ends the answer."""
        if self.ended:
            return None
        self.tokens += 1
        if token.id in self._stop_ids:
            return None
        self._said.append(TokenText(token, self._read))
        piece = self._detokenizer.step(token.id)
        self._read += len(piece)
        text, self.ended = self._stops.feed(piece)
        if not text and not self.ended:
            return None
        return self._piece(text, "stop" if self.ended else None)

    def end(self, finished: Finished) -> TextPiece | None:
        """The last piece, with what was held back; `None` if a stop string has ended the answer before."""
        if self.ended:
            return None
        self.ended = True
        rest = self._detokenizer.rest()
        self._read += len(rest)
        text, stopped = self._stops.feed(rest)
        if not stopped:
            text += self._stops.rest()
        return self._piece(text, "stop" if stopped or finished.reason == "stop" else "length", all_said=not stopped)

    def _piece(self, text: str, finish: Literal["stop", "length"] | None, *, all_said: bool = False) -> TextPiece:
        self.text += text
        count = len(self._said) if all_said else sum(said.start < len(self.text) for said in self._said)
        said, self._said = self._said[:count], self._said[count:]
        return TextPiece(self.choice, text, tuple(said), finish)
