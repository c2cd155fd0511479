"""A model's tokenizer, out of its file: text to tokens and back."""

from __future__ import annotations

import codecs
import ctypes
from collections.abc import Sequence

from finemoe.errors import UnsupportedModelError
from finemoe.gguf.binding import Library

_NO_TOKENIZER = 0  # of llama_vocab_type
_PIECE_BYTES = 64


class GgufVocabulary:
    """A model's tokens.

    Args:
        library: the loaded library.
        model: its model.
        name: for messages.
    """

    def __init__(self, library: Library, model: int, name: str) -> None:
        self._api = library.api
        self._name = name
        self._vocabulary = self._api.llama_model_get_vocab(model)
        self.size = int(self._api.llama_vocab_n_tokens(self._vocabulary))
        self.has_tokenizer = self._api.llama_vocab_type(self._vocabulary) != _NO_TOKENIZER
        self.adds_bos = self.has_tokenizer and bool(self._api.llama_vocab_get_add_bos(self._vocabulary))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Tokens of a text, with the ones that the model wants around it. `special`: their names in it are tokens.

        Raises:
            UnsupportedModelError: the file has no tokenizer.
        """
        if not self.has_tokenizer:
            raise UnsupportedModelError(f"{self._name}: has no tokenizer; take a file that has one")
        data = text.encode()
        room = len(data) + 16
        while True:
            tokens = (ctypes.c_int32 * room)()
            count = self._api.llama_tokenize(self._vocabulary, data, len(data), tokens, room, True, special)  # noqa: FBT003
            if count >= 0:
                return list(tokens[:count])
            room = -count

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes that a token stands for, maybe a part of a character. `special`: names of special tokens too."""
        if not self.has_tokenizer:
            return b""
        room = _PIECE_BYTES
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = self._api.llama_token_to_piece(self._vocabulary, token, buffer, room, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    def decode(self, tokens: Sequence[int]) -> str:
        """The text that tokens stand for."""
        return b"".join(map(self.piece, tokens)).decode(errors="replace")

    def ends(self, token: int) -> bool:
        """Whether the model ends its answer with this token."""
        return bool(self._api.llama_vocab_is_eog(self._vocabulary, token))

    @property
    def bos(self) -> str:
        """The name of the token that begins a text; empty where there is none."""
        return self._special(self._api.llama_vocab_bos(self._vocabulary))

    @property
    def eos(self) -> str:
        """The name of the token that ends a text; empty where there is none."""
        return self._special(self._api.llama_vocab_eos(self._vocabulary))

    def _special(self, token: int) -> str:
        return "" if token < 0 else self.piece(token, special=True).decode(errors="replace")


class TextStream:
    """Tokens in, text out as soon as its characters are complete."""

    def __init__(self, vocabulary: GgufVocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """What became printable by this token."""
        return self._decoder.decode(self._vocabulary.piece(token))

    def end(self) -> str:
        """What is left: replacement characters for a broken one."""
        return self._decoder.decode(b"", final=True)
