"""Text out of tokens: nothing is lost, nothing is shown too early, and stop strings end it wherever tokens break."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from finemoe.serving.detokenizer import Answer, Decode, Detokenizer, StopStrings
from finemoe.serving.scheduler.job import Finished, Token
from tests.serving.serve import TOKENIZER, ids


def falling_back() -> Tokenizer:
    """Words with a leading space, and bytes for what has none."""
    words = [("<unk>", 0.0), ("▁Hello", -1.0), ("▁", -2.0), ("a", -2.0)]
    made = Tokenizer(models.Unigram([*words, *((f"<0x{b:02X}>", -10.0) for b in range(256))], 0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


FALLING_BACK = falling_back()
TEXTS = st.lists(st.sampled_from(["Hello", " ", "  ", "a", "é", "😀", "👩‍👩‍👧", "\n", "日本", "b"])).map("".join)


def decode_bytes_alone(tokens: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(tokens), skip_special_tokens=True))


def pieces(decode: Decode, tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(decode)
    return [*(detokenizer.step(token) for token in tokens), detokenizer.rest()]


@given(TEXTS)
def test_pieces_make_up_the_text(text: str) -> None:
    tokens = ids(text)
    assert "".join(pieces(decode_bytes_alone, tokens)) == decode_bytes_alone(tokens) == text


@given(TEXTS)
def test_leading_spaces_and_bytes_of_characters_are_kept(text: str) -> None:
    tokens = FALLING_BACK.encode(text).ids
    assert "".join(pieces(FALLING_BACK.decode, tokens)) == FALLING_BACK.decode(tokens)


@given(st.lists(st.integers(0, 257)))
def test_bytes_that_are_no_text_do_no_harm(tokens: list[int]) -> None:
    assert "".join(pieces(decode_bytes_alone, tokens)) == decode_bytes_alone(tokens)
    pieces(FALLING_BACK.decode, tokens)  # what it decodes to changes with what follows


def test_half_a_character_is_held_back() -> None:
    shown = pieces(decode_bytes_alone, ids("é😀")[:-1])
    assert shown == ["", "é", "", "", "", "\N{REPLACEMENT CHARACTER}"]


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=4), st.data())
def test_a_text_ends_before_the_first_stop_string(text: str, strings: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    stops, shown, ended = StopStrings(strings), "", False
    for start, end in pairwise([0, *cuts, len(text)]):
        piece, ended = stops.feed(text[start:end])
        shown += piece
        # what is shown never has to be taken back
        assert all(string not in shown for string in strings)
        if ended:
            break
    shown += "" if ended else stops.rest()
    found = [text.find(string) for string in strings if string in text]
    assert ended == bool(found)
    if found and len(strings) == 1:
        assert shown == text[: min(found)]
    elif not found:
        assert shown == text
    assert text.startswith(shown)


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopStrings([]).feed("abc") == ("abc", False)


@pytest.mark.parametrize(("stop", "text", "said"), [("c", "ab", 2), ("bc", "a", 1), ("zz", "abcd", 4)])
def test_an_answer_reports_the_tokens_of_its_text_alone(stop: str, text: str, said: int) -> None:
    answer = Answer(0, Detokenizer(decode_bytes_alone), StopStrings([stop]))
    made = [answer.hear(Token(token)) for token in ids("abcd")]
    made.append(answer.end(Finished("length")))
    shown = [piece for piece in made if piece is not None]
    assert "".join(piece.text for piece in shown) == text == answer.text
    assert [one.start for piece in shown for one in piece.said] == list(range(said))
    assert [piece.finish for piece in shown if piece.finish] == ["length" if text == "abcd" else "stop"]
