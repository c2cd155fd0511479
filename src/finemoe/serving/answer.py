"""One choice of a response: its tokens in, pieces of text out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finemoe.serving.job import Finished, Token
from finemoe.serving.text import Detokenizer, StopStrings


@dataclass(frozen=True)
class Said:
    """A token, and where its text begins, in characters of the answer."""

    token: Token
    start: int


@dataclass(frozen=True)
class Piece:
    """The next part of a choice: text, and the tokens whose text begins in it. `finish` is on the last one alone."""

    choice: int
    text: str
    said: tuple[Said, ...] = ()
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
        self._said: list[Said] = []  # not handed out yet

    def hear(self, token: Token) -> Piece | None:
        """The piece that a token completes. A stop string in it ends the answer."""
        if self.ended:
            return None
        self.tokens += 1
        if token.id in self._stop_ids:
            return None
        self._said.append(Said(token, self._read))
        piece = self._detokenizer.step(token.id)
        self._read += len(piece)
        text, self.ended = self._stops.feed(piece)
        if not text and not self.ended:
            return None
        return self._piece(text, "stop" if self.ended else None)

    def end(self, finished: Finished) -> Piece | None:
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

    def _piece(self, text: str, finish: Literal["stop", "length"] | None, *, all_said: bool = False) -> Piece:
        self.text += text
        count = len(self._said) if all_said else sum(said.start < len(self.text) for said in self._said)
        said, self._said = self._said[:count], self._said[count:]
        return Piece(self.choice, text, tuple(said), finish)
