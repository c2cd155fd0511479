"""Tokens to text as it becomes readable, and the strings that end it.

tokenizers' own `DecodeStream` raises where a vocabulary falls back to bytes and a model writes some that are no UTF-8.
So its method is written out here, and the best is made of what it raises for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
