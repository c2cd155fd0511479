"""Incremental detokenization: no text is lost or emitted too early, and stop strings work across tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from finemoe.serving.detokenizer import ChoiceOutput, Decode, Detokenizer, StopStrings
from finemoe.serving.scheduler.job import Finished, Token
from tests.serving.serve import TOKENIZER, ids


def byte_fallback_tokenizer() -> Tokenizer:
    """A tokenizer of words with a leading space and byte fallback."""
    words = [("<unk>", 0.0), ("▁Hello", -1.0), ("▁", -2.0), ("a", -2.0)]
    pieces_made = Tokenizer(
        models.Unigram([*words, *((f"<0x{b:02X}>", -10.0) for b in range(256))], 0, byte_fallback=True)
    )
    pieces_made.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces_made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return pieces_made


BYTE_FALLBACK = byte_fallback_tokenizer()
TEXTS = st.lists(st.sampled_from(["Hello", " ", "  ", "a", "é", "😀", "👩‍👩‍👧", "\n", "日本", "b"])).map("".join)


def decode_bytes(tokens: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(tokens), skip_special_tokens=True))


def pieces(decode: Decode, tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(decode)
    return [*(detokenizer.step(token) for token in tokens), detokenizer.rest()]


@given(TEXTS)
def test_pieces_concatenate_to_the_text(text: str) -> None:
    tokens = ids(text)
    assert "".join(pieces(decode_bytes, tokens)) == decode_bytes(tokens) == text


@given(TEXTS)
def test_leading_spaces_and_bytes_of_characters_are_kept(text: str) -> None:
    tokens = BYTE_FALLBACK.encode(text).ids
    assert "".join(pieces(BYTE_FALLBACK.decode, tokens)) == BYTE_FALLBACK.decode(tokens)


@given(st.lists(st.integers(0, 257)))
def test_invalid_utf8_is_accepted(tokens: list[int]) -> None:
    assert "".join(pieces(decode_bytes, tokens)) == decode_bytes(tokens)
    pieces(BYTE_FALLBACK.decode, tokens)  # its text may change with later tokens


def test_incomplete_characters_are_withheld() -> None:
    emitted = pieces(decode_bytes, ids("é😀")[:-1])
    assert emitted == ["", "é", "", "", "", "\N{REPLACEMENT CHARACTER}"]


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=4), st.data())
def test_a_text_ends_before_the_first_stop_string(text: str, strings: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    stops, emitted, ended = StopStrings(strings), "", False
    for start, end in pairwise([0, *cuts, len(text)]):
        piece, ended = stops.feed(text[start:end])
        emitted += piece
        # emitted text never has to be retracted
        assert all(string not in emitted for string in strings)
        if ended:
            break
    emitted += "" if ended else stops.rest()
    found = [text.find(string) for string in strings if string in text]
    assert ended == bool(found)
    if found and len(strings) == 1:
        assert emitted == text[: min(found)]
    elif not found:
        assert emitted == text
    assert text.startswith(emitted)


def test_without_stop_strings_nothing_is_withheld() -> None:
    assert StopStrings([]).feed("abc") == ("abc", False)


@pytest.mark.parametrize(("stop", "text", "count"), [("c", "ab", 2), ("bc", "a", 1), ("zz", "abcd", 4)])
def test_an_answer_reports_only_the_tokens_of_its_text(stop: str, text: str, count: int) -> None:
    answer = ChoiceOutput(0, Detokenizer(decode_bytes), StopStrings([stop]))
    pieces_made = [answer.append(Token(token)) for token in ids("abcd")]
    pieces_made.append(answer.finish(Finished("length")))
    emitted = [piece for piece in pieces_made if piece is not None]
    assert "".join(piece.text for piece in emitted) == text == answer.text
    assert [token.start for piece in emitted for token in piece.tokens] == list(range(count))
    assert [piece.finish for piece in emitted if piece.finish] == ["length" if text == "abcd" else "stop"]
