"""Find answers that got stuck repeating themselves."""

from collections import Counter
from collections.abc import Sequence


def repeated_phrase(words: Sequence[str], length: int = 8, times: int = 3) -> str:
    """A phrase of `length` words that occurs `times` times or more; empty without one."""
    phrases = Counter(tuple(words[i : i + length]) for i in range(len(words) - length + 1))
    phrase, count = phrases.most_common(1)[0] if phrases else ((), 0)
    return " ".join(phrase) if count >= times else ""


def stuck_end(ids: Sequence[int], longest: int = 24, times: int = 4) -> int:
    """Period of the cycle that `ids` ends in, when at least `times` rounds and 12 tokens of it are there; else 0."""
    for period in range(1, longest + 1):
        span = max(times * period, 12)
        tail = ids[-span:]
        if len(tail) == span and all(tail[i] == tail[i - period] for i in range(period, span)):
            return period
    return 0


def is_loop(text: str, ids: Sequence[int]) -> bool:
    """Whether an answer repeats a phrase of eight words three times, or ends in a cycle of tokens."""
    return bool(repeated_phrase(text.split())) or stuck_end(ids) > 0
