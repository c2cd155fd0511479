"""Tokenizer from the model file: text to tokens and back."""

from __future__ import annotations

import codecs
import ctypes
from collections.abc import Sequence

from finemoe.errors import UnsupportedModelError
from finemoe.gguf.binding import Library

_NO_TOKENIZER = 0  # value of llama_vocab_type
_PIECE_BYTES = 64


class GgufVocabulary:
    """A model's vocabulary and tokenizer.

    Args:
        library: the loaded library.
        model: handle of the library's model.
        name: the file's name, for error messages.
    """

    def __init__(self, library: Library, model: int, name: str) -> None:
        self._api = library.api
        self._name = name
        self._vocabulary = self._api.llama_model_get_vocab(model)
        self.size = int(self._api.llama_vocab_n_tokens(self._vocabulary))
        self.has_tokenizer = self._api.llama_vocab_type(self._vocabulary) != _NO_TOKENIZER
        self.adds_bos = self.has_tokenizer and bool(self._api.llama_vocab_get_add_bos(self._vocabulary))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Tokenize text, with the begin and end tokens that the model expects. `special`: parse special tokens in it.

        Raises:
            UnsupportedModelError: the file has no tokenizer.
        """
        if not self.has_tokenizer:
            raise UnsupportedModelError(f"{self._name}: has no tokenizer; use a file with one")
        data = text.encode()
        room = len(data) + 16
        while True:
            tokens = (ctypes.c_int32 * room)()
            count = self._api.llama_tokenize(self._vocabulary, data, len(data), tokens, room, True, special)  # noqa: FBT003
            if count >= 0:
                return list(tokens[:count])
            room = -count

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of a token, possibly a partial UTF-8 character. `special`: include the text of special tokens."""
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
        """The text of tokens."""
        return b"".join(map(self.piece, tokens)).decode(errors="replace")

    def ends(self, token: int) -> bool:
        """Whether this is an end-of-generation token."""
        return bool(self._api.llama_vocab_is_eog(self._vocabulary, token))

    @property
    def bos(self) -> str:
        """The text of the begin-of-sequence token; empty if there is none."""
        return self._special(self._api.llama_vocab_bos(self._vocabulary))

    @property
    def eos(self) -> str:
        """The text of the end-of-sequence token; empty if there is none."""
        return self._special(self._api.llama_vocab_eos(self._vocabulary))

    def _special(self, token: int) -> str:
        return "" if token < 0 else self.piece(token, special=True).decode(errors="replace")


class TextStream:
    """Incremental detokenizer that emits only complete characters."""

    def __init__(self, vocabulary: GgufVocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """Add a token; returns the newly complete characters."""
        return self._decoder.decode(self._vocabulary.piece(token))

    def end(self) -> str:
        """Finish: returns replacement characters for incomplete bytes."""
        return self._decoder.decode(b"", final=True)
